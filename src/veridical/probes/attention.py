"""Softmax attention with several heads: the probe learns which tokens to listen to.

    f(x_1 ... x_T) = sum_h sum_t a_ht (v_h . x_t) / sqrt(H) + b,   a_h = softmax over t of (q_h . x_t)

One query and one value vector per head, as in McKenzie et al. 2025 (arXiv:2506.10805, one head),
EleutherAI's attention probes (Shabalin and Belrose 2025, several heads) and Kramar et al. 2026
(arXiv:2601.11516); pooling by learned attention over a bag is Ilse et al. 2018 (arXiv:1802.04712). There is
no position term, so the order of tokens does not matter. The factor 1 / sqrt(H) makes the penalty on the
values the same for any H: heads that agree cost what one head costs. Queries of 0 give the mean over tokens.
Each head has twice the parameters of a mean or a maximum, so it needs more data; attention weights say where
it looks, not what it reads there (`token_scores` does).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError
from veridical.probes.packed import Layout, SequenceDesign
from veridical.probes.pooled import Pooled, PooledProbe
from veridical.probes.sequence import Running


class AttentionProbe(PooledProbe):
    """Logistic regression on an attention-weighted mean, with the attention learned.

    Args:
        C: As in `PooledProbe`; queries and values are penalised alike.
        heads: Number of heads H, at least 1.
        standardise: As in `PooledProbe`.
        adjust_length: As in `PooledProbe`.
        tol: As in `PooledProbe`.
        max_iter: As in `PooledProbe`.

    Attributes:
        queries_: `[H, d]`, in units of logits per unit of activation.
        values_: `[H, d]`, the factor 1 / sqrt(H) included; `coef_` is their sum.
        offsets_: `[2 H]`, intercepts of the queries (which change nothing) and of the values.
    """

    name = "attention"
    extra = ("length", "queries", "values", "offsets")

    def __init__(
        self,
        C: float = 1.0,
        *,
        heads: int = 1,
        standardise: bool = True,
        adjust_length: bool = True,
        tol: float = 1e-5,
        max_iter: int = 1000,
    ) -> None:
        super().__init__(C, standardise=standardise, adjust_length=adjust_length, tol=tol, max_iter=max_iter)
        self.heads = heads

    @property
    def channels(self) -> int:
        return 2 * self.heads

    def attention(self, tokens: np.ndarray) -> np.ndarray:
        """Attention weights `[H, tokens]` over the vectors `[tokens, d]` of one sequence."""
        z = self.queries_ @ np.asarray(tokens, dtype=np.float64).T
        weights = np.exp(z - z.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    def pool(self, readings: Tensor, layout: Layout) -> Pooled:
        query, value = readings[:, : self.heads], readings[:, self.heads :]
        top = query[: layout.counts[0]].clone()
        for _, first, last, count in layout.blocks():
            torch.maximum(top[:count], query[first:last], out=top[:count])
        weight = torch.empty_like(query)
        total, read = torch.zeros_like(top), torch.zeros_like(top)
        for _, first, last, count in layout.blocks():
            block = torch.exp(query[first:last] - top[:count])
            weight[first:last] = block
            total[:count] += block
            read[:count] += block * value[first:last]
        read /= total
        return Pooled(read.sum(1) / self.heads**0.5, (weight, total, read))

    def spread(self, along: Tensor, readings: Tensor, pooled: Pooled, layout: Layout) -> Tensor:
        weight, total, read = pooled.kept
        out = torch.empty_like(readings)
        share = along[:, None] / (total * self.heads**0.5)
        for _, first, last, count in layout.blocks():
            to_value = weight[first:last] * share[:count]
            out[first:last, self.heads :] = to_value
            out[first:last, : self.heads] = to_value * (readings[first:last, self.heads :] - read[:count])
        return out

    def growth(
        self, parameters: Tensor, within: Tensor, readings: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Covariance of query and value readings within sequences, over heads.

        To first order in the queries, softmax attention adds it, times 1 - 1 / T, to the mean of the values.
        Sharper queries leave a little: AUROC 0.53 on noise whose length alone gives 0.90.
        """
        query = parameters[:, : self.heads]
        moved = (within @ parameters.reshape(len(within), -1)).reshape(parameters.shape) / self.heads**0.5
        by_query, by_value = moved[:, self.heads :], moved[:, : self.heads]
        return (query * by_query).sum((0, 1)), torch.cat([by_query, by_value], 1), None

    def beyond(self, lengths: Tensor, typical: float) -> Tensor:
        return 1 / typical - 1 / lengths.to(torch.float64)

    def begin(self, design: SequenceDesign, solution: Tensor) -> Tensor:
        """The mean probe in every head; heads differ in whether they listen to high or to low readings.

        Equal heads would get equal gradients and stay equal. The first starts at the mean over all tokens,
        the second at tokens that the mean probe finds positive, the third at negative ones, and so on.
        """
        values = solution / self.heads**0.5
        direction = solution.clone()
        direction[-1] = 0
        spread = (design.second_moment[:, None] * direction.square()).sum(0).sqrt()
        direction = direction / torch.where(spread > 0, spread, 1.0)
        tilts = [(number + 1) // 2 * (1 if number % 2 else -1) for number in range(self.heads)]
        return torch.stack([tilt * direction for tilt in tilts] + [values] * self.heads, 1)

    def lift(self, parameters: Tensor, shift: Tensor) -> Tensor:
        parameters[-1, self.heads :] += shift / self.heads**0.5
        return parameters

    def readers(self) -> tuple[np.ndarray, np.ndarray]:
        """Queries, then values; their intercepts."""
        # `pool` divides by sqrt(H), which the stored values already hold.
        scale = np.repeat([1.0, self.heads**0.5], self.heads)
        return np.concatenate([self.queries_, self.values_]) * scale[:, None], self.offsets_ * scale

    def _keep(self, coefficients: np.ndarray, intercepts: np.ndarray) -> None:
        scale = np.repeat([1.0, self.heads**-0.5], self.heads)
        folded = coefficients * scale[:, None]
        self.queries_, self.values_ = (np.ascontiguousarray(part) for part in np.split(folded, 2))
        self.offsets_ = intercepts * scale

    def single(self, coefficients: np.ndarray, intercepts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.values_.sum(0), self.offsets_[self.heads :].sum(keepdims=True)

    def running(self) -> Running:
        return _Running(self._adjusts(), self.heads)

    def said(self) -> str:
        return self._said(f"softmax attention with {self.heads} head{'s' if self.heads > 1 else ''}")

    def _check(self) -> None:
        super()._check()
        if self.heads < 1:
            raise DataError(f"heads is {self.heads!r}; expected at least 1")


class _Running(Running):
    """A softmax whose largest logit may still rise: sums are scaled down when it does."""

    def __init__(self, drift: Any, heads: int) -> None:
        super().__init__(drift)
        self._heads = heads

    def add(self, readings: Tensor) -> Tensor:
        query, value = readings[:, : self._heads], readings[:, self._heads :]
        if self.count == 1:
            self._top, self._total, self._read = query, torch.ones_like(query), value
        else:
            top = torch.maximum(self._top, query)
            old, new = torch.exp(self._top - top), torch.exp(query - top)
            self._total = self._total * old + new
            self._read = self._read * old + new * value
            self._top = top
        return (self._read / self._total).sum(1) / self._heads**0.5
