"""Gated: which latents are active is decided apart from how strongly, so the penalty does not shrink them.

Rajamanoharan et al. 2024 (arXiv:2404.16014):

    π = W_enc (x - b_dec) + b_gate
    f = 1[π > 0] ⊙ ReLU(exp(r_mag) ⊙ W_enc (x - b_dec) + b_mag)
    loss = |x - x̂(f)|² + λ Σ_i ReLU(π)_i + |x - x̂_frozen(ReLU(π))|²

The last term trains the gate, which the first does not reach; x̂_frozen uses the decoder without training it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veridical.saes.base import FIRED, SAE, Loss, figures, per_member
from veridical.saes.config import SAEConfig


class Gated(SAE):
    """A gate `W_enc (x - b_dec) + b_gate > 0`, and magnitudes that share its directions.

    `r_mag`, `b_mag` and `b_gate` are `[F]` (`[N, F]`); there is no `b_enc`.
    """

    architecture = "gated"
    homogeneous = ("b_gate", "b_mag", "b_dec")

    r_mag: Tensor
    b_mag: Tensor
    b_gate: Tensor

    @classmethod
    def initial(cls, config: SAEConfig, d_in: int, d_out: int) -> dict[str, Tensor]:
        """Random decoder directions, the encoder its transpose, equal scales, biases of zero."""
        made = super().initial(config, d_in, d_out)
        zero = made.pop("b_enc")
        return {**made, "r_mag": zero, "b_mag": zero.clone(), "b_gate": zero.clone()}

    def pre_activations(self, x: Tensor) -> Tensor:
        """What the gate opens for where it is positive: `[..., F]`."""
        return self.inputs(x) @ self.W_enc.mT + self.row(self.b_gate)

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x [..., d_in]`: `[..., F]`."""
        return self._latents(self.inputs(x) @ self.W_enc.mT)[0]

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, dead: Tensor | None = None, ramp: Tensor | float = 1.0
    ) -> Loss:
        """Both errors summed over dimensions, and the penalty; dead latents get no term of their own."""
        latents, gate = self._latents(self.inputs(x) @ self.W_enc.mT)
        opened, target, bias = gate.relu(), self.targets(x, y), self.row(self.b_dec)
        error = per_member((target - latents @ self.W_dec - bias).square().sum(-1))
        frozen = opened @ self.W_dec.detach() + bias.detach()
        gating = per_member((target - frozen).square().sum(-1))
        l1 = per_member(opened.sum(-1))
        fired = latents.detach() > FIRED
        penalty = self.each([config.penalty for config in self.configs])
        l0 = per_member((latents.detach() > 0).sum(-1).to(error.dtype))
        return Loss(
            total=error + ramp * penalty * l1 + gating,
            parts=figures(fvu=error / self.variance, l1=l1, gate=gating, l0=l0),
            fired=fired.any(-2),
        )

    def describe(self) -> str:
        return f"L1 penalty {self.config.penalty:g}"

    def _latents(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and gate from `W_enc (x - b_dec)`."""
        gate = projected + self.row(self.b_gate)
        magnitude = projected * self.row(self.r_mag.exp()) + self.row(self.b_mag)
        return torch.where(gate > 0, magnitude.relu(), 0.0), gate
