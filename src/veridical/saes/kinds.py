"""The architectures by name: what configs, recipes and saved SAEs call them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from veridical.errors import unknown

if TYPE_CHECKING:
    from veridical.saes.base import SAE

KINDS = {
    "relu": "ReLU",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "matryoshka": "Matryoshka",
    "transcoder": "Transcoder",
    "jumprelu_transcoder": "JumpReLUTranscoder",
    "crosscoder": "Crosscoder",
}
"""Module of `veridical.saes` and class of each architecture; a new architecture is one more line."""


def kind(name: str) -> type[SAE]:
    """The class of the architecture of that name; an unknown name is an error that gives the nearest."""
    if name not in KINDS:
        raise unknown("SAE architecture", name, KINDS)
    return getattr(importlib.import_module(f"veridical.saes.{name}"), KINDS[name])
