"""Paths through a model's graph, and the changes that they carry from node to node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from veridical.errors import InputError
from veridical.interventions.contributions import sender_site
from veridical.interventions.graph import Edge, Graph, Node
from veridical.interventions.rewire import Rewiring
from veridical.interventions.rewired_pass import Variant


@dataclass(frozen=True)
class Path:
    """A sender, then receivers in causal order, the last of which may be the logits."""

    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """Such as `embed->head.0.1:v->mlp.1:in->logits`."""
        return "->".join(node.name for node in self.nodes)

    @property
    def receiver(self) -> Node:
        """Where it ends."""
        return self.nodes[-1]

    @property
    def before(self) -> Path:
        """The path without its last node."""
        return Path(self.nodes[:-1])

    def __str__(self) -> str:
        return self.name

    @classmethod
    def of(cls, graph: Graph, given: Any) -> Path:
        """The path that a text with arrows, or a sequence of nodes and names, means.

        Raises:
            UnknownNameError: A node that the model does not have.
            InputError: Fewer than two nodes, or a link against the order of the model.
        """
        if isinstance(given, Path):
            given = given.nodes
        parts = given.split("->") if isinstance(given, str) else list(given)
        if len(parts) < 2:
            raise InputError(
                f"{given!r} is no path; expected at least two nodes, such as embed->head.0.1:v->logits"
            )
        names = [part.strip() if isinstance(part, str) else part for part in parts]
        nodes = [graph.sender(names[0]), *(graph.receiver(name) for name in names[1:])]
        for place, node in enumerate(nodes[1:], start=1):
            before = nodes[place - 1]
            if before.kind == "logits":
                raise InputError(f"{given!r}: nothing comes after the logits")
            for sender in [before] if place == 1 else senders_behind(graph, before):
                graph.edge(Edge(sender, node))
        return cls(tuple(nodes))


def senders_behind(graph: Graph, receiver: Node) -> list[Node]:
    """What writes when `receiver` reads: the MLP, the head, or all heads that share the key or value."""
    if receiver.kind == "mlp":
        return [Node("mlp", receiver.layer)]
    if graph.whole_attention:
        return [Node("attn", receiver.layer)]
    size = 1 if receiver.port == "q" else graph.n_heads // graph.n_kv_heads
    first = (receiver.head or 0) * size
    return [Node("head", receiver.layer, head) for head in range(first, first + size)]


Key = tuple[Node, frozenset[Path]]
"""A sender, and the paths that end in what it reads (one node alone: the other run's own contribution)."""


class Paths:
    """Sets of paths, and for each the run in which the set is patched at once."""

    def __init__(self, rewiring: Rewiring, items: Sequence[Sequence[Path]]) -> None:
        self.rewiring, self.graph, self.items = rewiring, rewiring.graph, items
        self.changes: dict[Key, Tensor] = {}

    def variants(self) -> list[Variant]:
        """One for each set."""
        wanted: dict[Key, None] = {}
        for item in self.items:
            self._collect(frozenset(item), wanted)
        # A sender's change needs only those of senders that write before it.
        by_place: dict[tuple[int, Any], list[Key]] = defaultdict(list)
        for key in wanted:
            by_place[self.graph.sender_number(key[0]), sender_site(key[0])].append(key)
        sites: dict[Any, list[Key]] = {}
        for (_, site), keys in sorted(by_place.items(), key=lambda item: item[0][0]):
            sites.setdefault(site, []).extend(keys)
        for keys in sites.values():
            self._solve(keys)
        return [self._variant(frozenset(item)) for item in self.items]

    def _collect(self, paths: frozenset[Path], wanted: dict[Key, None]) -> None:
        for _, key in self._parts(paths):
            if key not in wanted:
                wanted[key] = None
                self._collect(frozenset(path for path in key[1] if len(path.nodes) > 1), wanted)

    def _parts(self, paths: frozenset[Path]) -> Iterator[tuple[Node, Key]]:
        """Which senders' changes come into which receiver along the last links of `paths`."""
        into: dict[tuple[Node, Node], set[Path]] = defaultdict(set)
        for path in paths:
            behind = path.nodes[-2]
            senders = [behind] if len(path.nodes) == 2 else senders_behind(self.graph, behind)
            for sender in senders:
                into[path.receiver, sender].add(path.before)
        for (receiver, sender), befores in into.items():
            yield receiver, (sender, frozenset(befores))

    def _solve(self, keys: Sequence[Key]) -> None:
        """Fills in the changes of senders that are read at one site."""
        run = []
        for sender, befores in keys:
            if any(len(path.nodes) == 1 for path in befores):
                # The sender itself is patched: what else comes into it has no say.
                self.changes[sender, befores] = self.rewiring.difference(sender)[0]
            else:
                run.append((sender, befores))
        if run:
            variants = [self._variant(befores) for _, befores in run]
            found = self.rewiring.sent([sender for sender, _ in run], variants)
            self.changes.update(zip(run, found))

    def _variant(self, paths: frozenset[Path]) -> Variant:
        added: dict[Node, Tensor] = {}
        for receiver, key in self._parts(paths):
            change = self.changes[key]
            added[receiver] = added[receiver] + change if receiver in added else change
        return Variant(added=added)
