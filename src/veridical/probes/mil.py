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

import torch
from torch import Tensor

from veridical.probes.packed import Layout
from veridical.probes.pooled import Pooled, PooledProbe
from veridical.probes.sequence import Running

LEAST = -600.0
"""Readings below are taken as this: their probability (1e-261) is still above 0 in float64."""


class MILProbe(PooledProbe):
    """Noisy OR over token probabilities; arguments as in `PooledProbe`."""

    name = "mil"

    def pool(self, readings: Tensor, layout: Layout) -> Pooled:
        each = _softplus(readings[:, 0])
        total = each[: layout.counts[0]].clone()
        for position, first, last, count in layout.blocks():
            if position:
                total[:count] += each[first:last]
        return Pooled(_log_odds(total), total)

    def spread(self, along: Tensor, readings: Tensor, pooled: Pooled, layout: Layout) -> Tensor:
        out = torch.sigmoid(readings)
        share = along / -torch.expm1(-pooled.kept)
        for _, first, last, count in layout.blocks():
            out[first:last, 0] *= share[:count]
        return out

    def growth(
        self, parameters: Tensor, within: Tensor, readings: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Mean of log(1 + exp(reading)) over all tokens: what one token adds to S on average."""
        tokens = len(readings)
        return _softplus(readings[:, 0]).mean(0), None, torch.sigmoid(readings) / tokens

    def expected(self, lengths: Tensor, typical: float, growth: Tensor) -> tuple[Tensor, Tensor]:
        """The log-odds of S = T times the average, less those at the typical length."""
        tokens = lengths.to(torch.float64)[:, None]
        total, middle = tokens * growth, typical * growth
        slope = tokens / -torch.expm1(-total) - typical / -torch.expm1(-middle)
        return _log_odds(total) - _log_odds(middle), slope

    def running(self) -> Running:
        return _Running(self._adjusts())

    def said(self) -> str:
        return self._said("noisy OR over tokens")


class _Running(Running):
    def add(self, readings: Tensor) -> Tensor:
        value = _softplus(readings[:, 0])
        self._total = value if self.count == 1 else self._total + value
        return _log_odds(self._total)


def _softplus(z: Tensor) -> Tensor:
    z = z.clamp_min(LEAST)
    return torch.where(z < -30, torch.exp(z), torch.nn.functional.softplus(z, threshold=700.0))


def _log_odds(total: Tensor) -> Tensor:
    """log(exp(S) - 1) without overflow."""
    return total + torch.log(-torch.expm1(-total))
