"""Where vectors are read from: tensors in memory, or shards of a store, checked when first touched."""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from veridical.activations.moments import Moments
from veridical.activations.store import Entry, Manifest, check_file
from veridical.activations.writer import DTYPES, INDEX, Layout, as_view, chunk_digests
from veridical.errors import DamagedFileError

OPEN_FILES = 64
REPAIR = "Delete the file and run the same collection again: only this shard is made again"


class Source(Protocol):
    """Vectors of several sites, aligned, in data order, in one or more parts (shards)."""

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    bounds: list[tuple[int, int]]  # first and last vector (in the source's own count) of each part

    def part(self, site: str, number: int) -> Tensor:
        """The vectors of one part, `[n, ...]`, without copying."""
        ...

    def expect(self, site: str, number: int, start: int, count: int) -> None:
        """Says that vectors of a part will be read soon."""
        ...

    def read(self, site: str, number: int, start: int, view: memoryview) -> None:
        """Fills the bytes of `view` with vectors of a part, from its vector `start` on."""
        ...

    def index(self) -> dict[str, np.ndarray]:
        """Row, position and token id of every vector."""
        ...


class MemorySource:
    """Vectors that were never written."""

    def __init__(self, tensors: dict[str, Tensor], index: dict[str, np.ndarray]):
        self.shapes = {site: tuple(tensor.shape[1:]) for site, tensor in tensors.items()}
        self.dtype = next(iter(tensors.values())).dtype
        self.bounds = [(0, len(index["row"]))]
        self._tensors, self._index = tensors, index

    def part(self, site: str, number: int) -> Tensor:
        return self._tensors[site]

    def expect(self, site: str, number: int, start: int, count: int) -> None:
        pass

    def read(self, site: str, number: int, start: int, view: memoryview) -> None:
        tensor = self._tensors[site]
        width = tensor[0].numel() * tensor.dtype.itemsize
        view[:] = as_view(tensor)[start * width : start * width + len(view)]

    def index(self) -> dict[str, np.ndarray]:
        return self._index


@dataclass(frozen=True)
class _Block:
    """The vectors of a site in a shard: where they begin, bytes of one, vectors in a chunk, the chunks'
    checksums, and which of them were compared."""

    offset: int
    width: int
    chunk: int
    digests: np.ndarray
    checked: np.ndarray


class FolderSource:
    """The complete shards of a store; a partial store has fewer than were planned.

    A chunk of vectors is compared with its checksum when it is first read.
    """

    def __init__(self, folder: Path, manifest: Manifest, entries: tuple[Entry, ...]):
        self.folder, self.manifest, self.entries = folder, manifest, entries
        self.shapes = manifest.request.sites
        self.dtype = DTYPES[manifest.request.dtype]
        ends = np.cumsum([0, *(entry.shard.vectors for entry in entries)]).tolist()
        self.bounds = list(itertools.pairwise(ends))
        self._files = _OpenFiles([folder / entry.file for entry in entries])
        self._layouts: dict[int, Layout] = {}
        self._mapped: dict[int, Tensor] = {}
        self._blocks: dict[tuple[str, int], _Block] = {}
        self._index: dict[str, np.ndarray] | None = None
        for entry in entries:
            check_file(folder / entry.file, entry.bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process gets the folder and opens it anew: no vectors, no open files."""
        return FolderSource, (self.folder.absolute(), self.manifest, self.entries)

    def part(self, site: str, number: int) -> Tensor:
        self.check(site, number)
        entry = self.entries[number]
        if number not in self._mapped:
            # Private: writing to the tensor changes memory, never the file.
            path = str(self._path(number))
            self._mapped[number] = torch.from_file(path, shared=False, size=entry.bytes, dtype=torch.uint8)
        start, size = self.layout(number).offsets[site]
        flat = self._mapped[number][start : start + size].view(self.dtype)
        return flat.view(entry.shard.vectors, *self.shapes[site])

    def expect(self, site: str, number: int, start: int, count: int) -> None:
        # Many reads under way at once are what makes a disk quick.
        if hasattr(os, "posix_fadvise"):
            block = self._blocks.get((site, number)) or self._block(site, number)
            offset = block.offset + start * block.width
            os.posix_fadvise(self._files.get(number), offset, count * block.width, os.POSIX_FADV_WILLNEED)

    def read(self, site: str, number: int, start: int, view: memoryview) -> None:
        # Called for every block of a shuffled reader, which is small: what is done here decides its speed.
        block = self._blocks.get((site, number)) or self._block(site, number)
        first, last = start // block.chunk, (start + len(view) // block.width - 1) // block.chunk + 1
        if not block.checked[first:last].all():
            self._check(site, number, first, last)
        offset = block.offset + start * block.width
        while view:
            done = os.preadv(self._files.get(number), [view], offset)
            if done == 0:
                raise DamagedFileError(f"{self._path(number)} ends too early. {REPAIR}")
            view, offset = view[done:], offset + done

    def index(self) -> dict[str, np.ndarray]:
        if self._index is None:
            entries = enumerate(self.entries)
            parts = [shard_index(self.folder, entry, self.layout(number)) for number, entry in entries]
            empty = np.empty(0, dtype=np.int32)
            self._index = {name: np.concatenate([empty, *(part[name] for part in parts)]) for name in INDEX}
        return self._index

    def check(self, site: str, number: int) -> None:
        """Compares all vectors of a site in a shard with their checksums, those that were not before.

        Raises:
            DamagedFileError: Names the file and the site.
        """
        self._check(site, number, 0, len(self.layout(number).chunks(site)))

    def check_all(self) -> None:
        """Compares everything with its checksums, also what was read before."""
        self._blocks.clear()
        for number, entry in enumerate(self.entries):
            check_file(self._path(number), entry.bytes)
            for site in self.shapes:
                self.check(site, number)

    def layout(self, number: int) -> Layout:
        if number not in self._layouts:
            self._layouts[number] = self.manifest.layout(self.entries[number].shard)
        return self._layouts[number]

    def _check(self, site: str, number: int, first: int, last: int) -> None:
        block = self._blocks.get((site, number)) or self._block(site, number)
        if block.checked[first:last].all():
            return
        found = chunk_digests(self._files.get(number), self.layout(number), site, first, last)
        if not np.array_equal(found, block.digests[first:last]):
            raise DamagedFileError(
                f"{self._path(number)} is damaged: vectors of {site} are not what was written. {REPAIR}"
            )
        block.checked[first:last] = True

    def _block(self, site: str, number: int) -> _Block:
        layout = self.layout(number)
        head = _head(self.folder, self.entries[number], layout)
        for name in self.shapes:
            shape = (len(layout.chunks(name)),)
            digests = _array(head, layout, f"checksums:{name}", np.int64, shape)
            offset, width = layout.offsets[name][0], layout.vector_bytes(name)
            made = _Block(offset, width, layout.chunk(name), digests, np.zeros(shape, dtype=bool))
            self._blocks.setdefault((name, number), made)
        return self._blocks[site, number]

    def _path(self, number: int) -> Path:
        return self.folder / self.entries[number].file


def shard_index(folder: Path, entry: Entry, layout: Layout) -> dict[str, np.ndarray]:
    """Row, position and token id of a shard's vectors, checked."""
    head = _head(folder, entry, layout)
    return {name: _array(head, layout, name, np.int32, (layout.vectors,)) for name in INDEX}


def shard_moments(folder: Path, entry: Entry, layout: Layout) -> dict[str, Moments]:
    """Moments of a shard's vectors, checked."""
    head = _head(folder, entry, layout)
    return {
        site: Moments(
            layout.vectors,
            torch.from_numpy(_array(head, layout, f"mean:{site}", np.float64, shape)),
            torch.from_numpy(_array(head, layout, f"m2:{site}", np.float64, shape)),
        )
        for site, shape in layout.shapes.items()
    }


def chunks(source: Source, site: str, size: int) -> Iterator[Tensor]:
    """All vectors of a site in order, at most `size` at a time, each chunk its own memory."""
    for number, (first, last) in enumerate(source.bounds):
        for start in range(0, last - first, size):
            out = torch.empty(min(size, last - first - start), *source.shapes[site], dtype=source.dtype)
            source.read(site, number, start, as_view(out))
            yield out


class _OpenFiles:
    """File handles for reading, the most recently used kept open."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()  # a reader's thread and the user's may ask at once

    def get(self, number: int) -> int:
        with self._lock:
            handle = self._handles.get(number)
            if handle is not None:
                self._handles.move_to_end(number)
                return handle
            path = self._paths[number]
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                message = f"{path} is missing; run the same collection again to make it"
                raise DamagedFileError(message) from error
            self._handles[number] = handle
            # The other thread's handle was used just now, so it is not the one that is closed.
            if len(self._handles) > OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
            return handle

    def __del__(self) -> None:
        if os is not None and os.close is not None:  # gone while the interpreter ends
            for handle in self._handles.values():
                os.close(handle)


def _head(folder: Path, entry: Entry, layout: Layout) -> bytes:
    path = folder / entry.file
    check_file(path, entry.bytes)
    with path.open("rb") as file:
        head = file.read(layout.head)
    if xxhash.xxh3_128_hexdigest(head) != entry.checksum:
        raise DamagedFileError(f"{path} is damaged: its index is not the one that was written. {REPAIR}")
    return head


def _array(head: bytes, layout: Layout, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    start, size = layout.offsets[name]
    return np.frombuffer(head[start : start + size], dtype=dtype).reshape(shape).copy()
