"""Calibrated instruments for asking a model what it represents and whether it says what it believes.

Names are loaded when first used: `import veridical` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veridical.activations import Activations, collect
    from veridical.errors import VeridicalError
    from veridical.models import HookedModel, load
    from veridical.pairs import Pairs, check_beliefs
    from veridical.probes import (
        LogisticProbe,
        ProbeSweep,
        causal_check,
        fit_probes,
        honesty_protocol,
        load_probe,
        transfer_matrix,
        view_tokens,
    )
    from veridical.reporting import report
    from veridical.saes import SAEConfig, load_sae, sweep_saes, train_saes
    from veridical.sites import Site

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "HookedModel",
    "LogisticProbe",
    "Pairs",
    "ProbeSweep",
    "SAEConfig",
    "Site",
    "VeridicalError",
    "causal_check",
    "check_beliefs",
    "collect",
    "fit_probes",
    "honesty_protocol",
    "load",
    "load_probe",
    "load_sae",
    "report",
    "sweep_saes",
    "train_saes",
    "transfer_matrix",
    "view_tokens",
]

_HOME = {
    "Activations": "activations",
    "HookedModel": "models",
    "LogisticProbe": "probes",
    "Pairs": "pairs",
    "ProbeSweep": "probes",
    "SAEConfig": "saes",
    "Site": "sites",
    "VeridicalError": "errors",
    "causal_check": "probes",
    "check_beliefs": "pairs",
    "collect": "activations",
    "fit_probes": "probes",
    "honesty_protocol": "probes",
    "load": "models",
    "load_probe": "probes",
    "load_sae": "saes",
    "report": "reporting",
    "sweep_saes": "saes",
    "train_saes": "saes",
    "transfer_matrix": "probes",
    "view_tokens": "probes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veridical' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"veridical.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
