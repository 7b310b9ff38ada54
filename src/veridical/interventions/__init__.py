"""Interventions: what a model's activations do to its outputs, found by changing them.

`metrics` says what is measured (`logits -> [batch]`), `inputs` pairs clean and corrupt runs, with `align` for
texts of unequal length.

`ablate` takes sites, heads, neurons, SAE features or directions out, over the `means` of a data set, tokens
that `drawing` picks, or nothing (`replacing`); `spots` says at which tokens, `units` which heads.

`graph` names what writes into the residual stream and what reads it, and the edges between; `contributions`
has what each part adds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.interventions.ablate import Ablation, ablate
    from veridical.interventions.graph import Edge, Graph, Node
    from veridical.interventions.inputs import Inputs
    from veridical.interventions.means import Means, mean_activations
    from veridical.interventions.metrics import Metric, ProbeMetric, as_metric

_HOME = {
    "Ablation": "ablate",
    "Edge": "graph",
    "Graph": "graph",
    "Inputs": "inputs",
    "Means": "means",
    "Metric": "metrics",
    "Node": "graph",
    "ProbeMetric": "metrics",
    "ablate": "ablate",
    "as_metric": "metrics",
    "mean_activations": "means",
}
__all__ = [
    "Ablation",
    "Edge",
    "Graph",
    "Inputs",
    "Means",
    "Metric",
    "Node",
    "ProbeMetric",
    "ablate",
    "as_metric",
    "mean_activations",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
