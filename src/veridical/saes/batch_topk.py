"""BatchTopK: the k·B largest latents of a batch of B tokens are kept, so that tokens share them by need.

Bussmann, Leask and Nanda 2024 (arXiv:2412.06410):

    f = BatchTopK(ReLU(W_enc (x - b_dec) + b_enc)),  k active latents a token on average
    loss = |x - x̂|² / Var(x) + 1/32 · AuxK

A single vector has no batch, so outside training a latent is active where it exceeds `threshold`: the mean,
over recent batches, of the smallest activation that was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from veridical.saes.config import SAEConfig
from veridical.saes.kernels import Chosen
from veridical.saes.scan import Scan
from veridical.saes.sparse import SparseSAE

RATE = 0.01
"""Weight of the latest batch in the running threshold, once there were a hundred of them."""
MARGIN = 0.7
"""Share of the running threshold above which a batch's candidates are looked for."""


class BatchTopK(SparseSAE):
    """`ReLU(W_enc (x - b_dec) + b_enc)` where it exceeds a threshold that keeps k latents a token on average.

    Attributes:
        threshold: What latents have to exceed outside training, a scalar (`[N]` for a stack); 0 at first.
        updates: Batches that the threshold was estimated from, likewise.
    """

    architecture = "batch_topk"
    homogeneous = ("b_enc", "b_dec", "threshold")
    member_buffers: ClassVar[tuple[str, ...]] = ("threshold", "updates")

    threshold: Tensor
    updates: Tensor

    def __init__(self, configs: SAEConfig | Sequence[SAEConfig], d_in: int, d_out: int | None = None) -> None:
        super().__init__(configs, d_in, d_out)
        shape = (len(self.configs),) if self.stacked else ()
        self.register_buffer("threshold", torch.zeros(shape))
        self.register_buffer("updates", torch.zeros(shape, dtype=torch.int64))

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x [..., d_in]`: `[..., F]`, those above the threshold."""
        pre = self.pre_activations(x).relu()
        weights = self.weights()
        ranked = pre if weights is None else pre * self.row(weights)
        return pre * (ranked > self.threshold[..., None, None] if self.stacked else ranked > self.threshold)

    def weights(self) -> Tensor | None:
        """What latents are multiplied by where they compete, `[F]` (`[N, F]`); None for nothing."""
        return None

    def pick(self, scan: Scan) -> Chosen:
        """The k·B largest positive pre-activations of each member's batch."""
        weights = self.weights()
        weights = None if weights is None else self.led(weights, 2)
        cuts = self.led(self.threshold, 1) * MARGIN
        found = self._above(scan, weights, cuts)
        short = [len(one[3]) < self._budget(n, scan) for n, one in enumerate(found)]
        if any(cut > 0 and few for cut, few in zip(cuts.tolist(), short)):
            cuts = cuts * ~torch.tensor(short, device=cuts.device)
            found = self._above(scan, weights, cuts)
        kept = [self._largest(one, self._budget(n, scan)) for n, one in enumerate(found)]
        self._update(torch.stack([least for *_, least in kept]))
        rows = torch.cat([n * scan.size + rows for n, (rows, *_) in enumerate(kept)])
        starts = torch.searchsorted(rows, torch.arange(scan.members * scan.size + 1, device=rows.device))
        columns = torch.cat([n * scan.width + columns for n, (_, columns, *_) in enumerate(kept)])
        values = torch.cat([values for _, _, values, _ in kept]).to(self.W_enc.dtype)
        return Chosen(columns, starts, values, scan.members * scan.width)

    def _budget(self, member: int, scan: Scan) -> int:
        return self.configs[member].k * scan.size

    def _above(
        self, scan: Scan, weights: Tensor | None, cuts: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Row, latent, value and rank value of all that exceed `cuts [N]`, member by member, in row order."""

        def use(members: slice, rows: slice, pre: Tensor) -> list[tuple[int, tuple[Tensor, ...]]]:
            made = []
            for member, own in zip(range(members.start, members.stop), pre):
                ranked = own if weights is None else own * weights[member]
                row, column = (ranked > cuts[member]).nonzero(as_tuple=True)
                made.append((member, (row + rows.start, column, own[row, column], ranked[row, column])))
            return made

        found: list[list[tuple[Tensor, ...]]] = [[] for _ in range(scan.members)]
        for part in scan.each(use):
            for member, own in part:
                found[member].append(own)
        return [tuple(map(torch.cat, zip(*parts))) for parts in found]  # type: ignore[misc]

    def _largest(
        self, found: tuple[Tensor, Tensor, Tensor, Tensor], budget: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, latents and values of the `budget` largest, and the least rank value among them.

        Of equal ones at the border the first in row order are kept, so that what is kept does not depend on
        how many candidates there were.
        """
        rows, columns, values, ranked = found
        if not len(ranked):
            return rows, columns, values, self.threshold.new_zeros(())
        if len(ranked) <= budget:
            return rows, columns, values, ranked.min()
        least = ranked.kthvalue(len(ranked) - budget + 1).values
        above, equal = ranked > least, (ranked == least).nonzero().squeeze(-1)
        above[equal[: budget - int(above.sum())]] = True
        return rows[above], columns[above], values[above], least

    def _update(self, least: Tensor) -> None:
        rate = (1 / (self.updates + 1)).clamp_min(RATE)
        self.threshold += rate * (least.view_as(self.threshold).to(self.threshold.dtype) - self.threshold)
        self.updates += 1
