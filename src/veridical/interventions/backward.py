"""The backward of edge attribution, block by block, and the differences that it is contracted with.

From the gradient that leaves a block, autograd gives it at the MLP's input and at each head's queries, keys
and values. Those go back to the stream through their own rows of the projections, all heads of a block in one
product, and through the model's own norm, run anew on the block's input; where projections or norm cannot be
told (TransformerLens), by autograd from each head to the stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veridical.errors import ModelError
from veridical.hooks import Place, Reads, attached
from veridical.interventions.contributions import linear_map, output_projection, sender_site, sender_sites
from veridical.interventions.first_rows import first_rows
from veridical.interventions.gradients import differentiable, forward, measured, pulled
from veridical.interventions.graph import Graph, Node
from veridical.interventions.runs import Batch
from veridical.sites import RAW, Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.interventions.metrics import Metric

CHUNK = 1 << 23
"""Numbers that the contributions of senders, and the gradients of receivers, may take at a time."""

Arrived = tuple[int, int, Tensor]
"""Number of the first receiver, how many senders write before, and gradients `[receivers, b, p, d]`."""


def together(numbers: int, most: int) -> int:
    """How many of `most` parts of so many numbers each are taken at a time."""
    return max(1, min(most, CHUNK // max(1, numbers)))


class Differences:
    """What each sender adds to the stream in the source run less in the base run, as differences of z.

    Args:
        model: The model.
        graph: Its nodes.
        batch: The rows.
        first: The first position that is kept; before it there are no differences.
        base, source: By canonical name, values of both runs at the senders' sites.
    """

    def __init__(
        self,
        model: HookedModel,
        graph: Graph,
        batch: Batch,
        first: int,
        base: Mapping[str, Tensor],
        source: Mapping[str, Tensor],
    ) -> None:
        self.model, self.graph = model, graph

        def change(site: Site) -> Tensor:
            return batch.change(base[site.name].detach(), source[site.name].detach())[:, first:].flatten(0, 1)

        self.plain: dict[int, Tensor] = {}
        self.heads: dict[int, tuple[int, Tensor]] = {}
        for number, sender in enumerate(graph.senders):
            if sender.kind != "head":
                self.plain[number] = change(sender_site(sender))[None]
            elif sender.head == 0:
                # [heads, tokens, d_head]
                self.heads[number] = (sender.layer or 0), change(sender_site(sender)).transpose(0, 1)
        one = self.plain[0]
        self.step = together(one.numel(), graph.n_heads)
        self.whole: Tensor | None = None
        if len(graph.senders) * one.numel() <= CHUNK:
            self.whole = one.new_empty(len(graph.senders), *one.shape[1:])
            for first, block in self._rebuilt(len(graph.senders)):
                self.whole[first : first + len(block)] = block

    def zeros(self, *shape: int) -> Tensor:
        """In the dtype and on the device of the differences."""
        return self.plain[0].new_zeros(*shape)

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


@dataclass
class Slope:
    """One pass with its graph.

    Attributes:
        metric: Of every row, `[rows]`.
        end: Its gradient behind the last block, `[rows, pos, d]`.
        values: What was read, by canonical name; `Walk.back` empties it, which frees the graph.
    """

    metric: Tensor
    end: Tensor
    values: dict[str, Tensor]


class Walk:
    """The backward through the blocks, which hands out the gradients at every receiver.

    Args:
        model: The model.
        graph: Its nodes.
        first: The first position whose receivers matter. Above 0 only where what follows a position cannot
            change it, so that gradients before are of no use to those after.
    """

    def __init__(self, model: HookedModel, graph: Graph, first: int = 0) -> None:
        self.model, self.graph, self.first = model, graph, first
        self._projections, self._norms = _inside(model)

    def slope(
        self, inputs: Mapping[str, Tensor], metric: Metric, begin: Mapping[Site, Any], rows: int | None = None
    ) -> Slope:
        """A forward pass and the gradient of the metric behind the last block.

        Args:
            inputs: Keyword arguments of the forward.
            metric: Of `rows` rows.
            begin: Edits that start the graph.
            rows: If there are twice as many rows as the metric has, their number; the gradient is that of the
                first half.

        Raises:
            ModelError: The metric does not depend on the stream, or the model has no backward.
        """
        with differentiable(self.model.model):
            halved = contextlib.nullcontext() if rows is None else first_rows(self.model, rows)
            with attached(self._inner, {}) as inside, halved:
                run = forward(self.model, inputs, metric, self._sites, begin)
            halves = [slice(None)] if rows is None else [slice(rows), slice(rows, None)]
            parts = [measured(run, metric, half) for half in halves]
            last = Site("resid_post", self.graph.n_layers - 1).name
            (end,) = pulled(self.model, run, metric, parts[0], [run.values[last]])
        if end is None:
            raise ModelError(f"the metric {metric.name} does not depend on {last}")
        return Slope(torch.cat(parts).detach(), end, {**run.values, **inside.values})

    def differences(
        self, batch: Batch, base: Mapping[str, Tensor], source: Mapping[str, Tensor]
    ) -> Differences:
        """What the senders add in the source run less in the base run."""
        return Differences(self.model, self.graph, batch, self.first, base, source)

    @property
    def _sites(self) -> list[Site]:
        """What the forward pass must read."""
        sites = [*sender_sites(self.graph.senders), Site("resid_post", self.graph.n_layers - 1)]
        for layer in range(self.graph.n_layers):
            kinds = ["resid_pre", "q", "k", "v", "attn_out"]
            if self.graph.has_mlp[layer]:
                kinds += ["mlp_out"] if self.graph.parallel[layer] else ["resid_mid", "mlp_out"]
            sites += [Site(kind, layer) for kind in kinds]
        return list(dict.fromkeys(sites))

    @property
    def _inner(self) -> Reads:
        """Projections' inputs and norms' outputs."""
        reads: dict[Site, Any] = {}
        for layer, module in self._projections.items():
            reads[_named_inside("projection", layer)] = Place(module, "in"), None
            for number, norm in enumerate(self._norms[layer]):
                reads[_named_inside("norm", layer, number)] = Place(norm, "out"), None
        return reads

    def back(self, slope: Slope, weight: float, rows: int) -> Iterator[Arrived]:
        """From the last block to the first, what arrives at some receivers at a time.

        Args:
            slope: The pass; its values are emptied on the way.
            weight: What its gradients are multiplied by.
            rows: How many of its rows count; the gradient of further ones is zero.
        """
        graph, values = self.graph, slope.values
        end = weight * slope.end.to(torch.promote_types(slope.end.dtype, torch.float32))
        own = slice(rows), slice(self.first, None)
        yield self._named(Node("logits"), end[own][None])
        for layer in reversed(range(graph.n_layers)):
            stream, out = (values.pop(Site(kind, layer).name) for kind in ("resid_pre", "attn_out"))
            middle = end
            if graph.has_mlp[layer]:
                mlp = values.pop(Site("mlp_out", layer).name)
                reads = stream if graph.parallel[layer] else values.pop(Site("resid_mid", layer).name)
                (into,) = torch.autograd.grad([mlp], [reads], [end.to(mlp.dtype)])
                yield self._named(Node("mlp", layer, port="in"), into[own][None])
                end = end + into
                middle = middle if graph.parallel[layer] else end
            heads = [values.pop(Site(port, layer).name) for port in "qkv"]
            gradients = torch.autograd.grad([out], heads, [middle.to(out.dtype)], retain_graph=True)
            normed, norm = self._before_projections(layer, values)
            ports = _Ports(self.model, layer, heads, gradients, stream, normed, norm, own)
            total, number = torch.zeros_like(end), graph.receiver_number(Node("head", layer, 0, "q"))
            for first, part in ports.pulled_back(2 * graph.n_heads):
                total[own] += part.to(total).sum(0)
                yield self._named(graph.receivers[number + first], part)
            end = end + total

    def _named(self, first: Node, gradient: Tensor) -> Arrived:
        return self.graph.receiver_number(first), self.graph.before(first), gradient.detach()

    def _before_projections(
        self, layer: int, values: dict[str, Tensor]
    ) -> tuple[Tensor | None, nn.Module | None]:
        """What the projections take, and the norm that gave it; both emptied from `values`."""
        normed = values.pop(_named_inside("projection", layer).name, None)
        found = None
        for number, norm in enumerate(self._norms.get(layer, ())):
            given = values.pop(_named_inside("norm", layer, number).name)
            found = norm if given is normed else found
        return normed, found


@dataclass
class _Ports:
    """Queries, keys and values of a block's heads, one after the other.

    Attributes:
        heads, gradients: Of each of the three, `[rows, pos, heads, d_head]`.
        stream: What enters the block, `[rows, pos, d]`.
        normed: What the projections take; None if they cannot be told.
        norm: The module that makes it of the stream, if it is known.
        own: Rows and positions that count.
    """

    model: HookedModel
    layer: int
    heads: Sequence[Tensor]
    gradients: Sequence[Tensor]
    stream: Tensor
    normed: Tensor | None
    norm: nn.Module | None
    own: tuple[slice, slice]

    def pulled_back(self, most: int) -> Iterator[tuple[int, Tensor]]:
        """Gradients at the stream of some heads, `[heads, b, p, d]`, each with the first one's number."""
        counts = [gradient.shape[2] for gradient in self.gradients]
        step = together(4 * self.stream[self.own].numel(), min(most, sum(counts)))
        for first in range(0, sum(counts), step):
            heads = range(sum(counts))[first : first + step]
            if self.normed is None:
                yield first, self._by_autograd(heads, counts)
            else:
                yield first, self._through_norm(self._at_projections(heads, counts), self.normed)

    def _at_projections(self, heads: range, counts: Sequence[int]) -> Tensor:
        """Through each head's own rows of its projection: gradients at what the projections take."""
        found = []
        for port, part in _parts(heads, counts):
            gradient = self.gradients[port][self.own][:, :, part]
            rows = gradient.flatten(0, 1).transpose(0, 1)
            product = torch.bmm(rows, self._weights[port][part].to(rows))
            found.append(product.unflatten(1, gradient.shape[:2]))
        return found[0] if len(found) == 1 else torch.cat(found)

    @cached_property
    def _weights(self) -> list[Tensor]:
        """Of each port `[heads, d_head, d]`."""
        found, taken = [], self.stream if self.normed is None else self.normed
        for port in "qkv":
            place = self.model.place(Site(port, self.layer))
            matrix, _ = linear_map(place.module, taken.shape[-1], taken.dtype, taken.device)
            found.append(place.view.read(matrix).permute(1, 2, 0))
        return found

    def _through_norm(self, into: Tensor, normed: Tensor) -> Tensor:
        """From what the projections take to the stream."""
        if normed is self.stream:
            return into
        if self._alone is not None:
            # The norm anew, on the tokens that count, once for each head: its own backward takes them all.
            with torch.enable_grad():
                stream = self.stream.detach()[self.own].expand_as(into).flatten(0, 1).requires_grad_()
                anew = self._alone(stream)
            return torch.autograd.grad(anew, stream, into.flatten(0, 1))[0].view_as(into)
        whole = into.new_zeros(len(into), *normed.shape)
        whole[:, *self.own] = into
        (back,) = torch.autograd.grad(normed, self.stream, whole, retain_graph=True, is_grads_batched=True)
        return back[:, *self.own]

    @cached_property
    def _alone(self) -> nn.Module | None:
        """The norm, if it gives the same for the tokens that count alone."""
        if self.norm is None or self.normed is None:
            return None
        with torch.no_grad():
            apart = (self.norm(self.stream[self.own]) - self.normed[self.own]).abs().max()
            return self.norm if bool(apart <= 1e-3 * self.normed.abs().max()) else None

    def _by_autograd(self, heads: range, counts: Sequence[int]) -> Tensor:
        """From each head alone to the stream."""
        found = []
        for port, part in _parts(heads, counts):
            gradient, value = self.gradients[port], self.heads[port]
            alone = gradient.new_zeros(part.stop - part.start, *gradient.shape)
            for at, head in enumerate(range(part.start, part.stop)):
                alone[at, :, :, head] = gradient[:, :, head]
            (back,) = torch.autograd.grad(value, self.stream, alone, retain_graph=True, is_grads_batched=True)
            found.append(back[:, *self.own])
        return torch.cat(found)


def _parts(heads: range, counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Which heads of which port some of all heads are."""
    start = 0
    for port, count in enumerate(counts):
        first, last = max(heads.start, start), min(heads.stop, start + count)
        if first < last:
            yield port, slice(first - start, last - start)
        start += count


def _inside(model: HookedModel) -> tuple[dict[int, nn.Module], dict[int, list[nn.Module]]]:
    """Each layer's query projection, and the norms right within its block; none in TransformerLens."""
    if model.architecture.model_type in ("HookedTransformer", "TransformerBridge"):
        return {}, {}
    layers = range(model.n_layers)
    projections = {layer: model.place(Site("q", layer)).module for layer in layers}
    norms = {
        layer: [part for part in model.architecture.blocks[layer].children() if _is_norm(part)]
        for layer in layers
    }
    return projections, norms


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _named_inside(what: str, layer: int, number: int = 0) -> Site:
    return Site(RAW, path=f"{what}.{layer}.{number}:out")
