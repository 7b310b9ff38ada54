"""JumpReLU: a learned threshold for each latent, and a penalty on the number of active ones.

Rajamanoharan et al. 2024 (arXiv:2407.14435):

    f = z ⊙ H(z - θ),  z = W_enc x + b_enc,  θ = exp(log_threshold)
    loss = |x - x̂|² + λ Σ_i H(z_i - θ_i)

The step H has no gradient, so thresholds get that of the expected loss, estimated with a rectangular window
of width ε (`bandwidth`), as in the paper's equations (11) and (12):

    d f / d θ = -θ / ε · 1[|z - θ| < ε / 2],   d H / d θ = -1 / ε · 1[|z - θ| < ε / 2]

The coefficient weighs one active latent against squared error, in units of the scaled input, whose variance
is about d. Encoder and biases get no gradient from the penalty, so sparsity comes from the thresholds alone,
and Adam moves a log-threshold by at most the learning rate in a step: to multiply one by 20 takes 3 / lr
steps, 1,500 at a rate of 2e-3. The paper starts at 0.001 for inputs of norm 1, here 0.05 or a tenth of a
standard deviation of the first pre-activations, and trains millions of steps. From there a short run does not
reach what the penalty asks for, whatever its coefficient; so thresholds start at one standard deviation.

To choose a coefficient, train three a factor of 3 apart, which costs one pass.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from veridical.saes.base import ENCODER_NORM, FIRED, SAE, Loss, figures, per_member
from veridical.saes.config import SAEConfig


class JumpReLU(SAE):
    """`z = W_enc x + b_enc` where it exceeds its latent's threshold; `log_threshold` is `[F]` (`[N, F]`)."""

    architecture = "jumprelu"
    centred = False

    threshold_at_first: ClassVar[float] = ENCODER_NORM
    """One standard deviation of the first pre-activations, rows of this norm on inputs of mean norm sqrt(d):
    about a sixth of the latents is active."""
    log_threshold: Tensor

    @classmethod
    def initial(cls, config: SAEConfig, d_in: int, d_out: int) -> dict[str, Tensor]:
        """Random decoder directions, the encoder its transpose, small equal thresholds."""
        made = super().initial(config, d_in, d_out)
        return {**made, "log_threshold": torch.full_like(made["b_enc"], math.log(cls.threshold_at_first))}

    @property
    def threshold(self) -> Tensor:
        """What a latent has to exceed, `[F]` (`[N, F]`)."""
        return self.log_threshold.exp()

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x [..., d_in]`: `[..., F]`."""
        pre = self.pre_activations(x)
        return pre * (pre > self.row(self.threshold))

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, dead: Tensor | None = None, ramp: Tensor | float = 1.0
    ) -> Loss:
        """Squared error summed over dimensions plus the penalty; dead latents get no term of their own."""
        pre, threshold = self.pre_activations(x), self.row(self.threshold)
        width = self.each([config.bandwidth for config in self.configs])
        width = width[:, None, None] if self.stacked else width
        latents = _Jump.apply(pre, threshold, width)
        active = _Step.apply(pre, threshold, width)
        residual = self.targets(x, y) - (latents @ self.W_dec + self.row(self.b_dec))  # type: ignore[operator]
        error = per_member(residual.square().sum(-1))
        l0 = per_member(active.sum(-1))  # type: ignore[union-attr]
        penalty = self.each([config.penalty for config in self.configs])
        return Loss(
            total=error + ramp * penalty * l0,
            parts=figures(fvu=error / self.variance, l0=l0),
            fired=(latents.detach() > FIRED).any(-2),  # type: ignore[union-attr]
        )

    def describe(self) -> str:
        return f"L0 penalty {self.config.penalty:g}"

    def _fold(self, state: dict[str, Tensor]) -> None:
        super()._fold(state)
        state["log_threshold"] -= self.scale_out.log()


class _Jump(torch.autograd.Function):
    """`z` where it exceeds the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, width)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pre, threshold, width = ctx.saved_tensors
        near = (pre - threshold).abs() < width / 2
        along = -(threshold / width) * near * grad
        return grad * (pre > threshold), along.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """1 where `z` exceeds the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, width)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pre, threshold, width = ctx.saved_tensors
        near = (pre - threshold).abs() < width / 2
        return None, -(near * grad / width).sum_to_size(threshold.shape), None
