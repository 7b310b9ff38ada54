"""Matryoshka: nested dictionaries, each of which reconstructs by itself, so that general features come first.

Bussmann, Nabeshima, Karvonen and Nanda 2025 (arXiv:2503.17547), over BatchTopK latents:

    x̂_m = Σ_{i ≤ m} f_i W_dec,i + b_dec  for the widths m of `prefixes`
    loss = mean over m of |x - x̂_m|² / Var(x) + 1/32 · AuxK of the whole

A wide dictionary alone splits a general feature into special ones that leave holes in it (absorption); here
the first latents cannot rely on the later ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veridical.saes.batch_topk import BatchTopK
from veridical.saes.kernels import Block, Chosen, decode_at, squared_error


class Matryoshka(BatchTopK):
    """BatchTopK whose latents reconstruct in nested prefixes (`prefixes`)."""

    architecture = "matryoshka"

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Widths of the nested dictionaries, the last being F."""
        return self.config.widths(self.d_in)

    def decode_prefixes(self, latents: Tensor) -> list[Tensor]:
        """Reconstructions `[..., d_out]` from latents `[..., F]` by each nested dictionary, raw units."""
        row = self.row(self.b_dec)
        return [
            (latents[..., :width] @ self.W_dec[..., :width, :] + row) / self.scale_out
            for width in self.prefixes
        ]

    def errors(
        self,
        x: Tensor,
        target: Tensor,
        values: Tensor,
        chosen: Chosen,
        blocks: Sequence[Block],
        acts: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Errors of each prefix, whose reconstructions are running sums of what each ring adds."""
        (members, size), rings = x.shape[:2], len(self.prefixes)
        ends = torch.tensor(self.prefixes, device=values.device)
        ring = torch.searchsorted(ends, chosen.columns % self.width, right=True)
        member, token = chosen.rows // size, chosen.rows % size
        rows, order = torch.sort((member * rings + ring) * size + token, stable=True)
        starts = torch.searchsorted(rows, torch.arange(members * rings * size + 1, device=rows.device))
        by_ring = Chosen(chosen.columns[order], starts, chosen.values[order], chosen.width)
        shape = (members, rings, size)
        out, revived = decode_at(values[order], self.led(self.W_dec, 3), by_ring, shape, blocks, acts)
        made = out.cumsum(1) + self.led(self.b_dec, 2)[:, None, None]
        errors, residuals = squared_error(made, target)
        return errors, residuals[:, -1], revived
