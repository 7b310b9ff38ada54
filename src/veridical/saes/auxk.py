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
        acts = _RaisingReLU.apply(pre) if self.through else pre.relu()
        if self.k >= len(self.ids):
            return acts  # type: ignore[return-value]
        kept = pre.detach().topk(self.k, dim=-1, sorted=False).indices
        return acts * torch.zeros_like(pre).scatter_(-1, kept, 1.0)  # type: ignore[operator]


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


class _RaisingReLU(torch.autograd.Function):
    """ReLU that is no obstacle to a gradient which raises its input."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor) -> Tensor:
        ctx.save_for_backward(pre)
        return pre.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (pre,) = ctx.saved_tensors
        return grad * ((pre > 0) | (grad < 0))


def auxiliary_loss(reconstruction: Tensor, residual: Tensor) -> Tensor:
    """Normalised squared error of `reconstruction [B, d]` as a copy of `residual [B, d]`, a scalar.

    The residual gets no gradient. A residual without variance gives 0.
    """
    residual = residual.detach()
    variance = (residual - residual.mean(0)).square().sum()
    error = (residual - reconstruction).square().sum()
    return torch.where(variance > 0, error / variance.clamp_min(torch.finfo(error.dtype).tiny), 0 * error)
