"""Interventions: what a model's activations do to its outputs, found by changing them.

`metrics` says what is measured (`logits -> [batch]`), `inputs` pairs clean and corrupt runs, with `align` for
texts of unequal length. `patch` sweeps activation patches over sites, layers, positions and heads (`places`):
`sweep` says which runs that needs, `suffix` makes them, running only what lies above and behind a patch
(`blockwise` passes blocks over or cuts them short, `prefix` holds the key/value caches, `bands` decides which
patches share a start). `patched` is the result, `heat_maps` draws it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.interventions.inputs import Inputs
    from veridical.interventions.metrics import Metric, ProbeMetric, as_metric
    from veridical.interventions.patch import patch
    from veridical.interventions.patched import Patched

_HOME = {
    "Inputs": "inputs",
    "Metric": "metrics",
    "Patched": "patched",
    "ProbeMetric": "metrics",
    "as_metric": "metrics",
    "patch": "patch",
}
__all__ = ["Inputs", "Metric", "Patched", "ProbeMetric", "as_metric", "patch"]

__getattr__, __dir__ = lazy(__name__, _HOME)
