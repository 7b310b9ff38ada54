"""Sparse autoencoders: one file per architecture, one trainer for many over one stream of activations.

`config` says what one SAE is, `base` is what all share, `kinds` their names: `relu`, `gated`, `jumprelu` pay
a penalty for active latents; `topk`, `batch_topk`, `matryoshka`, `transcoder`, `crosscoder` keep a number of
them and train sparsely (`sparse`, over `kernels`), with `auxk` for their dead latents.

`train_saes` in `trainer` steps members of like shape as one (`group`), over vectors from a store, tensors, an
iterator or a running model (`stream`), with exact resume (`checkpoint`); `measure` gives figures on held-out
vectors, `runs` is what comes back. `sweep_saes` in `sweep` cancels bad members early by the rules of
`halving`, here or over a cluster (`ray_engine`); `tracking` sends figures to trackio or wandb.
`latent_scaling` checks a crosscoder's exclusive latents.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veridical.saes.base import SAE
    from veridical.saes.config import SAEConfig
    from veridical.saes.latent_scaling import LatentScaling, latent_scaling
    from veridical.saes.runs import SAERuns
    from veridical.saes.sweep import sweep_saes
    from veridical.saes.sweep_config import SweepConfig
    from veridical.saes.swept import SAESweep
    from veridical.saes.trainer import train_saes

_HOME = {
    "SAE": "base",
    "LatentScaling": "latent_scaling",
    "SAEConfig": "config",
    "SAERuns": "runs",
    "SAESweep": "swept",
    "SweepConfig": "sweep_config",
    "latent_scaling": "latent_scaling",
    "sweep_saes": "sweep",
    "train_saes": "trainer",
}
__all__ = [
    "SAE",
    "LatentScaling",
    "SAEConfig",
    "SAERuns",
    "SAESweep",
    "SweepConfig",
    "latent_scaling",
    "sweep_saes",
    "train_saes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veridical.saes' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"veridical.saes.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
