"""The options of `veridical steer adapter` and `export`. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

import tyro
from pydantic.dataclasses import dataclass

from veridical.config import STRICT
from veridical.inputs import Inputs, OutFolder
from veridical.steering.adapter_config import AdapterConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SteerAdapterVerb(AdapterConfig, Inputs):
    """Trains a LoRA that moves a behaviour within a KL budget, and saves it with the proof of its effect.

    Example: veridical steer adapter --model tiny-liar --data honesty --kl-budget 0.05

    Writes OUT/adapter (a plain PEFT folder, measured again in a fresh process with plain PEFT before it is
    there) and OUT/report.html. Exit status 2 and the best adapter that the budget allows where training
    cannot keep to it; a budget that allows no effect leaves no adapter.
    """

    neutral: str | None = None
    """Text on which nothing should change: a file, a data set with completions, or a hub id. Required for
    models other than the embedded organisms."""
    kept: str | None = None
    """Likewise text of other behaviour that training holds still; not part of the budget."""
    vector: Path | None = None
    """Folder of a saved steering vector, for the objective distil_vector."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/adapter-MODEL-DATA when not given."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SteerExportVerb(Inputs):
    """Proves a saved adapter again and hands it on: merged into its base, or pushed to the hub.

    Example: veridical steer export runs/adapter-tiny-liar-honesty/adapter --merged runs/honest-model

    The adapter is loaded in a fresh process with plain PEFT and has to do what it was measured to do.
    """

    folder: tyro.conf.Positional[Path | None] = None
    """Folder of a saved adapter. Required."""
    merged: Path | None = None
    """Folder for the base with the adapter merged into its weights, and its tokenizer."""
    hub: str | None = None
    """Repository that the adapter's folder is pushed to, such as someone/honest; made private if new."""
    strength: float = 1.0
    """Strength at which it is merged; within the range that it was measured in."""


VERBS: dict[str, type] = {"steer adapter": SteerAdapterVerb, "steer export": SteerExportVerb}
