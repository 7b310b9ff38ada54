"""A policy against its reference: outputs, representations and weights in one report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.comparison.comparing import compare
    from veridical.comparison.comparison import Comparison
    from veridical.comparison.config import CompareConfig
    from veridical.comparison.duo import Duo, load_pair
    from veridical.comparison.policies import Policies
    from veridical.comparison.several import compare_many
    from veridical.comparison.weights import weight_change

__all__ = [
    "CompareConfig",
    "Comparison",
    "Duo",
    "Policies",
    "compare",
    "compare_many",
    "load_pair",
    "weight_change",
]

_HOME = {
    "CompareConfig": "config",
    "Comparison": "comparison",
    "Duo": "duo",
    "Policies": "policies",
    "compare": "comparing",
    "compare_many": "several",
    "load_pair": "duo",
    "weight_change": "weights",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
