"""Circuits as sets of edges: what of them lies on a way from the embedding to the logits, and random ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from veridical.interventions.graph import Edge, Graph, Node
from veridical.interventions.links import senders_behind


def connected(graph: Graph, edges: Iterable[Edge]) -> list[Edge]:
    """The edges that lie on a way from `embed` to `logits` within `edges`, in their order.

    In a run in which all other edges carry the corrupt run, the rest changes nothing: a sender that no way
    reaches writes what it writes in the corrupt run, and what no way leads on from is not read.
    """
    given = list(dict.fromkeys(edges))
    leaving: dict[Node, list[Edge]] = defaultdict(list)
    for edge in given:
        leaving[edge.sender].append(edge)
    reached, useful = {Node("embed")}, set[Node]()
    for sender in graph.senders:
        if sender in reached:
            for edge in leaving[sender]:
                reached.update(_behind(graph, edge.receiver))
    for sender in reversed(graph.senders):
        if sender in reached and any(_leads_on(graph, edge.receiver, useful) for edge in leaving[sender]):
            useful.add(sender)
    return [e for e in given if e.sender in useful and _leads_on(graph, e.receiver, useful)]


def random_circuit(graph: Graph, size: int, random: np.random.Generator) -> list[Edge]:
    """`size` edges along random ways from the logits back to the embedding."""
    ports: dict[Node, list[Node]] = defaultdict(list)
    for receiver in graph.receivers:
        for sender in _behind(graph, receiver):
            ports[sender].append(receiver)
    found: dict[Edge, None] = {}
    size = min(size, len(graph))
    while len(found) < size:
        receiver = Node("logits")
        while True:
            senders = graph.senders_of(receiver)
            sender = senders[random.integers(len(senders))]
            found[Edge(sender, receiver)] = None
            if sender.kind == "embed" or len(found) == size:
                break
            receiver = ports[sender][random.integers(len(ports[sender]))]
    return list(found)


def _behind(graph: Graph, receiver: Node) -> list[Node]:
    return [] if receiver.kind == "logits" else senders_behind(graph, receiver)


def _leads_on(graph: Graph, receiver: Node, useful: set[Node]) -> bool:
    return receiver.kind == "logits" or any(sender in useful for sender in _behind(graph, receiver))
