"""Mean and variance in one pass, in float64, however large the data.

Batches are merged by the pairwise formula of Chan, Golub and LeVeque (1979), which keeps the within-batch
part that an average of batch variances would lose.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20  # of float64 values at a time: stays in the cache of one core


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and variance of vectors of one shape.

    Attributes:
        count: Number of vectors.
        mean: Their mean, float64, shape `[d]` (or `[heads, d_head]`).
        m2: Sum of squared deviations from the mean, float64, same shape.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Population variance (divided by `count`), float64."""
        return self.m2 / max(self.count, 1)

    @property
    def std(self) -> Tensor:
        """Population standard deviation, float64."""
        return self.var.sqrt()

    @property
    def mean_square(self) -> float:
        """Mean squared norm of the vectors."""
        return float((self.var + self.mean.square()).sum())

    @classmethod
    def empty(cls, shape: Iterable[int]) -> Moments:
        """Moments of no vectors of this shape."""
        zero = torch.zeros(tuple(shape), dtype=torch.float64)
        return cls(0, zero, zero.clone())

    @classmethod
    def of(cls, vectors: Tensor) -> Moments:
        """Moments of `vectors` `[n, ...]` of any float type, computed on their device (on the CPU where
        that has no float64)."""
        if vectors.device.type == "mps":
            vectors = vectors.cpu()
        if len(vectors) == 0:
            return cls.empty(vectors.shape[1:])
        width = max(1, vectors[0].numel())
        rows = len(vectors) if vectors.is_cuda else max(16, CHUNK_BYTES // (8 * width))
        parts = (_of_chunk(part) for part in vectors.split(rows))
        return merge(parts)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of vectors together."""
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.mean.shape))
        return f"Moments({self.count:,} vectors of {shape}, mean square norm {self.mean_square:.4g})"


def merge(parts: Iterable[Moments]) -> Moments:
    """Moments of all parts together, merged in order, so that the same parts give the same bits."""
    whole: Moments | None = None
    for part in parts:
        whole = part if whole is None else whole + part
    if whole is None:
        raise ValueError("no moments to merge")
    return whole


def _of_chunk(vectors: Tensor) -> Moments:
    values = vectors.double()
    mean = values.mean(0)
    values = values.sub_(mean) if values is not vectors else values - mean
    return Moments(len(vectors), mean, values.square_().sum(0))
