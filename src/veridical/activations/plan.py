"""What is run and what is read, decided before the first forward pass: rows, shards, batches, positions.

Everything here follows from the data and the options alone, never from speed, from the number of processes,
or from where a run was interrupted, so that any way of finishing a store gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from veridical.errors import DataError
from veridical.provenance import fingerprint

if TYPE_CHECKING:
    from veridical.activations.data import Corpus
    from veridical.activations.select import Selection
    from veridical.models import HookedModel
    from veridical.tokens import Encoded

MIN_BATCHES = 16  # batches in a shard, so that rows of like length can share one
MAX_BATCHES = 64  # and at most, so that an interrupted run repeats little


@dataclass(frozen=True)
class TokenTable:
    """Token ids and selected positions of all rows, as flat arrays (4 bytes a token, 4 a selected one).

    Attributes:
        ids: Token ids, int32, rows one after another; row r is `ids[starts[r]:starts[r + 1]]`.
        starts: int64, rows + 1.
        positions: Positions that are read, int32; row r's are
            `positions[position_starts[r]:position_starts[r + 1]]`.
        position_starts: int64, rows + 1.
        pooled: Whether the positions of a row are averaged into one vector.
    """

    ids: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    position_starts: np.ndarray
    pooled: bool

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.starts)

    @cached_property
    def vector_starts(self) -> np.ndarray:
        """First vector of each row, rows + 1."""
        return np.arange(self.rows + 1) if self.pooled else self.position_starts

    def row_ids(self, row: int) -> np.ndarray:
        return self.ids[self.starts[row] : self.starts[row + 1]]

    def row_positions(self, row: int) -> np.ndarray:
        return self.positions[self.position_starts[row] : self.position_starts[row + 1]]

    def encoded(self, row: int) -> Encoded:
        """The row as the model takes it."""
        from veridical.tokens import Encoded

        ids = tuple(self.row_ids(row).tolist())
        return Encoded(ids, "", None, 0, len(ids))

    def index(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Row, position and token id of every vector of rows `first` to `last`, int32; -1 where tokens are
        pooled."""
        counts = np.diff(self.vector_starts[first : last + 1])
        row = np.repeat(np.arange(first, last, dtype=np.int32), counts)
        if self.pooled:
            nothing = np.full(len(row), -1, dtype=np.int32)
            return {"row": row, "position": nothing, "token_id": nothing.copy()}
        position = self.positions[self.position_starts[first] : self.position_starts[last]]
        return {"row": row, "position": position, "token_id": self.ids[self.starts[row] + position]}

    def fingerprints(self) -> dict[str, str]:
        """Digests of the tokens that are run and of those that are read."""
        return {
            "ids": fingerprint([self.ids.tobytes(), self.starts.tobytes()]),
            "positions": fingerprint([self.positions.tobytes(), self.position_starts.tobytes()]),
        }


def tokenise(
    model: HookedModel, corpus: Corpus, chosen: Selection, *, on_long: str, max_length: int | None
) -> TokenTable:
    """Encodes all rows and decides which of their tokens are read."""
    ids, lengths, positions, counts = [], [], [], []
    for start, encodings in corpus.encoded(model, on_long=on_long, max_length=max_length):
        for number, encoded in enumerate(encodings, start):
            if not encoded.ids:
                raise DataError(f"row {number} has no tokens")
            picked = chosen.positions(encoded, corpus.row(number))
            lengths.append(len(encoded.ids))
            counts.append(len(picked))
            positions.append(picked)
        ids.append(np.concatenate([np.asarray(encoded.ids, dtype=np.int32) for encoded in encodings]))
    return TokenTable(
        np.concatenate(ids), _starts(lengths), np.concatenate(positions), _starts(counts), chosen.pooled
    )


@dataclass(frozen=True)
class Shard:
    """A run of rows that is written, checked and resumed as one."""

    number: int
    first_row: int
    last_row: int
    first_vector: int
    last_vector: int

    @property
    def vectors(self) -> int:
        return self.last_vector - self.first_vector


def shards(table: TokenTable, vector_bytes: int, shard_bytes: int, batch_tokens: int) -> list[Shard]:
    """Cuts the rows into shards of about `shard_bytes`, each holding 16 to 64 batches' tokens.

    A shard is larger than `shard_bytes` where that would leave it fewer than 16 batches, since batches are
    formed within a shard and rows of like length must be found there.
    """
    token_ends, vector_ends = table.starts[1:], table.vector_starts[1:]
    cut, first = [], 0
    while first < table.rows:
        tokens, vectors = table.starts[first], table.vector_starts[first]
        full = np.searchsorted(vector_ends, vectors + max(1, shard_bytes // vector_bytes), side="left")
        least = np.searchsorted(token_ends, tokens + MIN_BATCHES * batch_tokens, side="left")
        most = np.searchsorted(token_ends, tokens + MAX_BATCHES * batch_tokens, side="left")
        last = int(min(max(full, least), most, table.rows - 1)) + 1
        cut.append((first, last))
        first = last
    starts = table.vector_starts
    return [Shard(i, a, b, int(starts[a]), int(starts[b])) for i, (a, b) in enumerate(cut)]


def batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Groups rows of like length, longest first; a batch with its padding stays within `budget` tokens.

    Args:
        lengths: Tokens of each row.
        budget: Most tokens in a batch, padding included; a row longer than that is a batch by itself.

    Yields:
        Row numbers of one batch, ascending.
    """
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        last = first + max(1, budget // int(lengths[order[first]]))
        yield np.sort(order[first:last])
        first = last


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
