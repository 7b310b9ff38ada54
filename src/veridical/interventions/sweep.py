"""A sweep of patches over one base: what each item changes, which rows it needs, and its metric.

An item whose new values are, to the last bit, those of the base has the base's metric without being run, and
one that turns the whole residual stream into the other run's has the other run's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.interventions.bands import bands
from veridical.interventions.metrics import Metric
from veridical.interventions.puts import INPUT, Put, Task, Variant, read
from veridical.interventions.suffix import Engine
from veridical.sites import HEAD_KINDS, Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

LOCAL = ("q", "pattern", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out")
"""Kinds whose effect stays at its position until their block ends."""
STREAM = ("resid_pre", "resid_post")
VARIANT_BYTES = 1 << 28
"""Most bytes of blocks' outcomes that are held at once for local patches."""
LOGIT_ELEMENTS = 1 << 26
"""Most logits of one forward."""


@dataclass(frozen=True)
class Item:
    """One patch of a sweep.

    Attributes:
        site: Where.
        head: One head; None for all of the site.
        spot: Number of its positions among the sweep's spots.
    """

    site: Site
    head: int | None
    spot: int


@dataclass(frozen=True)
class Link:
    """How the base's positions belong to the source's.

    Attributes:
        rows, base, source: `[m]`, example, column of the base, column of the source.
        same: Every real position belongs to the same column.
    """

    rows: Tensor
    base: Tensor
    source: Tensor
    same: bool


class Sweep:
    """Items over one group of examples.

    Args:
        model: The model that is patched.
        base: Engine over the base's run, with the items' sites read.
        source: Engine over the run whose values are put in.
        link: How their positions belong together.
        metric: For these examples.
        twin: Base and source are runs of one model, so that taking over all of its stream is taking over the
            run.
        batch_tokens: Tokens of one forward at most.
    """

    def __init__(
        self,
        model: HookedModel,
        base: Engine,
        source: Engine,
        link: Link,
        metric: Metric,
        *,
        twin: bool,
        batch_tokens: int,
    ) -> None:
        self.model, self.engine, self.source, self.link = model, base, source, link
        self.metric, self.twin, self.batch_tokens = metric, twin, batch_tokens
        self.count = len(model.architecture.blocks) if model.architecture.places else 0
        self.shape = base.base.mask.shape
        self.device = base.base.mask.device
        self.known: dict[Site, tuple[Tensor, Tensor]] = {}
        self.base_out, self.source_out = base.of_base(), source.of_base()
        self.base_values = metric(self.base_out)
        self.unreached: set[int] = set()
        self.ran: set[int] = set()

    def values(self, items: Sequence[Item], columns: Sequence[Tensor], progress: Any) -> Tensor:
        """The metric of every item, `[items, examples]`; NaN where an item has no position in an example.

        Args:
            items: What to patch.
            columns: For each spot `[batch, pos]` bool, columns of the base.
            progress: A bar, moved on by every item.
        """
        found = self.base_values.new_full((len(items), len(self.base_values)), torch.nan)
        waiting: list[tuple[int, Tensor]] = []
        for number, item in enumerate(items):
            run = self._settled(number, item, columns[item.spot], found[number])
            if run is None:
                progress.update(1)
            else:
                waiting.append((number, run))
                self.ran.add(number)
        for part in self._parts(items, waiting):
            outcomes = self._locals(items, part)
            tasks = [self._task(number, items[number], run, outcomes) for number, run in part]
            for start, chunk in self._chunks(tasks):
                self._judge(chunk, self.engine.run(chunk, start), found)
                progress.update(len(chunk))
        return found

    # What need not be run

    def _settled(self, number: int, item: Item, columns: Tensor, out: Tensor) -> Tensor | None:
        """Fills `out` where an item's metric is known; the `[batch, pos]` that has to be run, or None."""
        reach = torch.zeros_like(columns)
        reach[self.link.rows, self.link.base] = True
        chosen = columns & reach
        there = chosen.any(1)
        out[there] = self.base_values[there]
        _, differs = self._compared(item.site)
        if differs.dim() == 3:
            differs = differs.any(-1) if item.head is None else differs[..., item.head]
        changed = differs & chosen
        if not bool(changed.any()):
            return None
        free = self._without_effect(item, changed)
        if not bool((changed & ~free).any()):
            self.unreached.add(number)
        changed = changed & ~free
        if self.twin and self.link.same and item.site.kind in (*STREAM, "embed"):
            whole = changed.any(1) & ~(differs & ~changed).any(1)
            whole &= (self.engine.base.mask == self.source.base.mask).all(1)
            if bool(whole.any()):
                if self.metric.targets is None and self.metric.site is None and not bool(whole.all()):
                    return changed
                out[whole] = self.metric(self.source_out)[whole]
                changed = changed & ~whole[:, None]
        return changed if bool(changed.any()) else None

    def _compared(self, site: Site) -> tuple[Tensor, Tensor]:
        """The source's values in the base's columns, and where they differ, `[batch, pos(, head)]`."""
        if site in self.known:
            return self.known[site]
        ours, theirs = self.engine.base.values[site.name], self.source.base.values[site.name]
        link = self.link
        if link.same:
            moved = theirs.to(ours)
        else:
            moved = ours.clone()
            moved[link.rows, link.base] = theirs.to(ours)[link.rows, link.source]
        if site.kind == "pattern":
            differs = (moved != ours).any(-1).transpose(1, 2)
        elif site.kind in HEAD_KINDS:
            differs = (moved != ours).any(-1)
        else:
            differs = (moved != ours).flatten(2).any(-1)
        self.known[site] = moved, differs.to(self.device)
        return self.known[site]

    def _without_effect(self, item: Item, changed: Tensor) -> Tensor:
        """Which of its changes nothing that the metric reads comes after, `[batch, pos]` bool."""
        none = torch.zeros_like(changed)
        if self.metric.site is not None:
            (read,) = self.model.resolve(self.metric.site)
            after = self.model.resolve([read, item.site])
            return ~none if item.site != read and after[-1] == item.site else none
        keep = self.metric.keep
        behind = self.count > 0 and self._entry(item.site) >= self.count
        if not behind or keep is None or self.base_out.dim() == 2:
            return none
        none[:, : self.shape[1] - keep] = True
        return none

    # What is run

    def _entry(self, site: Site) -> int:
        if site.kind == "ln_final":
            return self.count
        if site.kind == "embed" or not self.count or site.layer is None:
            return self._raw_entry(site)
        if self._is_local(site) or (site.kind == "resid_post" and not self._in_place(site)):
            return site.layer + 1
        return site.layer

    def _raw_entry(self, site: Site) -> int:
        if site.is_raw and self.count:
            module = self.model.place(site).module
            for layer, block in enumerate(self.model.architecture.blocks):
                inside = any(module is part for part in block.modules())
                if inside and not (module is block and site.name.endswith(":out")):
                    return layer
        return INPUT

    def _in_place(self, site: Site) -> bool:
        """Whether the metric reads within this site's block, so that its patch must be made where it is."""
        if self.metric.site is None:
            return False
        (read,) = self.model.resolve(self.metric.site)
        return read.layer is not None and read.layer == site.layer and site.kind != "resid_pre"

    def _is_local(self, site: Site) -> bool:
        return site.kind in LOCAL and self.count > 0 and not self._in_place(site)

    def _parts(
        self, items: Sequence[Item], waiting: Sequence[tuple[int, Tensor]]
    ) -> Iterator[list[tuple[int, Tensor]]]:
        """What is waiting, in parts whose local outcomes fit into memory."""
        by_variant: dict[Any, list[tuple[int, Tensor]]] = {}
        part: list[tuple[int, Tensor]] = []
        for number, run in waiting:
            item = items[number]
            if self._is_local(item.site):
                by_variant.setdefault((item.site, item.head), []).append((number, run))
            else:
                part.append((number, run))
        rows, width = self.shape
        each = max(1, rows * width * self.model.d_model * self.base_values.element_size())
        most, held = max(1, VARIANT_BYTES // each), 0
        ordered = sorted(by_variant.items(), key=lambda pair: pair[0][0].layer or 0)
        for _, found in ordered:
            if held == most:
                yield part
                part, held = [], 0
            part += found
            held += 1
        if part:
            yield part

    def _locals(self, items: Sequence[Item], part: Iterable[tuple[int, Tensor]]) -> dict[Any, Tensor]:
        """What each site and head of the local items makes its block hand on."""
        wanted: dict[Any, Tensor] = {}
        for number, run in part:
            item = items[number]
            if self._is_local(item.site):
                key = item.site, item.head
                wanted[key] = wanted[key] | run if key in wanted else run
        rows, width = self.shape
        most = 1 if self.engine.plain else max(1, self.batch_tokens // (rows * width))
        layers: dict[int, list[Any]] = {}
        for key in wanted:
            layers.setdefault(key[0].layer, []).append(key)
        found = {}
        while any(layers.values()):
            keys = [key for waiting in layers.values() for key in waiting[:most]]
            layers = {layer: waiting[most:] for layer, waiting in layers.items()}
            for turn in ([key] for key in keys) if self.engine.plain else [keys]:
                variants = [Variant(k[0], k[1], wanted[k], self._compared(k[0])[0]) for k in turn]
                found |= dict(zip(turn, self.engine.local(variants)))
        return found

    def _task(self, number: int, item: Item, run: Tensor, outcomes: Mapping[Any, Tensor]) -> Task:
        examples, columns = run.nonzero(as_tuple=True)
        first = int(columns.min())
        if self.engine.plain:
            chosen = torch.arange(self.shape[0], device=self.device)
        else:
            chosen = examples.unique()
        rows = torch.searchsorted(chosen, examples)
        entry = self._entry(item.site)
        if self._is_local(item.site):
            values = outcomes[item.site, item.head][examples, columns]
            put = Put(None, rows, columns, values)
        else:
            values = read(self._compared(item.site)[0], item.site, examples, columns, item.head)
            direct = item.site.kind in STREAM and not self._in_place(item.site)
            put = Put(None if direct else item.site, rows, columns, values, item.head)
        return Task(number, entry, first, chosen, (put,))

    def _chunks(self, tasks: list[Task]) -> Iterator[tuple[int, list[Task]]]:
        """Tasks that run together, and the first column that they run."""
        width, vocabulary = self.shape[1], max(1, self.base_out.shape[-1])
        for start, band in self._bands(tasks):
            band.sort(key=lambda task: task.entry)
            kept = width - start if self.metric.keep is None else self.metric.keep
            most = min(self.batch_tokens // (width - start), LOGIT_ELEMENTS // (kept * vocabulary))
            chunk: list[Task] = []
            held = 0
            for task in band:
                if chunk and (self.engine.plain or held + len(task.examples) > most):
                    yield start, chunk
                    chunk, held = [], 0
                chunk.append(task)
                held += len(task.examples)
            if chunk:
                yield start, chunk

    def _bands(self, tasks: list[Task]) -> list[tuple[int, list[Task]]]:
        if not self.engine.reuses_prefix or not tasks:
            return [(0, tasks)] if tasks else []
        work: dict[int, float] = {}
        for task in tasks:
            # A row costs something also where no block is left for it.
            blocks = self.count - max(0, task.entry) + 0.25
            work[task.first] = work.get(task.first, 0.0) + blocks * len(task.examples)
        firsts = sorted(work)
        parameters = sum(p.numel() for p in self.model.architecture.blocks[0].parameters())
        starts = bands(
            firsts, [work[c] for c in firsts], self.shape[1], self.count, parameters, self.device.type
        )
        limits = [*starts[1:], self.shape[1]]
        return [
            (start, [task for task in tasks if start <= task.first < limit])
            for start, limit in zip(starts, limits)
        ]

    # The metric

    def _judge(self, chunk: Sequence[Task], outcome: Tensor, found: Tensor) -> None:
        sizes = [len(task.examples) for task in chunk]
        total = self.shape[0]
        if self.metric.targets is not None or self.metric.site is not None:
            examples = torch.cat([task.examples for task in chunk])
            values = self.metric.take(examples, total)(outcome)
            for task, part in zip(chunk, values.split(sizes)):
                self._fill(found, task, part)
            return
        for task, part in zip(chunk, outcome.split(sizes)):
            whole = part
            if len(part) != total:
                whole = self.base_out.clone()
                whole[task.examples] = part.to(whole)
            self._fill(found, task, self.metric(whole)[task.examples])

    def _fill(self, found: Tensor, task: Task, values: Tensor) -> None:
        # A row that ran along without a change keeps the base's metric, and one without a position its NaN.
        changed = torch.zeros(self.shape[0], dtype=torch.bool, device=found.device)
        changed[task.examples[task.puts[0].rows]] = True
        keep = changed[task.examples]
        found[task.key, task.examples[keep]] = values[keep].to(found)
