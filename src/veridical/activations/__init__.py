"""Reading a model's activations over a data set, and keeping them: in memory or in a store on disk."""

from __future__ import annotations

from veridical.activations.activations import Activations
from veridical.activations.collect import collect
from veridical.activations.moments import Moments
from veridical.activations.reader import Reader

__all__ = ["Activations", "Moments", "Reader", "collect"]
