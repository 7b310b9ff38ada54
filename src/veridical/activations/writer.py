"""Writing vectors while the model runs: a back-pressured thread, and shard files of known layout."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from veridical.activations.moments import Moments
from veridical.files import explaining_disk, sync_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64",
}  # fmt: skip
CHUNK_BYTES = (
    128 << 10
)  # vectors are checked in chunks of this size, so that a shuffled reader checks what it reads
INDEX = ("row", "position", "token_id")
FLUSH_BYTES = 16 << 20  # the disk begins with what was written while the model still runs


class Backlog:
    """A thread that runs jobs in order, and makes whoever adds them wait while too many bytes are in flight.

    The first error of a job stops the thread and is raised by the next `put`, or by `drain`.
    """

    def __init__(self, limit: int, name: str):
        self._limit = limit
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._bytes = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None], size: int = 0) -> None:
        """Adds a job that holds `size` bytes until it is done; waits while the limit is passed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or not self._bytes or self._bytes + size <= self._limit
            )
            self._raise()
            self._jobs.append((job, size))
            self._bytes += size
            self._changed.notify_all()

    def drain(self) -> None:
        """Waits until every job is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or (not self._jobs and not self._bytes))
            self._raise()

    def close(self) -> None:
        """Ends the thread after the job in hand; jobs that wait are dropped (`drain` first to keep them)."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job, size = self._jobs[0]
            try:
                job()
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._jobs.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                if self._jobs:  # empty if closed meanwhile
                    self._jobs.popleft()
                self._bytes -= size
                if not self._jobs:
                    self._bytes = 0
                self._changed.notify_all()


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a shard file (safetensors): moments, checksums, index, then a block per site.

    The order keeps float64 aligned, and puts all that is needed to list, merge and check shards before the
    vectors. The manifest holds a checksum of this head; the head holds one for every chunk of vectors.
    """

    vectors: int
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    header: bytes = field(init=False)
    offsets: dict[str, tuple[int, int]] = field(init=False)  # name -> first byte in the file, size in bytes

    def __post_init__(self) -> None:
        described: dict[str, Any] = {"__metadata__": {"format": "veridical-activations"}}
        spans, at = {}, 0
        for name, dtype, shape in self._tensors():
            size = int(np.prod(shape, dtype=np.int64)) * _item_bytes(dtype)
            described[name] = {
                "dtype": SAFETENSORS[dtype],
                "shape": list(shape),
                "data_offsets": [at, at + size],
            }
            spans[name] = (at, size)
            at += size
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        object.__setattr__(self, "header", header)
        object.__setattr__(
            self, "offsets", {name: (len(header) + a, size) for name, (a, size) in spans.items()}
        )

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return max(start + size for start, size in self.offsets.values())

    @property
    def head(self) -> int:
        """Bytes before the vectors: header, moments, checksums and index."""
        return self.offsets[next(iter(self.shapes))][0]

    def chunks(self, site: str) -> range:
        """First vector of every chunk of a site."""
        return range(0, self.vectors, self.chunk(site))

    def chunk(self, site: str) -> int:
        """Vectors of a site in one chunk."""
        return max(1, CHUNK_BYTES // self.vector_bytes(site))

    def vector_bytes(self, site: str) -> int:
        return int(np.prod(self.shapes[site], dtype=np.int64)) * _item_bytes(self.dtype)

    def _tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        listed: list[tuple[str, str, tuple[int, ...]]] = []
        for site, shape in self.shapes.items():
            listed += [(f"mean:{site}", "float64", shape), (f"m2:{site}", "float64", shape)]
        listed += [(f"checksums:{s}", "int64", (-(-self.vectors // self.chunk(s)),)) for s in self.shapes]
        listed += [(name, "int32", (self.vectors,)) for name in INDEX]
        return listed + [(site, self.dtype, (self.vectors, *shape)) for site, shape in self.shapes.items()]


@dataclass(frozen=True)
class Run:
    """Consecutive vectors of one row: where they are in a batch, how many, and where they go in the shard."""

    source: int
    count: int
    target: int


class ShardFile:
    """One shard while it is written: a file of its final size under a temporary name, filled in any order."""

    def __init__(self, path: Path, layout: Layout, index: dict[str, np.ndarray]):
        self.path, self.layout = path, layout
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="veridical-flush")
        self._flushes: list[Future[None]] = []
        self._unflushed = 0
        with explaining_disk(path):
            self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _reserve(self._file, layout.size)
                self._write(layout.header, 0)
                for name in INDEX:
                    self._write(np.ascontiguousarray(index[name], dtype=np.int32), layout.offsets[name][0])
            except BaseException:
                self.abandon()
                raise

    def write(self, site: str, vectors: Tensor, runs: Sequence[Run]) -> None:
        """Puts vectors (on the CPU, in the stored dtype) at their places."""
        content = as_view(vectors)
        start, size = self.layout.offsets[site][0], self.layout.vector_bytes(site)
        with explaining_disk(self.path):
            for run in joined(runs):
                part = content[run.source * size : (run.source + run.count) * size]
                self._write(part, start + run.target * size)
        self._unflushed += len(content)
        if self._unflushed >= FLUSH_BYTES and all(flush.done() for flush in self._flushes):
            self._flushes.append(self._flusher.submit(os.fsync, self._file))
            self._unflushed = 0

    def commit(self, moments: dict[str, Moments]) -> str:
        """Makes the shard durable under its own name.

        Returns:
            Checksum (xxh3-128) of the head of the file, which holds those of the vectors.
        """
        layout = self.layout
        with explaining_disk(self.path):
            for site, moment in moments.items():
                self._write(moment.mean.numpy(), layout.offsets[f"mean:{site}"][0])
                self._write(moment.m2.numpy(), layout.offsets[f"m2:{site}"][0])
                digests = chunk_digests(self._file, layout, site, 0, len(layout.chunks(site)))
                self._write(digests, layout.offsets[f"checksums:{site}"][0])
            self._flusher.shutdown()
            for flush in self._flushes:
                flush.result()  # an error of the disk is reported once, so it may have been reported there
            os.fsync(self._file)
            head = xxhash.xxh3_128_hexdigest(os.pread(self._file, layout.head, 0))
            os.close(self._file)
            self._file = -1
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        return head

    def abandon(self) -> None:
        """Gives the space back; a no-op once committed."""
        self._flusher.shutdown()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._temporary.unlink(missing_ok=True)

    def _write(self, content: Any, offset: int) -> None:
        left = memoryview(content).cast("B")
        while left:
            done = os.pwrite(self._file, left, offset)
            left, offset = left[done:], offset + done


def joined(runs: Sequence[Run]) -> list[Run]:
    """The runs with neighbours joined, so that fewer writes are made."""
    whole: list[Run] = []
    for run in runs:
        last = whole[-1] if whole else None
        if last and last.source + last.count == run.source and last.target + last.count == run.target:
            whole[-1] = Run(last.source, last.count + run.count, last.target)
        else:
            whole.append(run)
    return whole


def as_view(vectors: Tensor) -> memoryview:
    """The memory of a contiguous tensor as bytes, also for bfloat16, which numpy does not have."""
    return vectors.view(-1).view(torch.uint8).numpy().data


def chunk_digests(file: int, layout: Layout, site: str, first: int, last: int) -> np.ndarray:
    """xxh3-64 of chunks `first` to `last` of a site's vectors, int64, read from an open file.

    A chunk that the file does not hold in full gets the digest of what there is.
    """
    start, size = layout.offsets[site]
    step = layout.chunk(site) * layout.vector_bytes(site)
    buffer = memoryview(bytearray(step))
    digests = np.empty(last - first, dtype=np.uint64)
    for number in range(first, last):
        wanted = buffer[: min(step, size - number * step)]
        done = os.preadv(file, [wanted], start + number * step)
        digests[number - first] = xxhash.xxh3_64_intdigest(wanted[:done])
    return digests.view(np.int64)


def _reserve(file: int, size: int) -> None:
    """Claims the space now, so that a full disk is found before the model runs and not in the middle."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            import errno

            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(file, size)


def _item_bytes(dtype: str) -> int:
    return {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}[dtype]
