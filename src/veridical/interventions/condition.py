"""What about a model as it is given changes how it may be run."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


def carries_hooks(model: HookedModel) -> bool:
    """Whether any module has forward hooks, which may tell rows and positions apart."""
    modules: Any = model.model.modules()
    return any(part._forward_hooks or part._forward_pre_hooks for part in modules)


def warn_of_training(model: HookedModel) -> None:
    """Warns of dropout that makes every run another."""
    active = any(isinstance(m, torch.nn.Dropout) and m.p > 0 and m.training for m in model.model.modules())
    if active:
        warnings.warn(
            f"{model.path} is in training mode with dropout, so effects hold its noise; call .eval() first",
            stacklevel=3,
        )
