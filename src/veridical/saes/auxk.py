"""AuxK: dead latents are made to reconstruct what the living ones leave over (Gao et al. 2024, section A.2).

    e = x - x̂ (no gradient);  z = ReLU(TopK_aux(pre-activations of the dead latents));  ê = W_dec z
    loss = |e - ê|² / |e - mean(e)|²

summed over the batch, and added with coefficient 1/32. A latent is dead when it was not above 1e-3 for a
number of tokens. There is no loss when none is dead, or when nothing is left over.

The published form reads activations, so a dead latent whose pre-activation is never positive gets no gradient
and stays dead. `straight_through` computes the same loss, but lets through ReLU every gradient that raises a
pre-activation, so such a latent rises for the tokens whose residual it points along until it is active there.
(To read raw pre-activations instead revives fewer: where all dead latents are read, a latent serves with
negative values as well as with positive ones, and constant ones of several cancel. Of 48 latents with a bias
of -5 that left all 48 dead, this one to three.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veridical.saes.config import SAEConfig
from veridical.saes.kernels import squared_error
from veridical.saes.largest import kth_largest


@dataclass(frozen=True)
class Plan:
    """What the auxiliary loss of one member computes: which latents, how many of them at a time, and how.

    Attributes:
        member: Number of the member in its stack.
        ids: Its dead latents, `[n]`.
        k: Latents that are active for a token.
        through: Whether gradients pass ReLU where they raise a pre-activation.
    """

    member: int
    ids: Tensor
    k: int
    through: bool

    def values(self, pre: Tensor) -> Tensor:
        """Activations of the dead latents from their pre-activations `[..., n]`, zero outside the top k."""
        least = kth_largest(pre, min(self.k, pre.shape[-1]))
        return _Activations.apply(pre, least, self.through)  # type: ignore[return-value]


def plans(configs: Sequence[SAEConfig], d_in: int, dead: Tensor | None) -> list[Plan]:
    """A plan for each member that has dead latents, and an auxiliary loss.

    Args:
        configs: The members' configs.
        d_in: Width of the inputs, which decides k_aux.
        dead: Booleans `[N, F]`; None for none.
    """
    if dead is None or not dead.any():
        return []
    made = []
    for number, (config, row) in enumerate(zip(configs, dead)):
        ids = row.nonzero().squeeze(-1)
        if config.aux > 0 and len(ids):
            k = min(config.aux_latents(d_in), len(ids))
            made.append(Plan(number, ids, k, config.aux_variant == "straight_through"))
    return made


class _Activations(torch.autograd.Function):
    """ReLU of what is not below `least`; if `through`, no obstacle to a gradient that raises its input."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, least: Tensor, through: bool) -> Tensor:
        active = pre >= least.clamp_min(torch.finfo(pre.dtype).tiny)
        ctx.save_for_backward(active, (pre >= least) if through else None)
        return pre * active

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        active, kept = ctx.saved_tensors
        passed = active if kept is None else active | (kept & (grad < 0))
        return grad * passed, None, None


def auxiliary_loss(reconstruction: Tensor, residual: Tensor) -> Tensor:
    """Normalised squared error of `reconstruction [B, d]` as a copy of `residual [B, d]`, a scalar.

    The residual gets no gradient. A residual without variance gives 0.
    """
    residual = residual.detach()
    variance = (residual - residual.mean(0)).square().sum() / len(residual)
    error = squared_error(reconstruction, residual)[0]
    return torch.where(variance > 0, error / variance.clamp_min(torch.finfo(error.dtype).tiny), 0 * error)
