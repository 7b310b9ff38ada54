"""Calibrated instruments for asking a model what it represents and whether it says what it believes.

Names are loaded when first used: `import veridical` imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.activations import Activations, collect
    from veridical.comparison import Comparison, compare, compare_many, load_pair
    from veridical.errors import VeridicalError
    from veridical.interventions import (
        ablate,
        attribute,
        direct_logits,
        find_circuit,
        logit_lens,
        patch,
        patch_paths,
        tuned_lens,
    )
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
    from veridical.saved_result import load_result
    from veridical.sites import Site
    from veridical.steering import SteeringVector
    from veridical.steering.train import train_adapter

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Comparison",
    "HookedModel",
    "LogisticProbe",
    "Pairs",
    "ProbeSweep",
    "SAEConfig",
    "Site",
    "SteeringVector",
    "VeridicalError",
    "ablate",
    "attribute",
    "causal_check",
    "check_beliefs",
    "collect",
    "compare",
    "compare_many",
    "direct_logits",
    "find_circuit",
    "fit_probes",
    "honesty_protocol",
    "load",
    "load_pair",
    "load_probe",
    "load_result",
    "load_sae",
    "logit_lens",
    "patch",
    "patch_paths",
    "report",
    "sweep_saes",
    "train_adapter",
    "train_saes",
    "transfer_matrix",
    "tuned_lens",
    "view_tokens",
]

_HOME = {
    "load_pair": "comparison",
    "compare": "comparison",
    "compare_many": "comparison",
    "Comparison": "comparison",
    "Activations": "activations",
    "HookedModel": "models",
    "LogisticProbe": "probes",
    "Pairs": "pairs",
    "ProbeSweep": "probes",
    "SAEConfig": "saes",
    "Site": "sites",
    "SteeringVector": "steering",
    "VeridicalError": "errors",
    "ablate": "interventions",
    "attribute": "interventions",
    "causal_check": "probes",
    "check_beliefs": "pairs",
    "collect": "activations",
    "direct_logits": "interventions",
    "find_circuit": "interventions",
    "fit_probes": "probes",
    "honesty_protocol": "probes",
    "load": "models",
    "load_probe": "probes",
    "load_result": "saved_result",
    "load_sae": "saes",
    "logit_lens": "interventions",
    "patch": "interventions",
    "patch_paths": "interventions",
    "report": "reporting",
    "sweep_saes": "saes",
    "train_adapter": "steering.train",
    "train_saes": "saes",
    "transfer_matrix": "probes",
    "tuned_lens": "interventions",
    "view_tokens": "probes",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
