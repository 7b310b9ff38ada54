"""Interventions: what a model's activations do to its outputs, found by changing them.

`metrics` says what is measured (`logits -> [batch]`), `inputs` pairs clean and corrupt runs, with `align` for
texts of unequal length.

`graph` names what writes into the residual stream and what reads it, and the edges between; `contributions`
has what each part adds. `attribute` scores parts by `gradients` between two `runs`: linearly, along a path
(`integrated`), or edge by edge (`edges`); `attribution` is what it found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.interventions.attributing import attribute
    from veridical.interventions.attribution import Attribution
    from veridical.interventions.graph import Edge, Graph, Node
    from veridical.interventions.inputs import Inputs
    from veridical.interventions.metrics import Metric, ProbeMetric, as_metric

_HOME = {
    "Attribution": "attribution",
    "Edge": "graph",
    "Graph": "graph",
    "Inputs": "inputs",
    "Metric": "metrics",
    "Node": "graph",
    "ProbeMetric": "metrics",
    "as_metric": "metrics",
    "attribute": "attributing",
}
__all__ = [
    "Attribution",
    "Edge",
    "Graph",
    "Inputs",
    "Metric",
    "Node",
    "ProbeMetric",
    "as_metric",
    "attribute",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
