"""The estimators by name: what saved probes, recipes and the command line call them."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING

import yaml

from veridical.errors import ConfigError, unknown

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


def estimator(said: str) -> LinearProbe:
    """An unfitted estimator by name, with parameters after colons: `lda`, `ttpd:polarity=negated:C=0.1`.

    Values are read as YAML (`null`, `true`, numbers, text).

    Raises:
        UnknownNameError: An estimator or a parameter that does not exist; gives the nearest.
        ConfigError: A parameter without a value.
    """
    name, *given = said.split(":")
    cls = kind(name.strip())
    names, parameters = list(inspect.signature(cls).parameters), {}
    for one in given:
        key, sign, value = (part.strip() for part in one.partition("="))
        if not sign or not value:
            raise ConfigError(f"{one!r} in the estimator {said!r}: expected PARAMETER=VALUE")
        if key not in names:
            raise unknown(f"parameter of {name}", key, names)
        parameters[key] = yaml.safe_load(value)
    return cls(**parameters)


def kind(name: str) -> type[LinearProbe]:
    """The estimator class of that name; an unknown name is an error that gives the nearest."""
    if name not in KINDS:
        raise unknown("kind of probe", name, KINDS)
    return getattr(importlib.import_module(f"veridical.probes.{name}"), KINDS[name])
