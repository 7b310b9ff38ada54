"""The largest mean over a window of consecutive tokens: evidence must hold for a few tokens, not for one.

    f(x_1 ... x_T) = max_t mean_{s = t-W+1 .. t} (w . x_s + b),   windows that lie wholly in the sequence,

and the mean of all tokens where there are fewer than W. W = 1 is the maximum over tokens, W >= T the mean.
McKenzie et al. 2025 (arXiv:2506.10805) compare it among other poolings; Kramar et al. 2026 (arXiv:2601.11516)
put attention inside the window. It fails where the evidence is scattered.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from veridical.errors import DataError
from veridical.probes.packed import Layout, expected_rolling_maximum
from veridical.probes.pooled import Pooled, PooledProbe
from veridical.probes.sequence import Running


class RollingProbe(PooledProbe):
    """Logistic regression on the largest mean reading of `window` consecutive tokens.

    Args:
        C: As in `PooledProbe`.
        window: Tokens in a window, at least 1.
        standardise: As in `PooledProbe`.
        adjust_length: As in `PooledProbe`.
        tol: As in `PooledProbe`.
        max_iter: As in `PooledProbe`.
    """

    name = "rolling"

    def __init__(
        self,
        C: float = 1.0,
        *,
        window: int = 5,
        standardise: bool = True,
        adjust_length: bool = True,
        tol: float = 1e-5,
        max_iter: int = 1000,
    ) -> None:
        super().__init__(C, standardise=standardise, adjust_length=adjust_length, tol=tol, max_iter=max_iter)
        self.window = window

    def beyond(self, lengths: Tensor, typical: float) -> Tensor:
        middle = expected_rolling_maximum(torch.tensor([typical], dtype=torch.float64), self.window)
        return expected_rolling_maximum(lengths.to(torch.float64), self.window) - middle.to(lengths.device)

    def pool(self, readings: Tensor, layout: Layout) -> Pooled:
        z, width = readings[:, 0], self.window
        blocks = list(layout.blocks())
        total = z[: layout.counts[0]].clone()
        for _, first, last, count in blocks[1:width]:
            total[:count] += z[first:last]
        size = layout.lengths.clamp(max=width)[:, None]
        best = total / size
        end = (size - 1).to(torch.int32).repeat(1, z.shape[1])
        for position, first, last, count in blocks[width:]:
            _, old, _, _ = blocks[position - width]
            total[:count] += z[first:last] - z[old : old + count]
            block = total[:count] / width
            end[:count].masked_fill_(block > best[:count], position)
            torch.maximum(best[:count], block, out=best[:count])
        return Pooled(best, end)

    def spread(self, along: Tensor, readings: Tensor, pooled: Pooled, layout: Layout) -> Tensor:
        out = torch.empty_like(readings)
        size = layout.lengths.clamp(max=self.window)[:, None]
        share, end = along / size, pooled.kept
        for position, first, last, count in layout.blocks():
            inside = (end[:count] >= position) & (end[:count] < position + size[:count])
            torch.mul(share[:count], inside, out=out[first:last, 0])
        return out

    def running(self) -> Running:
        return _Running(self._adjusts(), self.window)

    def said(self) -> str:
        return self._said(f"largest mean over {self.window} tokens")

    def _check(self) -> None:
        super()._check()
        if self.window < 1:
            raise DataError(f"window is {self.window!r}; expected at least 1 token")


class _Running(Running):
    """The last `window` readings; the sum is made anew each time, so that rounding does not pile up."""

    def __init__(self, drift: Any, window: int) -> None:
        super().__init__(drift)
        self._last: deque[Tensor] = deque(maxlen=window)
        self._window = window

    def add(self, readings: Tensor) -> Tensor:
        self._last.append(readings[:, 0])
        mean = torch.stack(tuple(self._last)).mean(0)
        self._best = mean if self.count <= self._window else torch.maximum(self._best, mean)
        return self._best
