"""Collecting activations: the model runs over the data, and what was asked for is kept.

The forward pass ends at the deepest site. Tokens are picked and converted on the model's device, before
anything is copied; a background thread moves them on to memory or to the store while the next layer runs,
and holds the model back when it cannot follow. Moments are taken on the device from the vectors as they are
stored.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.activations import store as stores
from veridical.activations.activations import Activations
from veridical.activations.data import Corpus, as_table, from_table, read_data, rows_fingerprint
from veridical.activations.distributed import World, world
from veridical.activations.moments import Moments, merge
from veridical.activations.plan import Shard, TokenTable, batches, shards, tokenise
from veridical.activations.select import Selection, Tokens, selection
from veridical.activations.source import MemorySource
from veridical.activations.writer import DTYPES, Backlog, Run, ShardFile
from veridical.config import CollectConfig, build
from veridical.errors import InputError, ModelError, NonFiniteError
from veridical.progress import bar

if TYPE_CHECKING:
    from veridical.models import HookedModel

IN_FLIGHT = 64 << 20  # bytes of vectors that wait to be written; at least one site of a batch always may


def collect(
    model: HookedModel | Any, data: Any, config: CollectConfig | None = None, **options: Any
) -> Activations:
    """Reads activations of `model` over `data`.

    Args:
        model: A `HookedModel`, or anything that `veridical.load` takes.
        data: `Pairs`, a list of texts or of chats, a `datasets.Dataset` (column `text`, `prompt` or
            `input_ids`), a token tensor `[rows, pos]`, or a mapping of `input_ids` and `attention_mask`.
        config: What to read; see `CollectConfig` for every option.
        **options: Fields of `CollectConfig`, which win over `config`. `tokens` may also be a function from an
            `Encoded` to the positions to read.

    Returns:
        The activations: in memory, or in the folder `store`. A store that is there already is continued, or
        opened if it is complete. Under torchrun all processes write one store, and each returns it.

    Raises:
        UnknownNameError: A site, option or token selection that does not exist; names the nearest.
        DataError: Data that are empty or do not fit the selection; names the row.
        NonFiniteError: NaN or infinity at a site; names row and token. Complete shards stay usable.
        StoreMismatchError: The folder holds a store of something else; names the difference.
        DiskFullError: No space is left. Complete shards stay usable.
    """
    model = _loaded(model)
    tokens: Tokens | None = options.pop("tokens", None)
    if tokens is not None and not callable(tokens):
        options["tokens"] = tokens
    config = build(CollectConfig, config, **options)
    chosen = selection(tokens if callable(tokens) else config.tokens)
    shapes = _shapes(model, config)
    corpus = read_data(data)
    table = tokenise(model, corpus, chosen, on_long=config.on_long, max_length=config.max_length)
    rows = from_table(as_table(corpus.rows))
    job = _Job(model, config, table, shapes, rows, _request(model, config, table, shapes, chosen, corpus))
    return job.in_memory() if config.store is None else job.in_store(Path(config.store), world())


class _Sink(Protocol):
    def write(self, site: str, vectors: Tensor, runs: list[Run]) -> None: ...


class _Job:
    """One collection: the model, the plan, and where vectors go."""

    def __init__(
        self,
        model: HookedModel,
        config: CollectConfig,
        table: TokenTable,
        shapes: dict[str, tuple[int, ...]],
        rows: pd.DataFrame,
        request: stores.Request,
    ):
        self.model, self.config, self.table, self.shapes = model, config, table, shapes
        self.rows, self.request = rows, request
        self.dtype = DTYPES[config.dtype]
        vector_bytes = sum(int(np.prod(shape)) * self.dtype.itemsize for shape in shapes.values())
        self.shards = shards(table, vector_bytes, config.shard_mb << 20, config.batch_tokens)

    def in_memory(self) -> Activations:
        total = int(self.table.vector_starts[-1])
        tensors = {site: torch.empty(total, *shape, dtype=self.dtype) for site, shape in self.shapes.items()}
        moments: list[dict[str, Moments]] = []
        with self._running(self.shards, shown=True) as (writing, progress):
            for shard in self.shards:
                first, last = shard.first_vector, shard.last_vector
                sink = _Memory({site: tensor[first:last] for site, tensor in tensors.items()})
                moments.append(self._run(shard, sink, writing, progress))
            writing.drain()
        merged = {site: merge(part[site] for part in moments) for site in self.shapes}
        source = MemorySource(tensors, self.table.index(0, self.table.rows))
        return Activations(source, self.rows, self._vocabulary(), merged, self.request)

    def in_store(self, folder: Path, world: World) -> Activations:
        with contextlib.ExitStack() as held:
            with _together(world):
                if world.leads:
                    held.enter_context(stores.alone(folder))
                    stores.prepare(folder, self.request, self.shards, self.rows, self._vocabulary())
            with _together(world):
                manifest = stores.Manifest.read(folder)
                todo = world.mine(stores.missing(folder, manifest)) if not manifest.complete else []
                self._fill(folder, manifest, todo, shown=world.leads)
            with _together(world):
                if world.leads and not manifest.complete:
                    stores.finalise(folder, manifest, self.config)
        return Activations.open(folder)

    def _fill(self, folder: Path, manifest: stores.Manifest, numbers: list[int], *, shown: bool) -> None:
        if not numbers:
            return
        # Durability takes the disk's time: a third thread waits for it while the next shard is filled. With
        # a limit of no bytes and jobs of one byte, at most one shard is in its hands and one waits.
        committing = Backlog(0, "veridical-commit")
        files: list[ShardFile] = []
        try:
            chosen = [self.shards[number] for number in numbers]
            running = self._running(chosen, shown=shown)
            with running as (writing, progress), _finishing(writing, committing):
                for shard in chosen:
                    file = stores.new_shard(folder, manifest, shard.number, self.table)
                    files.append(file)
                    moments = self._run(shard, file, writing, progress)
                    commit = functools.partial(_commit, folder, manifest, shard.number, file, moments)
                    writing.put(functools.partial(committing.put, commit, 1))
        finally:
            committing.close()
            for file in files:
                file.abandon()

    @contextlib.contextmanager
    def _running(self, chosen: list[Shard], *, shown: bool) -> Iterator[tuple[Backlog, Any]]:
        """The writer thread and the progress bar, with the model in evaluation mode and no gradients."""
        tokens = sum(int(self.table.starts[s.last_row] - self.table.starts[s.first_row]) for s in chosen)
        writing = Backlog(IN_FLIGHT, "veridical-writer")
        progress = bar(tokens, "collect", "tokens", self.config.progress if shown else False)
        try:
            # Not inference_mode: buffers that a model makes in a forward pass would be unusable for training.
            with torch.no_grad(), _evaluating(self.model.model):
                yield writing, progress
        finally:
            writing.close()
            progress.close()

    def _run(self, shard: Shard, sink: _Sink, writing: Backlog, progress: Any) -> dict[str, Moments]:
        """Runs the rows of a shard; returns its moments, complete once `writing` has done its jobs."""
        moments = {site: Moments.empty(shape) for site, shape in self.shapes.items()}
        table, first = self.table, shard.first_row
        lengths = table.lengths[first : shard.last_row]
        for numbers in batches(lengths, self.config.batch_tokens):
            rows = numbers + first
            inputs = self.model.batch([table.encoded(row) for row in rows], padding_side=self.config.padding)
            pick = _Pick(table, rows, inputs["input_ids"].shape[1], self.config.padding, shard.first_vector)
            deliver = functools.partial(self._deliver, pick, sink, writing, moments)
            reads: Any = {site: functools.partial(deliver, site) for site in self.shapes}
            self.model.run(inputs, read=reads, stop=True)
            progress.update(int(lengths[numbers].sum()))
        return moments

    def _deliver(
        self,
        pick: _Pick,
        sink: _Sink,
        writing: Backlog,
        moments: dict[str, Moments],
        site: str,
        value: Tensor,
    ) -> None:
        """Picks a site's vectors on the device, starts their copy, and leaves the rest to the writer."""
        vectors = pick(value.detach(), site, self.shapes[site]).to(self.dtype)
        found = Moments.of(vectors)
        host, ready = _to_host(vectors)
        mean, mean_ready = _to_host(found.mean)
        m2, m2_ready = _to_host(found.m2)

        def write() -> None:
            for event in (ready, mean_ready, m2_ready):
                if event is not None:
                    event.synchronize()
            if not (torch.isfinite(mean).all() and torch.isfinite(m2).all()):
                raise self._not_finite(site, host, pick)
            moments[site] = moments[site] + Moments(found.count, mean, m2)
            sink.write(site, host, pick.runs)

        writing.put(write, host.nbytes)

    def _not_finite(self, site: str, vectors: Tensor, pick: _Pick) -> NonFiniteError:
        bad = torch.nonzero(~torch.isfinite(vectors.flatten(1)).all(1)).flatten()
        row, place = pick.origin(int(bad[0]) if len(bad) else 0)
        values = vectors[int(bad[0])] if len(bad) else vectors[0]
        kind = "NaN" if torch.isnan(values).any() else "infinity"
        where = "of the mean over its tokens"
        if place >= 0:
            token = int(self.table.row_ids(row)[place])
            where = f"at position {place} (token {token}, {_words(self.model, [token])[0]!r})"
        advice = "The model itself gives it for this input"
        if kind == "infinity" and self.dtype == torch.float16:
            advice = "float16 ends at 65504: collect with dtype='bfloat16' or 'float32'"
        return NonFiniteError(f"{kind} at {site} in row {row} {where}. {advice}")

    def _vocabulary(self) -> dict[int, str]:
        """Text of the token ids that are read."""
        table = self.table
        if table.pooled:
            return {}
        used = [table.ids[a + table.row_positions(r)] for r, a in enumerate(table.starts[:-1])]
        ids = np.unique(np.concatenate(used)).tolist()
        return dict(zip(ids, _words(self.model, ids)))


class _Pick:
    """The vectors of a batch that are read, and where each goes."""

    def __init__(self, table: TokenTable, rows: np.ndarray, width: int, padding: str, first_vector: int):
        self._table, self._rows, self._width = table, rows, width
        lengths = table.lengths[rows]
        shift = width - lengths if padding == "left" else np.zeros_like(lengths)
        places = [i * width + shift[i] + table.row_positions(row) for i, row in enumerate(rows.tolist())]
        self._flat = torch.from_numpy(np.concatenate(places).astype(np.int64))
        self._counts = np.array([len(place) for place in places])
        counts = np.ones_like(self._counts) if table.pooled else self._counts
        sources = np.concatenate([[0], np.cumsum(counts)[:-1]])
        targets = table.vector_starts[rows] - first_vector
        self.runs = [Run(*run) for run in zip(sources.tolist(), counts.tolist(), targets.tolist())]
        self._on: dict[torch.device, Tensor] = {}

    def __call__(self, value: Tensor, site: str, shape: tuple[int, ...]) -> Tensor:
        """Vectors `[n, ...]` of the picked tokens, or of their mean per row, on the value's device."""
        if value.shape[2:] != shape or tuple(value.shape[:2]) != (len(self._rows), self._width):
            raise ModelError(
                f"{site} has shape {tuple(value.shape)}; expected one vector for each position, "
                f"{(len(self._rows), self._width, *shape)}"
            )
        if value.device not in self._on:
            self._on[value.device] = self._flat.to(value.device, non_blocking=True)
        vectors = value.reshape(-1, *shape).index_select(0, self._on[value.device])
        return self._pool(vectors) if self._table.pooled else vectors

    def origin(self, vector: int) -> tuple[int, int]:
        """Row and position of a vector of the batch; position -1 for a mean."""
        if self._table.pooled:
            return int(self._rows[vector]), -1
        ends = np.cumsum(self._counts)
        i = int(np.searchsorted(ends, vector, side="right"))
        row = int(self._rows[i])
        return row, int(self._table.row_positions(row)[vector - (ends[i] - self._counts[i])])

    def _pool(self, vectors: Tensor) -> Tensor:
        # Row by row in float32, so that neither padding nor the neighbours in the batch enter.
        parts = vectors.split(self._counts.tolist())
        return torch.stack([part.float().mean(0) for part in parts])


class _Memory:
    """Tensors in memory as a sink."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def write(self, site: str, vectors: Tensor, runs: list[Run]) -> None:
        target = torch.cat([torch.arange(run.target, run.target + run.count) for run in runs])
        self._tensors[site].index_copy_(0, target, vectors)


def _commit(
    folder: Path, manifest: stores.Manifest, number: int, file: ShardFile, moments: dict[str, Moments]
) -> None:
    stores.record(folder, manifest, number, file.commit(moments))


@contextlib.contextmanager
def _finishing(*backlogs: Backlog) -> Iterator[None]:
    """Waits for the backlogs at the end; after an error too, to keep the shards that were run in full."""
    try:
        yield
    except Exception:
        for backlog in backlogs:
            with contextlib.suppress(Exception):
                backlog.drain()
        raise
    for backlog in backlogs:
        backlog.drain()


@contextlib.contextmanager
def _together(world: World) -> Iterator[None]:
    """All processes leave this together, and all fail if one does."""
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failed = error
    world.agree(failed)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for a while; every module gets its own mode back."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The tensor on the CPU; from a GPU the copy runs beside the model until the event is reached."""
    if not tensor.is_cuda:
        return tensor.cpu(), None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return host, event


def _loaded(model: Any) -> HookedModel:
    from veridical.models import HookedModel, load

    return model if isinstance(model, HookedModel) or hasattr(model, "resolve") else load(model)


def _shapes(model: HookedModel, config: CollectConfig) -> dict[str, tuple[int, ...]]:
    """Trailing shape of every site that is read, in order of depth."""
    if model.kind == "vision":
        raise InputError(
            "collect reads texts and tokens; this is a vision transformer: use model.run on its images"
        )
    sites = config.sites
    asked = [name.strip() for name in sites.split(",")] if isinstance(sites, str) else list(sites)
    shapes = {}
    for site in model.resolve(asked):
        if site.kind == "pattern":
            raise InputError(f"{site.name} has a size that depends on the text; read it with model.run")
        shapes[site.name] = tuple(model.width(site))
    if not shapes:
        raise InputError("no sites to read")
    return shapes


def _request(
    model: HookedModel,
    config: CollectConfig,
    table: TokenTable,
    shapes: dict[str, tuple[int, ...]],
    chosen: Selection,
    corpus: Corpus,
) -> stores.Request:
    digests = table.fingerprints()
    return stores.Request(
        model={
            "path": str(model.path),
            "fingerprint": model.fingerprint(),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        data={
            "rows": table.rows,
            "tokens": len(table.ids),
            "ids": digests["ids"],
            "columns": rows_fingerprint(corpus.rows),
        },
        sites=shapes,
        tokens={
            "selection": chosen.name,
            "vectors": int(table.vector_starts[-1]),
            "positions": digests["positions"],
        },
        dtype=config.dtype,
        batches={
            "batch_tokens": config.batch_tokens,
            "shard_mb": config.shard_mb,
            "padding": config.padding,
        },
    )


def _words(model: HookedModel, ids: list[int]) -> list[str]:
    if model.tokenizer is None:
        return [str(i) for i in ids]
    return [model.tokenizer.decode([i]) for i in ids]
