"""The estimators by name: what saved probes, recipes and the command line call them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from veridical.errors import unknown

if TYPE_CHECKING:
    from veridical.probes.base import LinearProbe

KINDS = {
    "logistic": "LogisticProbe",
    "ridge": "RidgeProbe",
    "mass_mean": "MassMeanProbe",
    "lda": "LDAProbe",
    "lat": "LATProbe",
    "ccs": "CCSProbe",
    "ttpd": "TTPDProbe",
    "stacked": "StackedProbe",
    "mean_tokens": "MeanTokenProbe",
    "max_tokens": "MaxTokenProbe",
    "rolling": "RollingProbe",
    "attention": "AttentionProbe",
    "mil": "MILProbe",
}
"""Module of `veridical.probes` and class of each estimator; a new estimator is one more line."""


def kind(name: str) -> type[LinearProbe]:
    """The estimator class of that name; an unknown name is an error that gives the nearest."""
    if name not in KINDS:
        raise unknown("kind of probe", name, KINDS)
    return getattr(importlib.import_module(f"veridical.probes.{name}"), KINDS[name])
