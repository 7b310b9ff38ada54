"""JumpReLU transcoder: latents above learned thresholds that predict another site from the one that is read.

Dunefsky, Chlenski and Nanda 2024 (arXiv:2406.11944) with ReLU, which is a threshold of 0; Gemma Scope 2 and
others with JumpReLU; a linear skip path as in Paulo, Shabalin and Belrose 2025 (arXiv:2501.18823):

    f = z ⊙ H(z - θ),  z = W_enc x + b_enc;  ŷ = W_dec f + b_dec (+ W_skip x)
    loss = |y - ŷ|² + λ Σ_i H(z_i - θ_i)

It is what the transcoders of SAELens are read as. `Transcoder` keeps k latents instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veridical.saes.base import Loss
from veridical.saes.config import SAEConfig
from veridical.saes.jumprelu import JumpReLU


class JumpReLUTranscoder(JumpReLU):
    """`W_dec JumpReLU(W_enc x + b_enc) + b_dec`, with `W_skip x` beside it where `skip` is set.

    `W_skip [d_out, d_in]` (`[N, d_out, d_in]`) starts at zero.
    """

    architecture = "jumprelu_transcoder"

    W_skip: Tensor

    @classmethod
    def initial(cls, config: SAEConfig, d_in: int, d_out: int) -> dict[str, Tensor]:
        """As for JumpReLU, and a skip path of zeros."""
        made = super().initial(config, d_in, d_out)
        return {**made, "W_skip": torch.zeros(d_out, d_in)} if config.skip else made

    def forward(self, x: Tensor) -> Tensor:
        """Prediction from `x [..., d_in]`: `[..., d_out]`, both in raw units."""
        predicted = self.decode(self.encode(x))
        if not self.config.skip:
            return predicted
        return predicted + self.inputs(x) @ self.W_skip.mT / self.scale_out

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, dead: Tensor | None = None, ramp: Tensor | float = 1.0
    ) -> Loss:
        """As for JumpReLU; latents have to make up the target less what the skip path predicts."""
        y = x if y is None else y
        if self.config.skip:
            y = y - self.inputs(x) @ self.W_skip.mT / self.scale_out
        return super().loss(x, y, dead=dead, ramp=ramp)

    def _fold(self, state: dict[str, Tensor]) -> None:
        super()._fold(state)
        if self.config.skip:
            state["W_skip"] *= self.scale / self.scale_out
