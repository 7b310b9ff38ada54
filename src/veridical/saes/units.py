"""Raw units: what an SAE's latents, thresholds and decoder rows are in once its input scale is folded in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veridical.saes.base import SAE


def unscaled(sae: SAE) -> SAE:
    """The SAE with its input scale in the weights, so that latents and decoder are in raw units."""
    done = bool((sae.scale == 1).all()) and bool((sae.scale_out == 1).all())
    return sae if done else sae.folded()
