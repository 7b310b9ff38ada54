"""The options of `veridical compare`. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from veridical.comparison.config import CompareConfig
from veridical.config import STRICT
from veridical.inputs import DataInputs, OutFolder


def _listed(value: object) -> object:
    """One name, as recipes give it, as several."""
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CompareVerb(CompareConfig, DataInputs):
    """Measures what preference training changed: a policy against the model that it started from.

    Example: veridical compare runs/dpo/policy --reference Qwen/Qwen3-0.6B --data pairs.csv

    Writes OUT/report.html, which begins with what changed in plain sentences: outputs (KL by token and
    position, on the given text and on the policy's own samples, behaviour), representations (drift, CKA,
    Procrustes, lenses, the label's direction), probes and SAEs on both, where the change sits (cross-model
    patching) and weights. With several policies the report holds them side by side instead: a table, maps,
    and which are alike inside or only outside. --config recipe.yaml gives options by name; flags win.
    """

    policy: tyro.conf.Positional[Names] = ()
    """The trained model: a folder, a hub name, an embedded organism, or the folder of a LoRA. Required, but
    with --compress. Several are compared with each other."""
    reference: str | None = None
    """The model that it started from. Required, except for a LoRA, whose base is taken."""
    compress: str | None = None
    """Make the policy from the reference instead: int8 or int4 (weights rounded to so many bits), prune-50
    (the smallest 50 % of each weight matrix set to zero)."""
    probes: tuple[Path, ...] = ()
    """Folders of saved linear probes of the reference: read on the policy and back, trained anew, and their
    directions held against the change of the weights. Where one reads a label of belief (lied, ...) that the
    data lack, the reference is asked first, as `veridical probe` does it."""
    saes: tuple[Path, ...] = ()
    """Folders of saved sparse autoencoders of the reference, run on both models."""
    trained_on: Names = ()
    """With several policies: what each was trained on, in their order; those that share it are told apart."""
    reward: str | None = None
    """With several policies: a reward model that judges their answers."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/compare-POLICY-DATA when not given."""
