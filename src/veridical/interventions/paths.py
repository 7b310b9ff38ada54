"""Exact edge and path patching: what one part of a model tells another, and what comes of it.

An edge runs from a *sender* to a *receiver* (see `graph`). Patching it leaves the run as it is, but for the
receiver's input: there the sender's contribution to the residual stream is the other run's. What the receiver
makes of that goes on through the whole rest of the network (as in ACDC, Conmy et al. 2023,
arXiv:2304.14997). Of several edges patched at once, each carries the other run; what is not patched is as it
has become in this run.

A path of several nodes is patched link by link (Wang et al. 2022, arXiv:2211.00593; Goldowsky-Dill et al.
2023, arXiv:2304.05969): the receiver's changed output changes the input of the next node only, and so on,
everything else as in the base run. A path that ends in `logits` moves them by no other way; one that ends in
another receiver goes on from there through the whole rest of the network. The inputs of several paths patched
at once that meet in a node are changed together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.errors import InputError, unknown
from veridical.interventions.between import Between, Direction
from veridical.interventions.graph import Edge, Graph, Node
from veridical.interventions.links import Path, Paths
from veridical.interventions.patched_paths import PatchedPaths
from veridical.interventions.rewire import Rewiring
from veridical.interventions.rewired_pass import Variant, layer_of
from veridical.progress import bar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from veridical.hooked import HookedModel

Names = str | Node | Iterable[str | Node]


def patch_paths(
    model: HookedModel | nn.Module,
    clean: Any,
    corrupt: Any,
    *,
    metric: Any = "logit_diff",
    edges: Any = None,
    senders: Names | None = None,
    receivers: Names | None = None,
    paths: Any = None,
    together: bool = False,
    direction: Direction = "denoising",
    positions: int | Sequence[int] | None = None,
    keep: int | None = None,
    answers: Any = None,
    wrong: Any = None,
    align: Any = None,
    bootstrap: int = 500,
    seed: int = 0,
    batch_tokens: int = 8192,
    progress: bool | None = None,
) -> PatchedPaths:
    """Patches edges or paths between clean and corrupt runs, exactly, and measures what comes of each.

    Give `edges`, or `senders` and/or `receivers` (every edge between them), or `paths`.

    Args:
        model: The model; its parts must add up in the residual stream.
        clean: A text or chat, a list of them, token ids `[batch, pos]`, `Pairs`, or images.
        corrupt: The same; row i goes with row i of clean.
        metric: A name, a function `logits -> [batch]`, or a `Metric`; see `as_metric`.
        edges: Edges such as "head.0.1->head.1.2:k", or "*" for all of them. A list within the list is a set
            of edges that are patched at once.
        senders: Names or globs of senders ("head.0.*").
        receivers: Names or globs of receivers ("head.1.*:k").
        paths: Paths such as "embed->head.0.1:v->mlp.1->logits": a sender, then receivers; a list within the
            list is a set that is patched at once. A key or value that several heads share goes on through
            all of them.
        together: Patch everything that was named at once.
        direction: "denoising" carries the clean run into the corrupt one, "noising" the corrupt into the
            clean.
        positions: Tokens at which an edge, or the first link of a path, is patched: numbers from the start
            of each clean row's text, or from its end where negative; all when not given.
        keep: How many last positions a metric function reads; all when not given.
        answers, wrong: Answers for metrics that need them; see `as_metric`.
        align: For rows of unequal token counts; see `Inputs`. What does not match is not patched.
        bootstrap: Resamples of rows (whole pairs, for `Pairs`) for the 95 % intervals.
        seed: Of the resamples.
        batch_tokens: Tokens in one forward; several edges run as copies of the rows in one batch.
        progress: Whether to show a bar; None where someone watches.

    Returns:
        The metric for each edge or path and example, with effects, intervals and figures.

    Raises:
        UnknownNameError: A node that the model does not have; names the nearest.
        InputError: An edge against the order of the model, rows that do not fit, a bad metric.
        ModelError: A model whose parts do not add up (bert).
    """
    if (paths is not None) + (edges is not None) + (senders is not None or receivers is not None) != 1:
        raise InputError("give edges=, or senders= and/or receivers=, or paths=: one of the three")
    between = Between(
        model, clean, corrupt, metric, direction=direction, positions=positions, keep=keep, answers=answers,
        wrong=wrong, align=align, batch_tokens=batch_tokens,
    )  # fmt: skip
    graph = between.graph
    if paths is not None:
        items: list[tuple[Any, ...]] = as_paths(graph, paths)
    elif edges is not None:
        items = as_edges(graph, edges)
    else:
        items = [(edge,) for edge in edges_between(graph, senders, receivers)]
    if together:
        items = [tuple(dict.fromkeys(part for item in items for part in item))]
    clean_metric, corrupt_metric = between.ends()
    base = corrupt_metric if direction == "denoising" else clean_metric
    values = np.repeat(base[None], len(items), axis=0)
    reach = np.array([_reaches(between, item) for item in items])
    chosen = [item for item, reaches in zip(items, reach) if reaches]
    what = "paths" if paths is not None else "edges"
    with bar(len(chosen) * len(between.batches()), what, what, progress) as shown:

        def work(rewiring: Rewiring) -> Tensor:
            found = Paths(rewiring, chosen).variants() if what == "paths" else map(edge_variant, chosen)
            return rewiring.measure(list(found), shown.update)

        if chosen:
            values[reach] = between.run(work)
    _warn(between, items, reach, values, base)
    return PatchedPaths.made(between, what, items, values, clean_metric, corrupt_metric, bootstrap, seed)


def edge_variant(edges: Iterable[Edge]) -> Variant:
    """The run in which these edges carry the other run."""
    into: dict[Node, set[Node]] = {}
    for edge in edges:
        into.setdefault(edge.receiver, set()).add(edge.sender)
    return Variant({receiver: frozenset(senders) for receiver, senders in into.items()})


def as_edges(graph: Graph, given: Any) -> list[tuple[Edge, ...]]:
    """Edges, each alone or in sets, from what the user named."""
    if isinstance(given, str) and given.strip() == "*":
        return [(edge,) for edge in graph.edges]
    listed = [given] if isinstance(given, str | Edge) else list(given)
    items = []
    for item in listed:
        parts = [item] if isinstance(item, str | Edge) else list(item)
        items.append(tuple(dict.fromkeys(graph.edge(part) for part in parts)))
    if not items or not all(items):
        raise InputError('no edge was named; give one such as "mlp.0->logits", or "*" for all')
    return items


def edges_between(graph: Graph, senders: Names | None, receivers: Names | None) -> list[Edge]:
    """Every edge from one of `senders` to one of `receivers`; None for any.

    Raises:
        UnknownNameError: A name or glob without a node.
        InputError: There is no edge between them.
    """
    ours = _matching(graph.senders, senders, graph.sender)
    theirs = _matching(graph.receivers, receivers, graph.receiver)
    found = [edge for edge in graph.edges if edge.sender in ours and edge.receiver in theirs]
    if not found:
        raise InputError(
            f"there is no edge from {_said(senders)} to {_said(receivers)}: every one of these receivers "
            "reads before the senders write"
        )
    return found


def as_paths(graph: Graph, given: Any) -> list[tuple[Path, ...]]:
    """Paths, each alone or in sets, from what the user named."""
    if isinstance(given, str) or _is_nodes(given):
        given = [given]
    items = []
    for item in given:
        parts = [item] if isinstance(item, str) or _is_nodes(item) else list(item)
        items.append(tuple(dict.fromkeys(Path.of(graph, part) for part in parts)))
    if not items or not all(items):
        raise InputError('no path was named; give one such as "embed->head.0.1:v->logits"')
    return items


def _is_nodes(value: Any) -> bool:
    """A path as a sequence of nodes: names without arrows."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(part, Node) or (isinstance(part, str) and "->" not in part) for part in value)
    )


def _matching(nodes: Sequence[Node], given: Names | None, find: Any) -> set[Node]:
    if given is None:
        return set(nodes)
    found: set[Node] = set()
    for name in [given] if isinstance(given, str | Node) else given:
        if isinstance(name, str) and any(sign in name for sign in "*?["):
            matched = {node for node in nodes if fnmatchcase(node.name, name)}
            if not matched:
                raise unknown("node", name, [node.name for node in nodes])
            found |= matched
        else:
            found.add(find(name))
    return found


def _said(names: Names | None) -> str:
    if names is None:
        return "any node"
    return ", ".join([str(names)] if isinstance(names, str | Node) else map(str, names))


def _reaches(between: Between, item: tuple[Edge, ...] | tuple[Path, ...]) -> bool:
    """Whether the metric can depend on what is patched, as the model is built."""
    return any(_ends_in_sight(between, part) for part in item)


def _ends_in_sight(between: Between, part: Edge | Path) -> bool:
    model, metric = between.model, between.metric
    receiver = part.receiver if isinstance(part, Edge) else part.nodes[-1]
    if metric.site is not None:
        (site,) = model.resolve(metric.site)
        ranks = ("q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")
        if site.is_raw:
            return True
        if site.layer is None:
            return site.kind != "embed"
        if receiver.kind == "logits" or layer_of(receiver, model) > site.layer:
            return False
        if receiver.layer == site.layer:
            first = receiver.port if receiver.kind == "head" else "mlp_post"
            return site.kind in ranks and ranks.index(site.kind) >= ranks.index(str(first))
        return site.kind != "embed"
    # Of the last block only keys and values carry something from one position to another.
    stays = receiver.kind == "logits" or (
        receiver.layer == model.n_layers - 1 and receiver.port not in ("k", "v")
    )
    single = isinstance(part, Edge) or len(part.nodes) == 2
    if not (stays and single and model.kind == "causal" and metric.keep is not None):
        return True
    return bool(between.at[:, -metric.keep :].any())


def _warn(
    between: Between, items: Sequence[Any], reach: np.ndarray, values: np.ndarray, base: np.ndarray
) -> None:
    if not reach.all():
        names = [" + ".join(part.name for part in item) for item, reaches in zip(items, reach) if not reaches]
        shown = ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
        why = (
            f"it is read at {between.metric.site}, before they come in"
            if between.metric.site is not None
            else "it reads other positions, and nothing carries the patched ones there"
        )
        warnings.warn(
            f"the metric cannot depend on {shown} ({why}): the effect is exactly zero", stacklevel=3
        )
    if reach.any() and np.array_equal(values, np.repeat(base[None], len(items), axis=0)):
        warnings.warn(
            "no patch changed the metric, to the last bit: at the patched positions the senders write the "
            "same in both runs, or nothing that the metric reads comes of it",
            stacklevel=3,
        )
