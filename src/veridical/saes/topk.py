"""TopK: the k largest latents of each token are kept, so sparsity is set and not negotiated.

Makhzani and Frey 2013 (arXiv:1312.5663); Gao et al. 2024 (arXiv:2406.04093), with ReLU after the choice:

    f = ReLU(TopK(W_enc (x - b_dec) + b_enc))
    loss = |x - x̂|² / Var(x) + 1/32 · AuxK

Every token gets k latents, whether it needs them or not; BatchTopK lets tokens share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veridical.saes.base import SAE


class TopK(SAE):
    """`ReLU(TopK(W_enc (x - b_dec) + b_enc))`."""

    architecture = "topk"

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen latents of `x [..., d_in]`: values and indices, both `[..., k]`, largest first.

        In a stack k is the largest of the members'; one with a smaller k has zeros after its own.
        """
        return self.choose(self.pre_activations(x))

    def choose(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices of the latents that are kept, from pre-activations `[..., F]`."""
        most = max(config.k for config in self.configs)
        values, indices = pre.topk(most, dim=-1)
        values = values.relu()
        if any(config.k < most for config in self.configs):
            rank = torch.arange(most, device=pre.device)
            own = torch.tensor([config.k for config in self.configs], device=pre.device)
            values = values * (rank < own[:, None, None])
        return values, indices

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x [..., d_in]`, dense: `[..., F]`, at most k of them above 0."""
        pre = self.pre_activations(x)
        values, indices = self.choose(pre)
        return torch.zeros_like(pre).scatter(-1, indices, values)
