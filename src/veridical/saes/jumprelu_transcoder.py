"""JumpReLU transcoder: latents above learned thresholds that predict another site from the one that is read.

Dunefsky, Chlenski and Nanda 2024 (arXiv:2406.11944) with ReLU, which is a threshold of 0; Gemma Scope 2 and
others with JumpReLU; a linear skip path as in Paulo, Shabalin and Belrose 2025 (arXiv:2501.18823):

    f = z ⊙ H(z - θ),  z = W_enc x + b_enc;  ŷ = W_dec f + b_dec (+ W_skip x)
    loss = |y - ŷ|² + λ Σ_i H(z_i - θ_i)

It is what the transcoders of SAELens are read as. `Transcoder` keeps k latents instead.
"""

from __future__ import annotations

from torch import Tensor

from veridical.saes.base import ENCODER_NORM, Loss
from veridical.saes.jumprelu import JumpReLU
from veridical.saes.skip import Skip


class JumpReLUTranscoder(Skip, JumpReLU):
    """`W_dec JumpReLU(W_enc x + b_enc) + b_dec`, with `W_skip x` beside it where `skip` is set."""

    architecture = "jumprelu_transcoder"
    threshold_at_first = 0.1 * ENCODER_NORM
    """Lower than an SAE's: the encoder has to turn first, and of 32 latents that start at a whole standard
    deviation 28 were dead after the short run that the tests make."""

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, dead: Tensor | None = None, ramp: Tensor | float = 1.0
    ) -> Loss:
        """As for JumpReLU; latents have to make up the target less what the skip path predicts."""
        y = x if y is None else y
        if self.config.skip:
            y = y - self.skipped(x)
        return super().loss(x, y, dead=dead, ramp=ramp)
