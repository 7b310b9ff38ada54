"""Tokens of many sequences in an order in which they can be pooled side by side without padding.

Sequences are sorted by length, the longest first, and tokens by position: all first tokens, then all second
tokens, and so on. The tokens at one position are then one block of memory and belong to the first so many
sequences, so that pooling is a loop over positions with whole blocks, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from veridical.probes.solver import Design


@dataclass(frozen=True)
class Layout:
    """Where the tokens of `n` sequences stand.

    Attributes:
        order: `[n]`, sequences by falling length.
        tokens: `[tokens]`, token (in data order) at each place.
        lengths: `[n]` int64, falling.
        counts: Sequences with a token at each position.
    """

    order: Tensor
    tokens: Tensor
    lengths: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Tensor) -> Layout:
        """The layout of sequences of these lengths `[n]`."""
        order = torch.argsort(lengths, descending=True, stable=True)
        falling = lengths[order]
        begins = (torch.cumsum(lengths, 0) - lengths)[order]
        counts = (len(lengths) - torch.cumsum(torch.bincount(lengths), 0))[:-1].tolist()
        tokens = torch.cat([begins[:count] + position for position, count in enumerate(counts)])
        return cls(order, tokens, falling, tuple(counts))

    def blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """Position, first place, place after the last, and number of sequences, position by position."""
        first = 0
        for position, count in enumerate(self.counts):
            yield position, first, first + count, count
            first += count

    def restore(self, values: Tensor) -> Tensor:
        """Values `[n, ...]` in this order as values in the order of the data."""
        out = torch.empty_like(values)
        out[self.order] = values
        return out


@dataclass(frozen=True)
class SequenceDesign(Design):
    """Standardised and rotated token rows in packed order; `layout` says whose they are."""

    layout: Layout

    @classmethod
    def packed(cls, vectors: Tensor, lengths: Tensor, standardise: bool) -> SequenceDesign:
        """Prepares the tokens of sequences; mean and variance are those of all their tokens."""
        layout = Layout.of(lengths)
        plain = Design.of(vectors[layout.tokens], standardise)
        return cls(**vars(plain), layout=layout)

    def place(self, vectors: Tensor, lengths: Tensor) -> SequenceDesign:
        """Tokens of other sequences in the same space."""
        layout = Layout.of(lengths)
        rotated = ((vectors[layout.tokens] - self.mean) / self.scale) @ self.basis
        rows = torch.cat([rotated, rotated.new_ones(len(rotated), 1)], 1)
        return SequenceDesign(rows, self.basis, self.mean, self.scale, self.second_moment, layout)

    def read(self, parameters: Tensor) -> Tensor:
        """Readings `[tokens, channels, k]` by parameters `[r + 1, channels, k]`."""
        out = self.rows @ parameters.reshape(len(parameters), -1)
        return out.reshape(len(out), *parameters.shape[1:])

    @cached_property
    def means(self) -> Design:
        """Mean row of each sequence in packed order, as rows of a design in the same basis."""
        sums = self.rows.new_zeros(self.layout.counts[0], self.rows.shape[1])
        for _, first, last, count in self.layout.blocks():
            sums[:count] += self.rows[first:last]
        rows = sums / self.layout.lengths[:, None]
        return Design(rows, self.basis, self.mean, self.scale, rows.square().mean(0))

    @cached_property
    def rough(self) -> SequenceDesign:
        """The same rows in float32."""
        return replace(self, rows=self.rows.to(torch.float32))

    @cached_property
    def within(self) -> Tensor:
        """Covariance of the rows around the mean of their sequence, `[r + 1, r + 1]`; 0 for single tokens."""
        gram = self.rows.T @ self.rows
        between = self.means.rows.T @ (self.layout.lengths[:, None] * self.means.rows)
        free = len(self.rows) - self.layout.counts[0]
        covariance = (gram - between) / max(free, 1)
        covariance[-1], covariance[:, -1] = 0, 0
        return covariance if free else torch.zeros_like(covariance)


def expected_maximum(lengths: Tensor) -> Tensor:
    """About the largest of so many standard normal draws (Blom 1958); 0 for one draw."""
    lengths = lengths.to(torch.float64)
    return torch.special.ndtri((lengths - 0.375) / (lengths + 0.25))


def expected_rolling_maximum(lengths: Tensor, window: int) -> Tensor:
    """Expected largest mean of `window` consecutive standard normal draws of so many, from 1,000 sequences.

    The draws are the same in every call.
    """
    whole = lengths.round().to(torch.int64)
    capacity = 1 << max(6, int(whole.max() - 1).bit_length())
    return _rolling_table(capacity, window).to(lengths.device)[whole - 1]


@lru_cache(maxsize=32)
def _rolling_table(capacity: int, window: int) -> Tensor:
    """The figure for each length up to `capacity`; a longer table begins with the shorter one."""
    if window >= capacity:
        return torch.zeros(capacity, dtype=torch.float64)
    sums = np.random.default_rng(0).standard_normal((capacity, 1000)).cumsum(0)
    windows = sums[window - 1 :].copy()
    windows[1:] -= sums[:-window]
    # The largest of the draws and of their negatives: the same expectation with less spread.
    largest = np.maximum.accumulate(windows) - np.minimum.accumulate(windows)
    return torch.from_numpy(np.concatenate([np.zeros(window - 1), largest.mean(1) / (2 * window)]))
