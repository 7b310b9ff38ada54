"""One forward of a model in which the inputs of chosen receivers are changed, in several variants at once.

What a head makes of its changed input as query, key or value, or an MLP as its output, is found by running
its block once more from that input and stopping there; it is put into the run for that head alone, and the
run goes on. A receiver all of whose edges are patched takes the other run's value as it is. Blocks below the
first changed input only hand on what comes, and the first that is run gets the base run's stream.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.errors import ModelError
from veridical.hooks import Stop, attached, missed, overridden
from veridical.interventions.blockwise import handing_on
from veridical.interventions.contributions import sender_site, sender_sites
from veridical.interventions.graph import Node
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.interventions.rewire import Rewiring


@dataclass(frozen=True)
class Variant:
    """What is changed in one run.

    Attributes:
        edges: For each receiver the senders whose contribution comes from the other run.
        added: For each receiver `[batch, pos, d]`, something else to add to its input.
    """

    edges: Mapping[Node, frozenset[Node]] = field(default_factory=dict)
    added: Mapping[Node, Tensor] = field(default_factory=dict)

    @property
    def receivers(self) -> set[Node]:
        """Receivers whose input is changed."""
        return {node for node, senders in self.edges.items() if senders} | set(self.added)


def layer_of(receiver: Node, model: HookedModel) -> int:
    """The block of a receiver; the number of blocks for the logits."""
    return model.n_layers if receiver.layer is None else receiver.layer


@dataclass(eq=False)
class _Slot:
    """One changed input: of which variant, from which senders, and the receivers that share it."""

    variant: int
    senders: frozenset[Node]
    added: Tensor | None
    receivers: list[Node] = field(default_factory=list)


class Pass:
    """One forward of several variants of the base run, `[variants * batch, ...]`, variant after variant."""

    def __init__(self, rewiring: Rewiring, variants: Sequence[Variant], until: Site | None = None) -> None:
        self.of, self.variants = rewiring, variants
        self.model, self.count = rewiring.model, len(variants)
        self.end = until if until is not None else rewiring.metric_site
        self.judged = until is None
        self.slots = self._planned()
        self.start = min((layer for _, layer in self.slots), default=0)
        used = {node for slots in self.slots.values() for slot in slots for node in slot.senders}
        # Below the first changed block every variant is still the base run.
        self.live = {node for node in used if node.layer is not None and node.layer >= self.start}
        self.change = {node: rewiring.difference(node) for node in used - self.live}
        self.calls: dict[int, tuple[Any, Any]] = {}
        self.streams: dict[Site, Tensor] = {}
        self.found: dict[Site, list[tuple[_Slot, Node, Tensor]]] = defaultdict(list)
        self.result: Tensor | None = None
        self.written: set[tuple[int, Node]] = set()
        self.rerunning = False

    def run(self) -> Tensor:
        """The logits that the metric reads, or the value at the site where the pass ends."""
        reads, writes = self._taps()
        blocks = self.model.architecture.blocks
        inputs = {
            name: value.repeat(self.count, *[1] * (value.dim() - 1)) for name, value in self.of.inputs.items()
        }
        with contextlib.ExitStack() as stack:
            if skipped := self._skipped():
                forwards = {blocks[layer]: handing_on(self.of.outputs[layer]) for layer in range(skipped)}
                stack.enter_context(overridden(forwards))
                stream = self.of.base[self.of.streams[skipped]]
                writes[self.of.streams[skipped]] = lambda value: stream.repeat(self.count, 1, 1)
            for layer in {layer for _, layer in self.slots if layer < self.model.n_layers}:
                handle = blocks[layer].register_forward_pre_hook(self._noting(layer), with_kwargs=True)
                stack.callback(handle.remove)
            run = stack.enter_context(
                attached(
                    {site: (self.model.place(site), tap) for site, tap in reads.items()},
                    {site: (self.model.place(site), edit) for site, edit in writes.items()},
                )
            )
            with contextlib.suppress(Stop):
                run.output = self.model.call(self.of.trimmed(inputs))
        expected = {(i, node) for i, variant in enumerate(self.variants) for node in variant.receivers}
        if missing := sorted({node.name for _, node in expected - self.written}):
            raise ModelError(f"not reached in this forward pass, so not patched: {', '.join(missing)}")
        if self.end is None:
            return self.of.kept(run.logits)
        if self.result is None:
            raise ModelError(f"not reached in this forward pass: {self.end}")
        return self.result

    def _skipped(self) -> int:
        """How many blocks every variant shares with the base run: those hand on what comes, and the next one
        is given the base's stream."""
        raw = self.of.metric_site is not None and self.of.metric_site.is_raw
        return 0 if self.of.plain or raw else min(self.start, self.model.n_layers - 1)

    def _planned(self) -> dict[tuple[str, int], list[_Slot]]:
        """Changed inputs by place ("head", "mlp", "logits") and layer, equal ones of a variant as one."""
        made: dict[tuple[str, int], dict[Any, _Slot]] = defaultdict(dict)
        for i, variant in enumerate(self.variants):
            for node in variant.receivers:
                senders, added = variant.edges.get(node, frozenset()), variant.added.get(node)
                layer = layer_of(node, self.model)
                key = i, senders, None if added is None else id(added)
                made[node.kind, layer].setdefault(key, _Slot(i, senders, added)).receivers.append(node)
        return {place: list(slots.values()) for place, slots in made.items()}

    def _taps(self) -> tuple[dict[Site, Callable[[Tensor], None]], dict[Site, Callable[[Tensor], Tensor]]]:
        """What is read and edited at which site; all of it looks away while a block is run once more."""
        reads: dict[Site, list[Callable[[Tensor], None]]] = defaultdict(list)
        writes: dict[Site, Callable[[Tensor], Tensor]] = {}
        for site in sender_sites(self.live):
            reads[site].append(lambda value, site=site: self._note_sent(site, value))
        for (place, layer), slots in self.slots.items():
            if place == "head":
                reads[Site("resid_pre", layer)].append(
                    lambda value, layer=layer, slots=slots: self._read_by_heads(layer, slots, value)
                )
                for site in {Site(str(node.port), layer) for slot in slots for node in slot.receivers}:
                    writes[site] = lambda value, site=site: self._put(site, value)
            elif place == "mlp":
                entry = self.of.entry(layer)
                reads[entry].append(lambda value, entry=entry: self.streams.update({entry: value}))
                writes[Site("mlp_out", layer)] = lambda value, layer=layer, slots=slots: self._read_by_mlp(
                    layer, slots, value
                )
            else:
                writes[self.of.last] = lambda value, slots=slots: self._read_by_logits(slots, value)
        if self.end is not None:
            reads[self.end].append(self._stop)

        def reader(taps: list[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
            def read(value: Tensor) -> None:
                for tap in taps if not self.rerunning else ():
                    tap(value)

            return read

        def writer(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda value: value if self.rerunning else edit(value)

        return {s: reader(taps) for s, taps in reads.items()}, {s: writer(e) for s, e in writes.items()}

    # Along the forward pass

    def _noting(self, layer: int) -> Callable[..., None]:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            if not self.rerunning:
                self.calls[layer] = args, kwargs

        return note

    def _note_sent(self, site: Site, value: Tensor) -> None:
        for node in self.live:
            if sender_site(node) == site:
                self.change[node] = self.of.difference(node, self._apart(value))

    def _read_by_heads(self, layer: int, slots: Sequence[_Slot], stream: Tensor) -> None:
        """Queries, keys and values of the changed inputs of a layer, for `_put`."""
        rest = []
        for slot in slots:
            others = []
            for node in slot.receivers:
                if self._is_whole(slot, node):
                    site = Site(str(node.port), layer)
                    self.found[site].append((slot, node, self.of.other[site][..., node.head, :]))
                else:
                    others.append(node)
            if others:
                rest.append(_Slot(slot.variant, slot.senders, slot.added, others))
        # Sorted, so that those run together need few of the three.
        rest.sort(key=lambda slot: max(str(node.port) for node in slot.receivers), reverse=True)
        for slot, values in self._rerun(layer, Site("resid_pre", layer), rest, stream):
            for node in slot.receivers:
                site = Site(str(node.port), layer)
                self.found[site].append((slot, node, values[site][..., node.head, :]))

    def _put(self, site: Site, value: Tensor) -> Tensor:
        apart = self._apart(value)
        for slot, node, new in self.found.pop(site):
            self._set(slot, node, apart[slot.variant][..., node.head, :], new)
        return value

    def _read_by_mlp(self, layer: int, slots: Sequence[_Slot], value: Tensor) -> Tensor:
        site, entry, apart = Site("mlp_out", layer), self.of.entry(layer), self._apart(value)
        rest = [slot for slot in slots if not self._is_whole(slot, slot.receivers[0])]
        for slot in slots:
            if slot not in rest:
                self._set(slot, slot.receivers[0], apart[slot.variant], self.of.other[site])
        for slot, values in self._rerun(layer, entry, rest, self.streams[entry]):
            self._set(slot, slot.receivers[0], apart[slot.variant], values[site])
        return value

    def _read_by_logits(self, slots: Sequence[_Slot], value: Tensor) -> Tensor:
        apart = self._apart(value)
        for slot, change in zip(slots, self._changes(slots)):
            node, here = slot.receivers[0], apart[slot.variant]
            new = self.of.other[self.of.last] if self._is_whole(slot, node) else _added(here, change)
            self._set(slot, node, here, new)
        return value

    def _stop(self, value: Tensor) -> None:
        self.result = value[:, -1].flatten(1) if self.judged else value
        raise Stop

    # Parts

    def _apart(self, value: Tensor) -> Tensor:
        """`[variants * batch, ...]` as `[variants, batch, ...]`."""
        return value.unflatten(0, (self.count, self.of.rows))

    def _is_whole(self, slot: _Slot, node: Node) -> bool:
        """Whether every edge into `node` is patched, so that it reads what it reads in the other run."""
        return slot.added is None and len(slot.senders) == self.of.graph.before(node)

    def _set(self, slot: _Slot, node: Node, place: Tensor, new: Tensor) -> None:
        """Writes `new` into `place`; where the input was left alone, so is what came of it, bit for bit."""
        place.copy_(new if slot.added is not None else torch.where(self.of.at[..., None], new, place))
        self.written.add((slot.variant, node))

    def _changes(self, slots: Sequence[_Slot]) -> Tensor:
        """What is added to the stream for each slot, `[slots, batch, pos, d]`."""
        d = self.of.base[Site("resid_pre", 0)]
        total = torch.zeros(len(slots), *d.shape, dtype=exact(d[:0]).dtype, device=d.device)
        nodes = sorted({node for slot in slots for node in slot.senders}, key=self.of.graph.sender_number)
        shared = [node for node in nodes if len(self.change[node]) == 1]
        own = [node for node in nodes if len(self.change[node]) > 1]
        self._sum(total, range(len(slots)), slots, shared, 0)
        for variant in {slot.variant for slot in slots} if own else ():
            self._sum(total, [i for i, s in enumerate(slots) if s.variant == variant], slots, own, variant)
        for index, slot in enumerate(slots):
            if slot.added is not None:
                total[index] += slot.added
        return total

    def _sum(
        self,
        total: Tensor,
        chosen: Sequence[int],
        slots: Sequence[_Slot],
        nodes: Sequence[Node],
        variant: int,
    ) -> None:
        """Adds what `nodes` change in one variant to the `chosen` of `slots` that they send to."""
        if not nodes:
            return
        sends = [[float(node in slots[i].senders) for node in nodes] for i in chosen]
        changes = torch.stack([self.change[node][variant] for node in nodes])
        total[list(chosen)] += torch.tensordot(torch.tensor(sends).to(changes), changes, dims=1)

    def _rerun(
        self, layer: int, entry: Site, slots: Sequence[_Slot], stream: Tensor
    ) -> Iterator[tuple[_Slot, dict[Site, Tensor]]]:
        """Runs a block from each slot's changed input at `entry`, up to what its receivers make of it; yields
        the values by slot.

        As many slots run together as there are variants: their rows then fit the block's other inputs
        (masks, positions), which are the same for every variant.
        """
        apart, (args, kwargs) = self._apart(stream), self.calls[layer]
        for first in range(0, len(slots), self.count):
            part = slots[first : first + self.count]
            given = apart[[slot.variant for slot in part] + [0] * (self.count - len(part))]
            given[: len(part)] = _added(given[: len(part)], self._changes(part))
            given = given.flatten(0, 1)
            ports = {node.port for slot in part for node in slot.receivers}
            sites = [Site("mlp_out" if port == "in" else str(port), layer) for port in sorted(ports, key=str)]
            reads = {site: (self.model.place(site), None) for site in sites}
            writes = {entry: (self.model.place(entry), lambda _, given=given: given)}
            self.rerunning = True
            try:
                with attached(reads, writes, stop=True) as run, contextlib.suppress(Stop):
                    self.model.architecture.blocks[layer](*args, **kwargs)
            finally:
                self.rerunning = False
            missed(run, sites)
            values = {site: self._apart(run[site]) for site in sites}
            for index, slot in enumerate(part):
                yield slot, {site: value[index] for site, value in values.items()}


def exact(value: Tensor) -> Tensor:
    """In which differences are taken and summed: float32 at least."""
    return value if value.dtype == torch.float64 else value.float()


def _added(stream: Tensor, change: Tensor) -> Tensor:
    return (exact(stream) + change).to(stream.dtype)
