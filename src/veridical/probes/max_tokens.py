"""The maximum over tokens: a sequence is as positive as its most positive token.

    f(x_1 ... x_T) = max_t (w . x_t + b)

Used for harmful exchanges by McKenzie et al. 2025 (arXiv:2506.10805) and, per head, by Kramar et al. 2026
(arXiv:2601.11516), who find that a maximum keeps a signal of few tokens in long contexts where a mean dilutes
it. It fails where the evidence is spread over many tokens, and one odd token is enough for a false alarm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veridical.probes.packed import Layout
from veridical.probes.pooled import Pooled, PooledProbe
from veridical.probes.sequence import Running


class MaxTokenProbe(PooledProbe):
    """Logistic regression on the largest token reading; arguments as in `PooledProbe`."""

    name = "max_tokens"

    def pool(self, readings: Tensor, layout: Layout) -> Pooled:
        z = readings[:, 0]
        best = z[: layout.counts[0]].clone()
        at = torch.zeros(best.shape, dtype=torch.int32, device=z.device)
        for position, first, last, count in layout.blocks():
            if position:
                block = z[first:last]
                at[:count].masked_fill_(block > best[:count], position)
                torch.maximum(best[:count], block, out=best[:count])
        return Pooled(best, at)

    def spread(self, along: Tensor, readings: Tensor, pooled: Pooled, layout: Layout) -> Tensor:
        out = torch.empty_like(readings)
        for position, first, last, count in layout.blocks():
            torch.mul(along[:count], pooled.kept[:count] == position, out=out[first:last, 0])
        return out

    def running(self) -> Running:
        return _Running(self._adjusts())

    def said(self) -> str:
        return self._said("maximum over tokens")


class _Running(Running):
    def add(self, readings: Tensor) -> Tensor:
        value = readings[:, 0]
        self._best = value if self.count == 1 else torch.maximum(self._best, value)
        return self._best
