"""Edge attribution patching: every edge of a model from two forwards and one backward.

The score of an edge from sender s to receiver r is the sum over positions of

    (c_s in the source run - c_s in the base run) . (gradient of the metric at r's input, in the base run)

with c_s what s adds to the stream: to first order, what giving r alone the other run's c_s would do to the
metric (Syed, Rager and Conmy 2023, arXiv:2310.10348). It equals the derivative of the exact edge patch at
zero.

The backward goes block by block from the last, and what a block's receivers need is contracted as soon as it
is there. From the gradient g that leaves a block, autograd gives it at the MLP's input and at each head's
queries, keys and values; the latter go back to the stream through their own rows of the projection and
through the model's own norm: the gradients of the block's receivers. All senders that write before are then
contracted with them, layer by layer, each rebuilt from its values z through the output projection. So
senders are kept only as differences of z, and gradients at receivers only while their block is contracted.

Memory, in numbers, for b rows of p tokens, L layers, h query and g key/value heads, width d (see `sizes`):

- storing both sides, senders `[1 + L(h + 1), b, p, d]` and receivers `[1 + L(h + 2g + 1), b, p, d]`:
  b p d (2 + L(2h + 2g + 2));
- here, differences `[b, p, d]` of what enters the first block and of each MLP and `[b, p, h d_head]` of each
  layer's z, together b p (d (1 + L) + L h d_head); and while heads of one block's queries, keys or values are
  contracted, their gradients before and after the norm and on the way through it, 4 n b p d for n heads, and
  the contributions of m heads of a layer, m b p d. n and m are at most h, and so few that neither takes more
  than `CHUNK` numbers (8.4 million, 34 MB in float32), if there is more than one.

At 32 layers of 32 heads with g = h and d = h d_head = 4096, storing both sides takes 4,162 b p d numbers,
68 MB for each token in float32. Here the differences are 65 b p d and the rest at most 160 b p d: 5.4 % of it
for few tokens, and 2.3 % for 128 tokens, where the 68 MB of the rest are the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.errors import InputError, ModelError, NonFiniteError
from veridical.hooks import Place, Reads, attached
from veridical.interventions.attribution import Attribution, selected
from veridical.interventions.contributions import linear_map, output_projection, sender_site, sender_sites
from veridical.interventions.gradients import differentiable, forward, leaves, measure, measured, pulled
from veridical.interventions.graph import Graph, Node
from veridical.interventions.runs import Batch, Runs
from veridical.progress import bar
from veridical.sites import RAW, Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

CHUNK = 1 << 23
"""Numbers that the contributions of senders, and the gradients of receivers, may take at a time."""


def score_edges(
    model: HookedModel, runs: Runs, wanted: Any = None, *, by_position: bool, progress: bool | None
) -> Attribution:
    """Scores of every edge, or of those `wanted` (names or globs), for each example.

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
        mask = mask & selected(senders, receivers, wanted)
        if not mask.any():
            raise InputError(f"edges={wanted!r}: their receivers read the stream before their senders write")
    found, base, source = [], [], []
    batches = list(runs.batches())
    with bar(len(batches), "edge attribution", "batches", progress) as shown:
        for batch in batches:
            scores, own, theirs = _score_batch(model, runs, graph, batch, by_position)
            found.append(scores.cpu())
            base.append(own.cpu())
            source.append(theirs.cpu())
            shown.update(1)
    scores = torch.cat(found).numpy()
    if not np.isfinite(scores).all():
        raise NonFiniteError(f"{model.path} gives NaN or infinity in its values or gradients")
    scores[..., ~mask] = np.nan
    if by_position:
        scores[~torch.cat([batch.valid for batch in batches]).cpu().numpy()] = np.nan
    return Attribution.of(
        model,
        runs,
        "edges",
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
    at_once = 4 * stream * together(4 * stream, heads) + stream * together(stream, heads)
    return stored, kept + at_once


def together(numbers: int, most: int) -> int:
    """How many of `most` parts of so many numbers each are taken at a time."""
    return max(1, min(most, CHUNK // numbers))


class Differences:
    """What each sender adds to the stream in the source run less in the base run, as differences of z."""

    def __init__(
        self,
        model: HookedModel,
        graph: Graph,
        batch: Batch,
        base: dict[str, Tensor],
        source: dict[str, Tensor],
    ) -> None:
        self.model, self.graph = model, graph

        def change(site: Site) -> Tensor:
            return batch.change(base[site.name].detach(), source[site.name])

        self.plain: dict[int, Tensor] = {}
        self.heads: dict[int, tuple[int, Tensor]] = {}
        for number, sender in enumerate(graph.senders):
            if sender.kind != "head":
                self.plain[number] = change(sender_site(sender)).flatten(0, 1)[None]
            elif sender.head == 0:
                # [heads, tokens, d_head]
                z = change(sender_site(sender)).flatten(0, 1).transpose(0, 1)
                self.heads[number] = (sender.layer or 0), z
        one = self.plain[0].numel()
        self.step = together(one, graph.n_heads)
        whole = len(graph.senders) * one <= CHUNK
        self.whole = torch.cat([block for _, block in self._rebuilt(len(graph.senders))]) if whole else None

    def blocks(self, before: int) -> Iterator[tuple[int, Tensor]]:
        """Contributions of the first `before` senders, `[n, tokens, d]`, each with its first one's number."""
        if self.whole is not None:
            yield 0, self.whole[:before]
        else:
            yield from self._rebuilt(before)

    def _rebuilt(self, before: int) -> Iterator[tuple[int, Tensor]]:
        for number in sorted([*self.plain, *self.heads]):
            if number >= before:
                return
            if number in self.plain:
                yield number, self.plain[number]
                continue
            layer, z = self.heads[number]
            weight, _ = output_projection(self.model, layer)
            for first in range(0, len(z), self.step):
                part = slice(first, first + self.step)
                yield number + first, torch.bmm(z[part], weight[part].to(z))


def _score_batch(
    model: HookedModel, runs: Runs, graph: Graph, batch: Batch, by_position: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores `[batch, senders, receivers]` (positions second where they are apart), and both metrics."""
    metric = runs.metric_for(model, batch)
    theirs, other = measure(model, batch.source, metric, sender_sites(graph.senders))
    assert theirs is not None
    walk = Walk(model, graph)
    with differentiable(model.model):
        with attached(walk.projections, {}) as inside:
            run = forward(model, batch.base, metric, walk.sites, leaves(model, [Site("resid_pre", 0)]))
        found = measured(run, metric)
        last = Site("resid_post", graph.n_layers - 1).name
        (end,) = pulled(model, run, metric, found, [run.values[last]])
        values = {**run.values, **inside.values}
        run.values, run.output, inside.values = {}, None, {}
    if end is None:
        raise ModelError(f"the metric {metric.name} does not depend on {last}")
    differences = Differences(model, graph, batch, values, other.values)
    del other
    rows, positions = batch.valid.shape
    exact = torch.promote_types(end.dtype, torch.float32)
    shape = (rows, positions) if by_position else (rows,)
    scores = torch.zeros(*shape, len(graph.senders), len(graph.receivers), dtype=exact, device=end.device)
    with torch.inference_mode(False):
        for arrived in walk.back(values, end.to(exact)):
            _contract(differences, arrived, scores, rows)
    return scores, found.detach(), theirs


Arrived = list[tuple[int, int, Tensor]]
"""Number of the first receiver, how many senders write before, and gradients `[receivers, b, p, d]`."""


def _contract(differences: Differences, arrived: Arrived, scores: Tensor, rows: int) -> None:
    """Writes the scores of all edges into some receivers."""
    for first, block in differences.blocks(max(before for _, before, _ in arrived)):
        for receiver, before, gradient in arrived:
            count = min(len(block), before - first)
            if count <= 0:
                continue
            # [b, n, p d], or [b p, n, d] where positions stay apart
            batched = rows if scores.dim() == 3 else block.shape[1]
            senders = block[:count].reshape(count, batched, -1).transpose(0, 1)
            receivers = gradient.reshape(len(gradient), batched, -1).permute(1, 2, 0)
            part = torch.bmm(senders, receivers.to(senders))
            place = scores[..., first : first + count, receiver : receiver + len(gradient)]
            place += part.view(place.shape)


class Walk:
    """The backward through the blocks, which hands out the gradients at every receiver."""

    def __init__(self, model: HookedModel, graph: Graph) -> None:
        self.model, self.graph = model, graph
        self.projections = _projections(model)

    @property
    def sites(self) -> list[Site]:
        """What the forward pass must read."""
        sites = [*sender_sites(self.graph.senders), Site("resid_post", self.graph.n_layers - 1)]
        for layer in range(self.graph.n_layers):
            kinds = ["resid_pre", "q", "k", "v", "attn_out"]
            if self.graph.has_mlp[layer]:
                kinds += ["mlp_out"] if self.graph.parallel[layer] else ["resid_mid", "mlp_out"]
            sites += [Site(kind, layer) for kind in kinds]
        return list(dict.fromkeys(sites))

    def back(self, values: dict[str, Tensor], end: Tensor) -> Iterator[Arrived]:
        """From the last block to the first, what arrives at some receivers at a time.

        Args:
            values: What the forward pass read; emptied on the way, which frees the graph.
            end: The gradient at the end of the last block, `[b, p, d]`.
        """
        graph = self.graph
        yield [self._named(graph.receivers[-1], end[None])]
        for layer in reversed(range(graph.n_layers)):
            sites = {kind: Site(kind, layer).name for kind in _OF_BLOCK}
            own = {kind: values.pop(name) for kind, name in sites.items() if name in values}
            stream, out, middle = own["resid_pre"], own["attn_out"], end
            if graph.has_mlp[layer]:
                reads = stream if graph.parallel[layer] else own["resid_mid"]
                (into,) = torch.autograd.grad([own["mlp_out"]], [reads], [end.to(own["mlp_out"].dtype)])
                yield [self._named(Node("mlp", layer, port="in"), into[None])]
                if graph.parallel[layer]:
                    end = end + into
                else:
                    middle = end = end + into
            heads = [own[kind] for kind in "qkv"]
            gradients = torch.autograd.grad([out], heads, [middle.to(out.dtype)], retain_graph=True)
            normed = values.pop(_projected(layer).name, None)
            total = torch.zeros_like(end)
            for port, value, gradient in zip("qkv", heads, gradients):
                for first, part in self._pulled_back(layer, port, value, gradient, normed, stream):
                    total += part.to(total).sum(0)
                    yield [self._named(Node("head", layer, first, port), part)]
            end = end + total

    def _named(self, first: Node, gradient: Tensor) -> tuple[int, int, Tensor]:
        return self.graph.receiver_number(first), self.graph.before(first), gradient.detach()

    def _pulled_back(
        self,
        layer: int,
        port: str,
        value: Tensor,
        gradient: Tensor,
        normed: Tensor | None,
        stream: Tensor,
    ) -> Iterator[tuple[int, Tensor]]:
        """Gradients at the stream of each head of a port, `[heads, b, p, d]` and the first one's number.

        Through the head's own rows of the projection and the model's norm; where the projection cannot be
        told (TransformerLens), by autograd from the heads to the stream.
        """
        heads = gradient.shape[2]
        step = together(4 * stream.numel(), heads)
        place = self.model.place(Site(port, layer))
        weight = None
        if normed is not None:
            matrix, _ = linear_map(place.module, normed.shape[-1], normed.dtype, normed.device)
            weight = place.view.read(matrix).permute(1, 2, 0)  # [heads, d_head, d]
        for first in range(0, heads, step):
            part = slice(first, first + step)
            if weight is None or normed is None:
                count = len(range(heads)[part])
                alone = gradient.new_zeros(count, *gradient.shape)
                for at in range(count):
                    alone[at, :, :, first + at] = gradient[:, :, first + at]
                (back,) = torch.autograd.grad(value, stream, alone, retain_graph=True, is_grads_batched=True)
                yield first, back
                continue
            rows = gradient[:, :, part].flatten(0, 1).transpose(0, 1)
            into = torch.bmm(rows, weight[part].to(rows)).view(-1, *normed.shape)
            if normed is not stream:
                (into,) = torch.autograd.grad(normed, stream, into, retain_graph=True, is_grads_batched=True)
            yield first, into


_OF_BLOCK = ("resid_pre", "q", "k", "v", "attn_out", "resid_mid", "mlp_out")


def _projections(model: HookedModel) -> Reads:
    """Reads of what each layer's query, key and value projections take; none in TransformerLens."""
    if model.architecture.model_type in ("HookedTransformer", "TransformerBridge"):
        return {}
    modules = {layer: model.place(Site("q", layer)).module for layer in range(model.n_layers)}
    return {_projected(layer): (Place(module, "in"), None) for layer, module in modules.items()}


def _projected(layer: int) -> Site:
    return Site(RAW, path=f"projections.{layer}:in")
