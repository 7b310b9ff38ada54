"""TopK: the k largest latents of each token are kept, so sparsity is set and not negotiated.

Makhzani and Frey 2013 (arXiv:1312.5663); Gao et al. 2024 (arXiv:2406.04093), with ReLU after the choice:

    f = ReLU(TopK(W_enc (x - b_dec) + b_enc))
    loss = |x - x̂|² / Var(x) + 1/32 · AuxK

Every token gets k latents, whether it needs them or not; BatchTopK lets tokens share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veridical.saes.kernels import Chosen
from veridical.saes.largest import largest
from veridical.saes.scan import Scan
from veridical.saes.sparse import SparseSAE


class TopK(SparseSAE):
    """`ReLU(TopK(W_enc (x - b_dec) + b_enc))`."""

    architecture = "topk"

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen latents of `x [..., d_in]`: values and indices, both `[..., k]`, largest first.

        In a stack k is the largest of the members'; one with a smaller k has zeros after its own.
        """
        return self._largest(self.pre_activations(x))

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x [..., d_in]`, dense: `[..., F]`, at most k of them above 0."""
        pre = self.pre_activations(x)
        values, indices = self._largest(pre)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def pick(self, scan: Scan) -> Chosen:
        """The k largest pre-activations of each row and member."""
        counts = [config.k for config in self.configs]
        each = torch.tensor(counts, device=scan.x.device).repeat_interleave(scan.size)
        starts = torch.zeros(len(each) + 1, dtype=torch.int64, device=scan.x.device)
        torch.cumsum(each, 0, out=starts[1:])
        values = scan.x.new_empty(scan.size * sum(counts))
        columns = torch.empty_like(values, dtype=torch.int64)
        own = [scan.size * count for count in counts]
        by_member = list(zip(values.split(own), columns.split(own), counts))

        def use(members: slice, rows: slice, pre: Tensor) -> None:
            for member, one in zip(range(members.start, members.stop), pre):
                to_values, to_columns, k = by_member[member]
                found, where = largest(one, k)
                to_values.view(-1, k)[rows] = found
                torch.add(where, member * scan.width, out=to_columns.view(-1, k)[rows])

        scan.each(use)
        values = values.to(self.W_enc.dtype)
        return Chosen(columns, starts, values, scan.members * scan.width)

    def _largest(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        most = max(config.k for config in self.configs)
        values, indices = pre.topk(most, dim=-1)
        kept = self._within_k(most)
        return (values.relu() if kept is None else values.relu() * kept), indices

    def _within_k(self, most: int) -> Tensor | None:
        """Which of the `most` largest count, `[N, 1, most]`; None where all do."""
        counts = [config.k for config in self.configs]
        if min(counts) == most:
            return None
        device = self.W_enc.device
        return (torch.arange(most, device=device) < torch.tensor(counts, device=device)[:, None])[:, None]
