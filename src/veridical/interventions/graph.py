"""The graph of a model: what writes into the residual stream, what reads it, and every edge between.

A *sender* adds to the stream: `embed` (all that enters the first block), `head.L.H` (a head's part of the
attention output), `mlp.L`. A *receiver* reads it: `head.L.H:q`, `head.L.G:k` and `head.L.G:v` (of key/value
head G, where queries share them), `mlp.L:in`, and `logits` (all that follows the last block). An edge runs
from a sender to every receiver that reads after it has written. Where attention and MLP of a block run in
parallel, its MLP does not see its heads. Where a norm stands behind the attention output (gemma, olmo2), a
head's part is not linear in its own values, and the sender is the whole layer, `attn.L`. What no sender
holds are the biases of the output projections: the same in every run.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from veridical.errors import InputError, unknown

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

_NAME = re.compile(r"(embed|logits)|(attn|mlp)\.(-?\d+)(?::(in))?|head\.(-?\d+)\.(\d+)(?::([qkv]))?")


@dataclass(frozen=True)
class Node:
    """A part of a model that writes into the residual stream or reads it.

    Attributes:
        kind: "embed", "head", "attn", "mlp" or "logits".
        layer: Its block; None for `embed` and `logits`.
        head: Its head; of a `k` or `v`, the key/value head. None for others.
        port: What of it reads: "q", "k", "v" of a head, "in" of an MLP; None for senders and `logits`.
    """

    kind: str
    layer: int | None = None
    head: int | None = None
    port: str | None = None

    @property
    def name(self) -> str:
        """Such as `embed`, `head.3.5`, `head.3.5:q`, `mlp.3`, `mlp.3:in`, `logits`."""
        parts = [self.kind, *(str(number) for number in (self.layer, self.head) if number is not None)]
        return ".".join(parts) + (f":{self.port}" if self.port else "")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Edge:
    """The way from one sender to one receiver through the residual stream."""

    sender: Node
    receiver: Node

    @property
    def name(self) -> str:
        """Such as `head.3.5->head.4.2:q`."""
        return f"{self.sender.name}->{self.receiver.name}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Graph:
    """Senders and receivers of a model.

    Attributes:
        path: The model that it describes.
        n_layers, n_heads, n_kv_heads: Its dimensions.
        parallel: For each block, whether its MLP reads what its attention reads.
        has_mlp: For each block, whether there is an MLP.
        whole_attention: Senders are whole attention layers.
    """

    path: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: tuple[bool, ...]
    has_mlp: tuple[bool, ...]
    whole_attention: bool = False

    @classmethod
    def of(cls, model: HookedModel) -> Graph:
        """The graph of a model, after a pass over two short rows that shows that its parts add up.

        Raises:
            ModelError: The stream is not the sum of its parts, or the model's sites are not known.
        """
        from veridical.interventions.contributions import examine

        facts = examine(model)
        return cls(
            path=model.path,
            n_layers=model.n_layers,
            n_heads=model.n_heads,
            n_kv_heads=facts.kv_heads,
            parallel=facts.parallel,
            has_mlp=facts.has_mlp,
            whole_attention=facts.whole_attention,
        )

    def __repr__(self) -> str:
        return (
            f"Graph({self.path}: {len(self.senders)} senders, {len(self.receivers)} receivers, "
            f"{len(self)} edges)"
        )

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """In the order in which they write; heads of a layer in order."""
        found = [Node("embed")]
        for layer in range(self.n_layers):
            if self.whole_attention:
                found.append(Node("attn", layer))
            else:
                found += [Node("head", layer, head) for head in range(self.n_heads)]
            if self.has_mlp[layer]:
                found.append(Node("mlp", layer))
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        """In the order in which they read: of a layer all queries, then keys, values, and the MLP."""
        found = []
        for layer in range(self.n_layers):
            for port, heads in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)):
                found += [Node("head", layer, head, port) for head in range(heads)]
            if self.has_mlp[layer]:
                found.append(Node("mlp", layer, port="in"))
        return (*found, Node("logits"))

    def before(self, receiver: Node) -> int:
        """How many senders write before `receiver` reads: they are the first so many of `senders`."""
        return bisect_right(self._written, self._reads(receiver))

    def senders_of(self, receiver: Node | str) -> tuple[Node, ...]:
        """The senders that have an edge to `receiver`."""
        node = self.receiver(receiver) if isinstance(receiver, str) else receiver
        return self.senders[: self.before(node)]

    @cached_property
    def mask(self) -> np.ndarray:
        """`[senders, receivers]` bool: which pairs are edges."""
        counts = np.array([self.before(receiver) for receiver in self.receivers])
        return np.arange(len(self.senders))[:, None] < counts

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, by receiver and then by sender, in causal order."""
        return tuple(Edge(s, receiver) for receiver in self.receivers for s in self.senders_of(receiver))

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __contains__(self, edge: object) -> bool:
        if isinstance(edge, str):
            try:
                self.edge(edge)
            except InputError:
                return False
            return True
        if not isinstance(edge, Edge):
            return False
        at = self._sender_numbers.get(edge.sender)
        known = edge.receiver in self._receiver_numbers
        return known and at is not None and at < self.before(edge.receiver)

    def edge(self, name: str | Edge) -> Edge:
        """The edge that a text such as "head.3.5->head.4.2:q" names.

        Raises:
            UnknownNameError: No such sender or receiver; names the nearest.
            InputError: The receiver reads before the sender writes.
        """
        if isinstance(name, Edge):
            name = name.name
        ends = [part.strip() for part in str(name).split("->")]
        if len(ends) != 2:
            raise InputError(
                f"{name!r} is no edge; expected sender->receiver, such as mlp.0->logits or "
                "head.0.0->head.1.0:q"
            )
        edge = Edge(self.sender(ends[0]), self.receiver(ends[1]))
        if edge not in self:
            raise InputError(
                f"there is no edge {edge.name}: {edge.receiver.name} reads the stream before "
                f"{edge.sender.name} writes into it{self._why_not(edge)}"
            )
        return edge

    def sender(self, name: str | Node) -> Node:
        """The sender that a text names; a negative layer counts from the end.

        Raises:
            UnknownNameError: No such sender; names the nearest.
        """
        node = name if isinstance(name, Node) else self._parsed(name)
        if node not in self._sender_numbers:
            raise unknown("sender", str(name), [s.name for s in self.senders], self._hint(node))
        return node

    def receiver(self, name: str | Node) -> Node:
        """The receiver that a text names; `mlp.3` is taken for `mlp.3:in`.

        Raises:
            UnknownNameError: No such receiver; names the nearest.
        """
        node = name if isinstance(name, Node) else self._parsed(name)
        if node is not None and node.kind == "mlp":
            node = Node("mlp", node.layer, port="in")
        if node not in self._receiver_numbers:
            raise unknown("receiver", str(name), [r.name for r in self.receivers], self._hint(node))
        return node

    def sender_number(self, sender: Node) -> int:
        """Place of a sender among `senders`."""
        return self._sender_numbers[sender]

    def receiver_number(self, receiver: Node) -> int:
        """Place of a receiver among `receivers`."""
        return self._receiver_numbers[receiver]

    @cached_property
    def _sender_numbers(self) -> dict[Node, int]:
        return {node: number for number, node in enumerate(self.senders)}

    @cached_property
    def _receiver_numbers(self) -> dict[Node, int]:
        return {node: number for number, node in enumerate(self.receivers)}

    # Times: block L is read at 2L by its heads and at 2L + 1 by its MLP (2L where they run in parallel), and
    # written at 2L + 1 by its heads and at 2L + 2 by its MLP.

    @cached_property
    def _written(self) -> list[int]:
        return [
            0 if node.layer is None else 2 * node.layer + (2 if node.kind == "mlp" else 1)
            for node in self.senders
        ]

    def _reads(self, receiver: Node) -> int:
        if receiver.layer is None:
            return 2 * self.n_layers
        late = receiver.kind == "mlp" and not self.parallel[receiver.layer]
        return 2 * receiver.layer + late

    def _parsed(self, name: str) -> Node | None:
        match = _NAME.fullmatch(name.strip())
        if match is None:
            return None
        alone, layerwise, layer, into, head_layer, head, port = match.groups()
        if alone:
            return Node(alone)
        number = int(layer or head_layer)
        number += self.n_layers if number < 0 else 0
        return Node(layerwise, number, port=into) if layerwise else Node("head", number, int(head), port)

    def _hint(self, node: Node | None) -> str:
        """A further sentence for a node that is well formed and yet not there."""
        if node is None or node.kind != "head":
            return ""
        if node.port in ("k", "v") and self.n_kv_heads < self.n_heads:
            group = self.n_heads // self.n_kv_heads
            return (
                f"Keys and values are of {self.n_kv_heads} heads (0 to {self.n_kv_heads - 1}), each shared "
                f"by {group} of the {self.n_heads} query heads."
            )
        if node.port is None and self.whole_attention:
            return "A norm follows the attention output of this model, so senders are whole layers, attn.L."
        if node.head is not None and node.head >= self.n_heads:
            return f"There are heads 0 to {self.n_heads - 1}."
        if node.port is None:
            return "A head reads by :q, :k or :v."
        return ""

    def _why_not(self, edge: Edge) -> str:
        layer = edge.receiver.layer
        if layer is None or edge.sender.layer != layer or not self.parallel[layer]:
            return ""
        if edge.receiver.kind == "mlp" and edge.sender.kind != "mlp":
            return " (attention and MLP of a block run in parallel here)"
        return ""
