"""ReLU with an L1 penalty: the classic sparse autoencoder.

Cunningham et al. 2023 (arXiv:2309.08600); Bricken et al. 2023, "Towards Monosemanticity"; the penalty
weighted by decoder norms as in Conerly et al. 2024 (transformer-circuits.pub/2024/april-update), which with
unit-norm rows is plain L1:

    f = ReLU(W_enc (x - b_dec) + b_enc)
    loss = |x - x̂|² + λ Σ_i f_i |W_dec,i|

It shrinks activations, since the penalty pulls every active latent down, and leaves many latents dead.
"""

from __future__ import annotations

from torch import Tensor

from veridical.saes.base import FIRED, SAE, Loss, figures, per_member


class ReLU(SAE):
    """`ReLU(W_enc (x - b_dec) + b_enc)`, trained with an L1 penalty (`sparsity`)."""

    architecture = "relu"

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x [..., d_in]`: `[..., F]`, never negative."""
        return self.pre_activations(x).relu()

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, dead: Tensor | None = None, ramp: Tensor | float = 1.0
    ) -> Loss:
        """Squared error summed over dimensions plus the penalty; dead latents get no term of their own."""
        latents = self.encode(x)
        residual = self.targets(x, y) - (latents @ self.W_dec + self.row(self.b_dec))
        error = per_member(residual.square().sum(-1))
        l1 = per_member((latents * self.row(self.W_dec.norm(dim=-1))).sum(-1))
        l0 = per_member((latents.detach() > 0).sum(-1).to(error.dtype))
        return Loss(
            total=error + ramp * self.each([config.penalty for config in self.configs]) * l1,
            parts=figures(fvu=error / self.variance, l1=l1, l0=l0),
            fired=(latents.detach() > FIRED).any(-2),
        )

    def describe(self) -> str:
        return f"L1 penalty {self.config.penalty:g}"
