"""Rows that do not fit into memory: read anew, a chunk at a time, whenever a product asks for them.

All that the solvers need of a design are products with its rows, and the rotation into the eigenbasis can be
folded into the other factor: with rows `(x - mean) / scale` and basis `V`, `rows @ V @ w` is `rows @ (V w)`.
So nothing of size `[n, d]` is ever kept, and the iteration is that of rows in memory. Mean, variance and
Gram matrix come from one pass each, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from veridical.activations.moments import Moments
from veridical.errors import DataError
from veridical.probes.solver import Design, Pull, spread_of

CHUNK_BYTES = 8 << 20
"""Float64 values that are read at once: products are at full speed, and the copies of a chunk stay small."""
CUDA_CHUNK_BYTES = 512 << 20
"""The same on a GPU, where a kernel wants more work at a time."""
LEAST_ROWS = 16
"""Rows of a chunk, however small the memory."""
SQUARES = 6
"""Matrices `[d, d]` that are alive while a Gram matrix is decomposed."""
COLUMN_BYTES = 48
"""Bytes for each row and each column of scores while they are ranked."""


@dataclass(frozen=True, eq=False)
class StreamedRows:
    """Float64 rows `[n, d]`, `(x - shift) * factor`, that are never in memory together.

    Attributes:
        read: The raw rows of a slice, `[c, d]` float64 on `device`.
        shape: `n` and `d`.
        device: Where products are computed.
        memory: Bytes that may be used.
        size: Rows of a chunk.
        check: Told which rows are finite, `[n]` bool, once all were read; raises where one is not.
        shift: `[d]`, or None for 0.
        factor: `[d]`, or None for 1.
    """

    read: Callable[[slice], Tensor]
    shape: tuple[int, int]
    device: torch.device
    memory: int
    size: int
    check: Callable[[Tensor], None]
    shift: Tensor | None = None
    factor: Tensor | None = None

    @classmethod
    def of(
        cls,
        read: Callable[[slice], Tensor],
        shape: tuple[int, int],
        device: torch.device,
        memory: int,
        check: Callable[[Tensor], None],
    ) -> StreamedRows:
        """Rows whose chunks take an eighth of `memory` bytes at most, as the copies that are made of one."""
        room = min(CUDA_CHUNK_BYTES if device.type == "cuda" else CHUNK_BYTES, memory // 8)
        return cls(read, shape, device, memory, max(LEAST_ROWS, room // (8 * shape[1])), check)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Columns of scores `[n]` that may be in memory at once: a quarter of it."""
        return max(1, self.memory // 4 // (COLUMN_BYTES * max(1, len(self))))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and they: `[c, d]`."""
        for first in range(0, len(self), self.size):
            at = slice(first, min(first + self.size, len(self)))
            x = self.read(at)
            if self.shift is not None:
                x = x - self.shift
            yield at, x if self.factor is None else x * self.factor

    def scaled(self, shift: Tensor, factor: Tensor | None = None) -> StreamedRows:
        """The raw rows with another shift and factor."""
        return replace(self, shift=shift, factor=factor)

    def __sub__(self, shift: Tensor) -> StreamedRows:
        return self.scaled(shift)

    def __matmul__(self, other: Tensor) -> Tensor:
        """`[n, k]`; NaN or infinity in a row is refused."""
        out = other.new_empty(len(self), other.shape[1])
        finite = torch.ones(len(self), dtype=torch.bool)
        for at, x in self.chunks():
            finite[at] = torch.isfinite(x).all(1).cpu()
            out[at] = x @ other
        self.check(finite)
        return out

    @cached_property
    def moments(self) -> Moments:
        """Mean and variance of the raw rows; NaN or infinity is refused."""
        finite = torch.ones(len(self), dtype=torch.bool)
        whole = Moments.empty(self.shape[1:])
        for at, x in replace(self, shift=None, factor=None).chunks():
            finite[at] = torch.isfinite(x).all(1).cpu()
            whole = whole + Moments.of(x)
        self.check(finite)
        return whole


class StreamedDesign(Design):
    """A design whose rows are read anew for every product. See `Design`; it has no `rows`."""

    held = False

    def __init__(self, source: StreamedRows, basis: Tensor, mean: Tensor, scale: Tensor, second: Tensor):
        values = {"basis": basis, "mean": mean, "scale": scale, "second_moment": second, "source": source}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    source: StreamedRows
    """The standardised rows, `[n, d]`, before they are rotated."""

    @classmethod
    def of(cls, x: StreamedRows, standardise: bool = True) -> StreamedDesign:
        """Prepares `x`, `[n, d]`; the statistics are those of these rows alone.

        Raises:
            NonFiniteError: NaN or infinity.
            DataError: The Gram matrix alone does not fit into the memory allowed.
        """
        width = x.shape[1]
        if SQUARES * 8 * width**2 > x.memory:
            raise DataError(
                f"vectors of width {width:,} need {SQUARES * 8 * width**2 / 1e9:.3g} GB for a Gram matrix "
                f"and its eigenvectors; memory_gb = {x.memory / 1e9:.3g}: raise it"
            )
        mean = x.moments.mean
        spread, constant = spread_of(x.moments.var, mean, len(x))
        scale = spread if standardise else torch.ones_like(mean)
        standard = x.scaled(mean, torch.where(constant, 0.0, 1 / scale))
        values, basis = torch.linalg.eigh(_gram(standard, None, None)[0])
        second = torch.cat([values.clamp_min(0) / len(x), values.new_ones(1)])
        return cls(standard, basis, mean, scale, second)

    def __repr__(self) -> str:
        return f"StreamedDesign({len(self)} rows of width {len(self.mean)})"

    @property
    def rows(self) -> Tensor:  # type: ignore[override]
        raise DataError("this needs all rows of a site at once, which are read in chunks: raise memory_gb")

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def height(self) -> int:
        return self.source.size

    def __len__(self) -> int:
        return len(self.source)

    def readings(self, v: Tensor) -> Iterable[tuple[slice, Tensor]]:
        return _Readings(self.source, *self._folded(v))

    def through(self, v: Tensor, pull: Pull) -> Tensor:
        inner, offset = self._folded(v)
        pulled, ends = None, None
        for at, x in self.source.chunks():
            weights = pull(at, torch.addmm(offset, x, inner))
            if pulled is None or ends is None:
                pulled, ends = x.T @ weights, weights.sum(0)
            else:
                pulled.addmm_(x.T, weights)
                ends += weights.sum(0)
        if pulled is None or ends is None:
            raise DataError("there are no rows to fit")
        return torch.cat([self.basis.T @ pulled, ends[None]])

    def gram(self, weights: Tensor, about: Tensor | None = None) -> Tensor:
        shift = None if about is None else self.basis @ about[:-1]
        inner, edge, total = _gram(self.source, weights, shift)
        edge = self.basis.T @ edge
        return torch.cat(
            [
                torch.cat([self.basis.T @ inner @ self.basis, edge[:, None]], 1),
                torch.cat([edge, total[None]])[None],
            ]
        )

    @cached_property
    def squares(self) -> Tensor:
        # The basis is a rotation of the whole space, which changes no length.
        out = self.mean.new_empty(len(self))
        for at, x in self.source.chunks():
            out[at] = x.square().sum(1)
        return out

    def _folded(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """`[d, k]` and `[k]` that give with unrotated rows what `v` `[r + 1, k]` gives with rotated ones."""
        return self.basis @ v[:-1], v[-1]


@dataclass(frozen=True, eq=False)
class _Readings:
    """Products of rows, a chunk at a time; can be gone through more than once."""

    source: StreamedRows
    inner: Tensor
    offset: Tensor

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for at, x in self.source.chunks():
            yield at, torch.addmm(self.offset, x, self.inner)


def _gram(
    source: StreamedRows, weights: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`x' W x` `[d, d]`, `x' W 1` `[d]` and `1' W 1` of the rows less `shift`; weights of 0 cost nothing."""
    width, device = source.shape[1], source.device
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    edge, total = gram.new_zeros(width), gram.new_zeros(())
    for at, x in source.chunks():
        if weights is None:
            gram.addmm_(x.T, x)
            continue
        part = weights[at].to(torch.float64)
        changed = torch.nonzero(part)[:, 0]
        x, part = x[changed], part[changed]
        x = x if shift is None else x - shift
        weighted = part[:, None] * x
        gram.addmm_(x.T, weighted)
        edge += weighted.sum(0)
        total += part.sum()
    return gram, edge, total
