"""Sparse autoencoders: one file per architecture, one trainer for many of them over one stream of activations.

`config` says what one SAE is, `base` is what all share, `kinds` their names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veridical.saes.base import SAE
    from veridical.saes.config import SAEConfig

_HOME = {
    "SAE": "base",
    "SAEConfig": "config",
}
__all__ = ["SAE", "SAEConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veridical.saes' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"veridical.saes.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
