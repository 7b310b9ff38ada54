"""Steering: small changes of what a model represents, with what they do to its behaviour measured.

`neutral` has the text on which nothing should change, and the exact KL there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.steering.neutral import NeutralKL, NeutralMeter, kl_loss, neutral_kl, neutral_texts

_HOME = {
    "NeutralKL": "neutral",
    "NeutralMeter": "neutral",
    "kl_loss": "neutral",
    "neutral_kl": "neutral",
    "neutral_texts": "neutral",
}
__all__ = ["NeutralKL", "NeutralMeter", "kl_loss", "neutral_kl", "neutral_texts"]

__getattr__, __dir__ = lazy(__name__, _HOME)
