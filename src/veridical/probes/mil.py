"""Multiple-instance learning by a noisy OR: a sequence is positive when at least one of its tokens is.

    p_t = sigmoid(w . x_t + b),   P(positive) = 1 - prod_t (1 - p_t),
    f(x_1 ... x_T) = log(P / (1 - P)) = log(exp(S) - 1),   S = sum_t log(1 + exp(w . x_t + b))

Handing a sequence's label to all its tokens is noisy: most tokens of a positive sequence show nothing. Here a
token's label is hidden and only the sequence's is seen, which is the standard assumption of
multiple-instance learning (Dietterich, Lathrop and Lozano-Perez 1997); the noisy OR is that of Maron and
Lozano-Perez 1998 and of Viola, Platt and Zhang 2005. It was chosen over top-k, which needs k, and over
expectation-maximisation, which climbs the same likelihood by a slower road: the likelihood has a closed form
and a gradient. Without `adjust_length`, the score of a single token is its reading. It fails where no single
token decides; and a small p in each of many tokens adds up, which `adjust_length` takes back.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from veridical.probes.packed import Layout
from veridical.probes.pooled import Pooled, PooledProbe
from veridical.probes.sequence import Running

SMALL = -15.0
"""Logarithms of S below which S is so small that log(exp(S) - 1) is log(S), and log(1 + exp(z)) is exp(z)."""


class MILProbe(PooledProbe):
    """Noisy OR over token probabilities; arguments as in `PooledProbe`.

    Sums are kept as logarithms, so that tokens whose probability is too small for a float still tell apart.
    """

    name = "mil"

    def pool(self, readings: Tensor, layout: Layout) -> Pooled:
        each = _log_softplus(readings[:, 0])
        top = each[: layout.counts[0]].clone()
        for _, first, last, count in layout.blocks():
            torch.maximum(top[:count], each[first:last], out=top[:count])
        total = torch.zeros_like(top)
        for _, first, last, count in layout.blocks():
            total[:count] += torch.exp(each[first:last] - top[:count])
        total = top + torch.log(total)
        return Pooled(_log_odds(total), (each, total))

    def spread(self, along: Tensor, readings: Tensor, pooled: Pooled, layout: Layout) -> Tensor:
        each, total = pooled.kept
        share, out = along * _log_odds_slope(total), torch.empty_like(readings)
        for _, first, last, count in layout.blocks():
            out[first:last, 0] = share[:count] * torch.exp(each[first:last] - total[:count])
        return out * _log_softplus_slope(readings, each[:, None])

    def growth(
        self, parameters: Tensor, within: Tensor, readings: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logarithm of the mean of log(1 + exp(reading)) over all tokens: what one token adds to S."""
        each = _log_softplus(readings)
        whole = torch.logsumexp(each, 0)
        share = torch.exp(each - whole) * _log_softplus_slope(readings, each)
        return whole[0] - log(len(readings)), None, share

    def expected(self, lengths: Tensor, typical: float, growth: Tensor) -> tuple[Tensor, Tensor]:
        """The log-odds of S = T times the average, less those at the typical length."""
        total = torch.log(lengths.to(torch.float64))[:, None] + growth
        middle = log(typical) + growth
        slope = _log_odds_slope(total) - _log_odds_slope(middle)
        return _log_odds(total) - _log_odds(middle), slope

    def running(self) -> Running:
        return _Running(self._adjusts())

    def said(self) -> str:
        return self._said("noisy OR over tokens")


class _Running(Running):
    def add(self, readings: Tensor) -> Tensor:
        value = _log_softplus(readings[:, 0])
        self._total = value if self.count == 1 else torch.logaddexp(self._total, value)
        return _log_odds(self._total)


def _log_softplus(z: Tensor) -> Tensor:
    """log(log(1 + exp(z)))."""
    return torch.where(z < SMALL, z, torch.log(torch.nn.functional.softplus(z.clamp_min(SMALL))))


def _log_softplus_slope(z: Tensor, value: Tensor) -> Tensor:
    return torch.where(z < SMALL, 1.0, torch.sigmoid(z) * torch.exp(-value.clamp_min(SMALL - 1)))


def _log_odds(total: Tensor) -> Tensor:
    """log(exp(S) - 1) from log(S)."""
    s = torch.exp(total.clamp_min(SMALL))
    return torch.where(total < SMALL, total, s + torch.log(-torch.expm1(-s)))


def _log_odds_slope(total: Tensor) -> Tensor:
    s = torch.exp(total.clamp_min(SMALL))
    return torch.where(total < SMALL, 1.0, s / -torch.expm1(-s))
