"""A shuffled stream of vectors in constant memory, for training on stores of any size.

A window is made of blocks of neighbouring vectors, taken in random order from everywhere in the store, and
its vectors are shuffled as they are read. Background threads fill the next windows meanwhile; a batch is a
part of a window, without a further copy. Each vector comes exactly once an epoch, and the order follows
from the seed and the epoch alone, so a reader resumes exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veridical.activations.recycle import Recycler
from veridical.activations.source import Source
from veridical.activations.writer import CHUNK_BYTES, as_view
from veridical.errors import InputError, StoreMismatchError

LEAST_BLOCKS = 16  # in a window, where vectors are large
WINDOWS = 3  # in memory at once: one is read from, two are filled
SCRATCH_BYTES = 512 << 10  # read at once before being shuffled into a window: fits a core's cache


@dataclass(frozen=True)
class Blocks:
    """Runs of neighbouring vectors: the part of the source, the first vector in it, the length, and the
    vector's number in the activations that are read."""

    part: np.ndarray
    start: np.ndarray
    count: np.ndarray
    number: np.ndarray

    def between(self, order: np.ndarray, low: int, high: int) -> Blocks:
        """Vectors `low` to `high` of the blocks in this order; blocks at the borders are cut."""
        ends = np.cumsum(self.count[order])
        first, last = (int(np.searchsorted(ends, place, side="right")) for place in (low, high - 1))
        chosen = order[first : last + 1]
        ends = ends[first : last + 1]
        begins = ends - self.count[chosen]
        cut = np.maximum(low - begins, 0)
        count = np.minimum(ends, high) - np.maximum(begins, low)
        return Blocks(self.part[chosen], self.start[chosen] + cut, count, self.number[chosen] + cut)

    def in_place(self) -> Blocks:
        """The same blocks in the order in which they lie on the disk."""
        order = np.lexsort((self.start, self.part))
        return Blocks(self.part[order], self.start[order], self.count[order], self.number[order])


class Reader:
    """Batches of vectors; made by `Activations.batches`.

    Iterating goes on from where the reader stands: after an epoch, or after `load_state_dict`, the next `for`
    loop yields what comes next. A reader of one site (given as a string) yields tensors `[size, d]`,
    otherwise dictionaries of site to tensor, aligned. The last batch of an epoch may be smaller unless
    `drop_last`.

    Attributes:
        vectors: Numbers of the vectors in the batch that was yielded last, as in `Activations.index`.
    """

    def __init__(
        self,
        source: Source,
        picked: np.ndarray | None,
        sites: list[str],
        size: int,
        *,
        single: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = 1,
        drop_last: bool = False,
        buffer_mb: int = 96,
        fingerprint: str = "",
    ):
        if size < 1 or buffer_mb < 1 or (epochs is not None and epochs < 1):
            raise InputError(f"size {size}, epochs {epochs}, buffer_mb {buffer_mb}: expected 1 or more")
        self._source, self._sites, self._single = source, sites, single
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._epochs, self._drop_last, self._fingerprint = epochs, drop_last, fingerprint
        bytes_per_vector = [int(np.prod(source.shapes[site])) * source.dtype.itemsize for site in sites]
        room = (buffer_mb << 20) // WINDOWS // sum(bytes_per_vector)
        self._window = max(room // size, 1) * size  # whole batches, so that none lies in two windows
        block = max(1, min(CHUNK_BYTES // max(bytes_per_vector), self._window // LEAST_BLOCKS))
        self._blocks = _blocks(source, picked, block)
        self._total = int(self._blocks.count.sum())
        self._epoch, self._emitted = 0, 0
        self._recycled = Recycler((WINDOWS + 1) * len(sites))
        self.vectors = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Batches in one epoch."""
        return self._total // self._size if self._drop_last else -(-self._total // self._size)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._epochs) if self._epochs is not None else itertools.count():
            yield from self._rest_of_epoch()
            self._epoch, self._emitted = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the reader stands, as plain JSON values: after the batch that was yielded last."""
        return {"epoch": self._epoch, "emitted": self._emitted, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where another reader of the same activations, seed and sites stood.

        Raises:
            StoreMismatchError: The state is of something else; names the difference.
        """
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise StoreMismatchError(
                    f"the reader's state has {name} {state.get(name)!r}; this reader has {own!r}"
                )
        self._epoch, self._emitted = int(state["epoch"]), int(state["emitted"])

    def __repr__(self) -> str:
        order = f"shuffled with seed {self._seed}" if self._shuffle else "in order"
        return (
            f"Reader({self._total:,} vectors of {len(self._sites)} sites in batches of {self._size:,}, "
            f"{order}, epoch {self._epoch}, {self._emitted:,} read)"
        )

    def _identity(self) -> dict[str, Any]:
        return {
            "activations": self._fingerprint,
            "sites": self._sites,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "window": self._window,
        }

    def _rest_of_epoch(self) -> Iterator[Any]:
        for window, numbers, at in self._windows():
            for first in range(at, len(numbers), self._size):
                picks = slice(first, first + self._size)
                self.vectors = numbers[picks]
                if self._drop_last and len(self.vectors) < self._size:
                    return
                self._emitted += len(self.vectors)
                batch = {site: values[picks] for site, values in window.items()}
                yield batch[self._sites[0]] if self._single else batch
                del batch

    def _windows(self) -> Iterator[tuple[dict[str, Tensor], np.ndarray, int]]:
        """Shuffled vectors by site, their numbers, and where among them to begin."""
        order = np.arange(len(self._blocks.count))
        if self._shuffle:
            np.random.default_rng([self._seed, self._epoch]).shuffle(order)
        first, skip = divmod(self._emitted, self._window)
        last = -(-self._total // self._window)
        with ThreadPoolExecutor(WINDOWS - 1, thread_name_prefix="veridical-reader") as loaders:
            filling: list[Future[tuple[dict[str, Tensor], np.ndarray]]] = []
            for number in range(first, last + WINDOWS - 1):
                if number < last:
                    low, high = number * self._window, min((number + 1) * self._window, self._total)
                    memory = {site: self._memory(site, high - low) for site in self._sites}
                    blocks = self._blocks.between(order, low, high).in_place()
                    filling.append(loaders.submit(self._fill, memory, blocks, number))
                    del memory
                if number >= first + WINDOWS - 1 or number >= last:
                    if not filling:
                        break
                    window, numbers = filling.pop(0).result()
                    yield window, numbers, skip
                    del window
                    skip = 0

    def _memory(self, site: str, count: int) -> Tensor:
        return self._recycled.empty((count, *self._source.shapes[site]), self._source.dtype)

    def _fill(
        self, memory: dict[str, Tensor], blocks: Blocks, number: int
    ) -> tuple[dict[str, Tensor], np.ndarray]:
        """Reads the blocks of a window, each vector to its shuffled place."""
        total = int(blocks.count.sum())
        places = np.arange(total)
        if self._shuffle:
            places = np.random.default_rng([self._seed, self._epoch, number]).permutation(total)
        for site, tensor in memory.items():
            self._scatter(site, tensor, blocks, places)
        numbers = np.empty(total, dtype=np.int64)
        ends = np.cumsum(blocks.count)
        numbers[places] = np.arange(total) + np.repeat(blocks.number - (ends - blocks.count), blocks.count)
        return memory, numbers

    def _scatter(self, site: str, tensor: Tensor, blocks: Blocks, places: np.ndarray) -> None:
        width = int(np.prod(tensor.shape[1:])) * tensor.dtype.itemsize
        room = max(SCRATCH_BYTES // width, int(blocks.count.max()))
        rows = _rows(tensor)
        scratch = torch.empty((room, *tensor.shape[1:]), dtype=tensor.dtype)
        view, content = as_view(scratch), _rows(scratch)
        done = held = 0
        wanted = list(zip(blocks.part.tolist(), blocks.start.tolist(), blocks.count.tolist()))
        for part, start, count in wanted:
            self._source.expect(site, part, start, count)
        for part, start, count in wanted:
            if held + count > room:
                rows[places[done : done + held]] = content[:held]
                done, held = done + held, 0
            self._source.read(site, part, start, view[held * width : (held + count) * width])
            held += count
        rows[places[done : done + held]] = content[:held]


def _rows(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as `[n, d]` integers of its item size, which numpy has for every dtype."""
    unsigned = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    return tensor.view(len(tensor), -1).view(unsigned).numpy()


def _blocks(source: Source, picked: np.ndarray | None, length: int) -> Blocks:
    """Cuts the vectors (all, or those picked) into neighbours of at most `length` within one part."""
    found: list[tuple[int, int, int, int]] = []
    done = 0
    for part, (first, last) in enumerate(source.bounds):
        if picked is None:
            runs = [(0, last - first)]
        else:
            inside = picked[np.searchsorted(picked, first) : np.searchsorted(picked, last)] - first
            pieces = np.split(inside, np.flatnonzero(np.diff(inside) != 1) + 1)
            runs = [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces if len(piece)]
        for begin, end in runs:
            for start in range(begin, end, length):
                count = min(length, end - start)
                found.append((part, start, count, done))
                done += count
    columns = np.array(found, dtype=np.int64).reshape(-1, 4).T
    return Blocks(*columns)
