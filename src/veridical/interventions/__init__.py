"""Interventions: what a model's activations do to its outputs, found by changing them.

`ablate` takes sites, heads, neurons, SAE features or directions out, over the `means` of a data set, tokens
that `drawing` picks, or nothing (`replacing`); `spots` says at which tokens, `units` which heads.

`lenses` reads the residual stream of every layer as next-token distributions (`lens_reading`) through the
model's own norm and head (`readout`), `tuned` after a trained map, and `direct` splits a logit into what each
part of the model adds to it.

`metrics` says what is measured (`logits -> [batch]`), `inputs` pairs clean and corrupt runs, with `align` for
texts of unequal length. `patch` (in `patching`) sweeps activation patches over sites, layers, positions and
heads (`places`): `sweep` says which runs that needs, `suffix` makes them, running only what lies above and
behind a patch (`blockwise` passes blocks over or cuts them short, `prefix` holds the key/value caches,
`bands` decides which patches share a start). `patched` is the result, `heat_maps` draws it.

`graph` names what writes into the residual stream and what reads it, and the edges between; `contributions`
has what each part adds. `attribute` scores parts by `gradients` between two `runs`: linearly, along a path
(`integrated`), or edge by edge (`edges`); `attribution` is what it found.

`patch_paths` in `paths` patches edges and paths (`links`) exactly, over the runs that `between` sets up and
`rewire` makes (`rewired_pass`); `patched_paths` is the result. `find_circuit` in `circuit` keeps the edges
that explain a metric and checks them; `connected` says which edges lead somewhere, `circuit_result` is the
result, `circuit_figures` draws it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.interventions.ablation import Ablation, ablate
    from veridical.interventions.attributing import attribute
    from veridical.interventions.attribution import Attribution
    from veridical.interventions.circuit import find_circuit
    from veridical.interventions.circuit_result import Circuit
    from veridical.interventions.direct import DirectLogits, direct_logits
    from veridical.interventions.graph import Edge, Graph, Node
    from veridical.interventions.inputs import Inputs
    from veridical.interventions.lens_reading import LensReading
    from veridical.interventions.lenses import logit_lens
    from veridical.interventions.means import Means, mean_activations
    from veridical.interventions.metrics import Metric, ProbeMetric, as_metric
    from veridical.interventions.patched import Patched
    from veridical.interventions.patched_paths import PatchedPaths
    from veridical.interventions.patching import patch
    from veridical.interventions.paths import patch_paths
    from veridical.interventions.tuned import tuned_lens
    from veridical.interventions.tuned_result import TunedLens

_HOME = {
    "Ablation": "ablation",
    "Attribution": "attribution",
    "Circuit": "circuit_result",
    "DirectLogits": "direct",
    "Edge": "graph",
    "Graph": "graph",
    "Inputs": "inputs",
    "LensReading": "lens_reading",
    "Means": "means",
    "Metric": "metrics",
    "Node": "graph",
    "Patched": "patched",
    "PatchedPaths": "patched_paths",
    "ProbeMetric": "metrics",
    "TunedLens": "tuned_result",
    "ablate": "ablation",
    "as_metric": "metrics",
    "attribute": "attributing",
    "direct_logits": "direct",
    "find_circuit": "circuit",
    "logit_lens": "lenses",
    "mean_activations": "means",
    "patch": "patching",
    "patch_paths": "paths",
    "tuned_lens": "tuned",
}
__all__ = [
    "Ablation",
    "Attribution",
    "Circuit",
    "DirectLogits",
    "Edge",
    "Graph",
    "Inputs",
    "LensReading",
    "Means",
    "Metric",
    "Node",
    "Patched",
    "PatchedPaths",
    "ProbeMetric",
    "TunedLens",
    "ablate",
    "as_metric",
    "attribute",
    "direct_logits",
    "find_circuit",
    "logit_lens",
    "mean_activations",
    "patch",
    "patch_paths",
    "tuned_lens",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
