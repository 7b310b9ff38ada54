"""The options of `veridical compare`. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

import tyro
from pydantic.dataclasses import dataclass

from veridical.comparison.config import CompareConfig
from veridical.config import STRICT
from veridical.inputs import DataInputs, OutFolder


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CompareVerb(CompareConfig, DataInputs):
    """Measures what preference training changed: a policy against the model that it started from.

    Example: veridical compare runs/dpo/policy --reference Qwen/Qwen3-0.6B --data pairs.csv

    Writes OUT/report.html, which begins with what changed in plain sentences: outputs (KL by token and
    position, on the given text and on the policy's own samples, behaviour), representations (drift, CKA,
    Procrustes, lenses, the label's direction), probes and SAEs on both, where the change sits, and weights.
    --config recipe.yaml gives options by name; flags win.
    """

    policy: tyro.conf.Positional[str | None] = None
    """The trained model: a folder, a hub name, an embedded organism, or the folder of a LoRA. Required."""
    reference: str | None = None
    """The model that it started from. Required, except for a LoRA, whose base is taken."""
    probes: tuple[Path, ...] = ()
    """Folders of saved linear probes of the reference: read on the policy and back, trained anew, and their
    directions held against the change of the weights. Where one reads a label of belief (lied, ...) that the
    data lack, the reference is asked first, as `veridical probe` does it."""
    saes: tuple[Path, ...] = ()
    """Folders of saved sparse autoencoders, run on both models."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/compare-POLICY-DATA when not given."""
