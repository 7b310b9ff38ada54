"""Edge attribution patching: every edge of a model from two forwards and one backward.

The score of an edge from sender s to receiver r is the sum over positions of

    (c_s in the source run - c_s in the base run) . (gradient of the metric at r's input, in the base run)

with c_s what s adds to the stream: to first order, what giving r alone the other run's c_s would do to the
metric (Syed, Rager and Conmy 2023, arXiv:2310.10348). It equals the derivative of the exact edge patch at
zero.

With `steps`, the gradient at r's input is the mean along the straight way from the base run's embedding to
the source run's, by a Gauss-Legendre rule (Hanna, Pezzelle and Belinkov 2024, arXiv:2403.17806). That costs
as many forwards and backwards, and finds edges whose effect is saturated at the base.

The backward goes block by block from the last, and what a block's receivers need is contracted as soon as it
is there. From the gradient g that leaves a block, autograd gives it at the MLP's input and at each head's
queries, keys and values; the latter go back to the stream through their own rows of the projection and
through the model's own norm: the gradients of the block's receivers. All senders that write before are then
contracted with them, layer by layer, each rebuilt from its values z through the output projection. So
senders are kept only as differences of z, and gradients at receivers only while their block is contracted
(see `backward`). What cannot count is left out: in a causal model both runs are the same before the first
token in which they differ, so only what follows is contracted. Where both runs together are so short that
reading the weights is most of the work (`JOINED`), they are one batch of one forward pass.

Memory, in numbers, for b rows of p tokens, L layers, h query and g key/value heads, width d (see `sizes`):

- storing both sides, senders `[1 + L(h + 1), b, p, d]` and receivers `[1 + L(h + 2g + 1), b, p, d]`:
  b p d (2 + L(2h + 2g + 2));
- here, differences `[b, p, d]` of what enters the first block and of each MLP and `[b, p, h d_head]` of each
  layer's z, together b p (d (1 + L) + L h d_head); and while n of one block's queries, keys and values are
  contracted, their gradients before and after the norm and on the way through it, 4 n b p d, and the
  contributions of m heads of a layer, m b p d. n is at most 2 h and m at most h, and so few that neither
  takes more than `CHUNK` numbers (8.4 million, 34 MB in float32), if there is more than one.

At 32 layers of 32 heads with g = h and d = h d_head = 4096, storing both sides takes 4,162 b p d numbers,
68 MB for each token in float32. Here the differences are 65 b p d and the rest at most 288 b p d: 8.5 % of it
for few tokens, and 2.3 % for 128 tokens, where the 68 MB of the rest are the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.errors import InputError, NonFiniteError
from veridical.interventions import backward
from veridical.interventions.attribution import Attribution, selected
from veridical.interventions.backward import Arrived, Differences, Slope, Walk
from veridical.interventions.condition import carries_hooks
from veridical.interventions.contributions import sender_sites
from veridical.interventions.gradients import leaves, measure
from veridical.interventions.graph import Graph
from veridical.interventions.integrated import legendre
from veridical.interventions.runs import Batch, Runs
from veridical.progress import bar
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.interventions.metrics import Metric

JOINED = 32
"""Positions of a batch up to which its two runs are one forward pass."""


def score_edges(
    model: HookedModel,
    runs: Runs,
    wanted: Any = None,
    *,
    by_position: bool,
    progress: bool | None,
    steps: int | None = None,
) -> Attribution:
    """Scores of every edge, or of those `wanted` (names or globs), for each example.

    Gradients are those at the base run, or with `steps` means along the way to the source run.

    Raises:
        ModelError: The model's parts do not add up, or it has no backward.
        InputError: A metric that reads an activation; edges that do not exist.
    """
    if runs.metric.site is not None:
        raise InputError(
            f"edges end in the logits, and the metric {runs.metric.name} reads {runs.metric.site}; give a "
            "metric of the logits"
        )
    graph = Graph.of(model)
    senders, receivers = ([node.name for node in nodes] for nodes in (graph.senders, graph.receivers))
    mask = graph.mask
    if wanted is not None:
        mask = mask & selected(graph, wanted)
        if not mask.any():
            raise InputError(f"edges={wanted!r}: their receivers read the stream before their senders write")
    found, base, source = [], [], []
    batches = list(runs.batches())
    with bar(len(batches), "edge attribution", "batches", progress) as shown:
        for batch in batches:
            ends, slopes = _ends(model, runs, graph, batch, steps)
            found.append(_scores(ends, slopes, batch, by_position).cpu())
            base.append(ends.own.cpu())
            source.append(ends.theirs.cpu())
            shown.update(1)
    scores = torch.cat(found).numpy()
    if not np.isfinite(scores).all():
        raise NonFiniteError(f"{model.path} gives NaN or infinity in its values or gradients")
    np.copyto(scores, np.nan, where=~mask)
    if by_position:
        scores[~torch.cat([batch.valid for batch in batches]).cpu().numpy()] = np.nan
    return Attribution.of(
        model,
        runs,
        "edges" if steps is None else "edges_ig",
        edge_scores=scores,
        senders=tuple(senders),
        receivers=tuple(receivers),
        base_metric=torch.cat(base).numpy(),
        source_metric=torch.cat(source).numpy(),
    )


def sizes(tokens: int, layers: int, heads: int, kv_heads: int, d_model: int, d_head: int) -> tuple[int, int]:
    """Numbers kept for `tokens` = b p positions: storing senders and receivers, and here (see above)."""
    stream = tokens * d_model
    stored = stream * (2 + layers * (2 * heads + 2 * kv_heads + 2))
    kept = stream * (1 + layers) + tokens * layers * heads * d_head
    ports = backward.together(4 * stream, min(2 * heads, heads + 2 * kv_heads))
    at_once = 4 * stream * ports + stream * backward.together(stream, heads)
    return stored, kept + at_once


@dataclass
class Ends:
    """What both runs give of some rows.

    Attributes:
        own, theirs: The metric in the base run and in the source run, `[batch]`.
        differences: What senders add in the one less in the other.
        walk: The backward.
    """

    walk: Walk
    own: Tensor
    theirs: Tensor
    differences: Differences


def _ends(
    model: HookedModel, runs: Runs, graph: Graph, batch: Batch, steps: int | None
) -> tuple[Ends, Iterable[tuple[float, Slope]]]:
    """Both ends, and the gradients that are averaged, each with its weight."""
    metric = runs.metric_for(model, batch)
    apart = carries_hooks(model)  # they may tell rows and positions apart
    first = batch.first_difference if model.kind == "causal" and not apart else 0
    walk = Walk(model, graph, first)
    if steps is None:
        joined = batch.valid.numel() <= JOINED and not apart
        ends, slope = _at_base(model, walk, batch, metric, joined)
        return ends, [(1.0, slope)]
    start, reads = Site("resid_pre", 0), sender_sites(graph.senders)
    theirs, source = measure(model, batch.source, metric, reads)
    own, base = measure(model, batch.base, metric, reads)
    way = batch.change(base[start], source[start])
    ends = Ends(walk, own, theirs, walk.differences(batch, base.values, source.values))
    slopes = (
        (weight, walk.slope(batch.base, metric, {start: _moved(place, way)}))
        for place, weight in zip(*legendre(steps))
    )
    return ends, slopes


def _at_base(
    model: HookedModel, walk: Walk, batch: Batch, metric: Metric, joined: bool
) -> tuple[Ends, Slope]:
    """Both ends, and the gradients in the base run, in two forward passes or in one."""
    rows, begin = len(batch.rows), leaves(model, [Site("resid_pre", 0)])
    if not joined:
        theirs, source = measure(model, batch.source, metric, sender_sites(walk.graph.senders))
        slope = walk.slope(batch.base, metric, begin)
        return Ends(walk, slope.metric, theirs, walk.differences(batch, slope.values, source.values)), slope
    both = {name: torch.cat([value, batch.source[name]]) for name, value in batch.base.items()}
    slope = walk.slope(both, metric, begin, rows)
    names = [site.name for site in sender_sites(walk.graph.senders)]
    base = {name: slope.values[name][:rows] for name in names}
    source = {name: slope.values[name][rows:] for name in names}
    own, theirs = slope.metric.split(rows)
    return Ends(walk, own, theirs, walk.differences(batch, base, source)), slope


def _moved(place: float, way: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit of the base's stream: so far along the way to the source's, and the leaf of a new graph."""
    return lambda value: (value.detach() + (place * way).to(value.dtype)).requires_grad_()


def _scores(ends: Ends, slopes: Iterable[tuple[float, Slope]], batch: Batch, apart: bool) -> Tensor:
    """Scores `[batch, senders, receivers]`, positions second where they are apart."""
    rows, positions = batch.valid.shape
    walk, differences = ends.walk, ends.differences
    size = len(walk.graph.senders), len(walk.graph.receivers)
    with torch.inference_mode(False):
        scores = differences.zeros(rows, positions, *size) if apart else differences.zeros(rows, *size)
        for weight, slope in slopes:
            for arrived in walk.back(slope, weight, rows):
                _contract(differences, arrived, scores[:, walk.first :] if apart else scores)
    return scores


def _contract(differences: Differences, arrived: Arrived, scores: Tensor) -> None:
    """Adds the scores of all edges into some receivers, which lie side by side."""
    number, before, gradient = arrived
    for first, block in differences.blocks(before):
        # [b, n, p d], or [b p, n, d] where positions stay apart. Receivers first: BLAS likes it better.
        batched = scores.shape[:-2].numel()
        senders = block.reshape(len(block), batched, -1).permute(1, 2, 0)
        receivers = gradient.reshape(len(gradient), batched, -1).transpose(0, 1)
        place = scores[..., first : first + len(block), number : number + len(gradient)]
        place += torch.bmm(receivers.to(senders), senders).view(*place.shape[:-2], -1, len(block)).mT
