"""Runs of a model in which chosen edges carry what their sender wrote in another run.

Several variants run at once, as copies of the examples side by side. In each, a receiver's input is the
residual stream as it is in that run, plus, for each of its patched edges, the sender's contribution in the
other run less its contribution in this one (`rewired_pass`). Blocks below the first changed input are not
run again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.interventions.blockwise import noted
from veridical.interventions.condition import carries_hooks
from veridical.interventions.contributions import output_projection, sender_site, sender_sites
from veridical.interventions.graph import Graph, Node
from veridical.interventions.rewired_pass import Pass, Variant, exact, layer_of
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.interventions.metrics import Metric

CHANGES = 1 << 28
"""Numbers held at most for what senders change, in the variants of one forward."""


class Rewiring:
    """A base run, another run of the same rows, and the runs between the two.

    Attributes:
        model: The model.
        graph: Its nodes and edges.
        metric: For all rows of the batch.
        at: `[batch, pos]` bool, positions of the base run at which an edge carries the other run.
        base_metric, other_metric: `[batch]`, the metric of the two runs.
        base, other: Activations of the two runs by site, at the positions of the base run.
    """

    def __init__(
        self,
        model: HookedModel,
        graph: Graph,
        base: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        at: Tensor,
        partner: Tensor,
        metric: Metric,
        batch_tokens: int = 8192,
    ) -> None:
        """
        Args:
            model: The model.
            graph: Its nodes and edges.
            base: Inputs of the base run, `[batch, ...]` each.
            other: Inputs of the other run.
            at: `[batch, pos]` bool.
            partner: `[batch, pos]` int64, the position of the other run for each of the base run.
            metric: For all rows of the batch.
            batch_tokens: Tokens in one forward, over all variants that run together.
        """
        self.model, self.graph, self.metric, self.at = model, graph, metric, at
        # A user's hooks may tell rows and blocks apart: then each variant has a whole forward of its own.
        self.plain = carries_hooks(model)
        self.batch_tokens = 0 if self.plain else batch_tokens
        self.inputs, self.rows = dict(base), len(at)
        self.last = Site("resid_post", model.n_layers - 1)
        self.metric_site = model.resolve(metric.site)[0] if metric.site is not None else None
        ports = [Site(kind, layer) for layer in range(model.n_layers) for kind in "qkv"]
        sent = sender_sites(graph.senders)
        # What enters each block, and the form of what it returns: for passes that begin further up.
        self.streams = [Site("resid_pre", layer) for layer in range(model.n_layers)]
        with noted(model.architecture.blocks) as self.outputs:
            self.base_metric, self.base = self._recorded(base, [*sent, *self.streams])
        self.other_metric, found = self._recorded(other, [*sent, *ports, self.last])
        if not bool((partner == torch.arange(at.shape[1], device=partner.device))[at].all()):
            index = torch.arange(self.rows, device=partner.device)[:, None], partner.clamp(min=0)
            found = {site: value[index] for site, value in found.items()}
        self.other = found
        self._weights: dict[int, Tensor] = {}
        self._plain: dict[Node, Tensor] = {}

    def measure(self, variants: Sequence[Variant], tick: Callable[[int], object] | None = None) -> Tensor:
        """The metric of each variant, `[variants, batch]`; `tick` is told how many more are done.

        Those whose first receiver is in the same layer run together, as many as `batch_tokens` allows.
        """
        values = torch.empty(len(variants), self.rows, dtype=self.base_metric.dtype, device=self.at.device)
        for part in self._together(variants):
            rows = torch.arange(self.rows).repeat(len(part))
            seen = Pass(self, [variants[i] for i in part]).run()
            values[part] = self.metric.take(rows, self.rows)(seen).unflatten(0, (len(part), self.rows))
            if tick is not None:
                tick(len(part))
        return values

    def _together(self, variants: Sequence[Variant]) -> Iterator[list[int]]:
        """Numbers of the variants that run as one batch."""
        by_layer: dict[int, list[int]] = defaultdict(list)
        for i, variant in enumerate(variants):
            by_layer[min((layer_of(n, self.model) for n in variant.receivers), default=0)].append(i)
        width = math.prod(self.base[Site("resid_pre", 0)].shape)
        for _, numbers in sorted(by_layer.items()):
            senders = max(len(frozenset[Node]().union(*variants[i].edges.values())) for i in numbers)
            most = min(self.batch_tokens // self.at.numel(), CHANGES // (width * max(1, senders)))
            for first in range(0, len(numbers), max(1, most)):
                yield numbers[first : first + max(1, most)]

    def sent(self, nodes: Sequence[Node], variants: Sequence[Variant]) -> list[Tensor]:
        """How much each variant changes what one sender writes, `[batch, pos, d]` beside the base run.

        Args:
            nodes: The sender of each variant; all are read at one site.
            variants: Each changes inputs of that sender, and nothing else.
        """
        (site,) = sender_sites(nodes)
        most, made = max(1, self.batch_tokens // self.at.numel()), []
        for first in range(0, len(nodes), most):
            part = variants[first : first + most]
            values = Pass(self, part, until=site).run().unflatten(0, (len(part), self.rows))
            made += [
                self._written(node, value, self.base[site])
                for node, value in zip(nodes[first : first + most], values)
            ]
        return made

    def difference(self, sender: Node, now: Tensor | None = None) -> Tensor:
        """What a sender writes in the other run less what it writes in the base run, or at the value `now`
        `[variants, batch, ...]` of its site; 0 off the patched positions. `[variants or 1, batch, pos, d]`.
        """
        if now is None and sender in self._plain:
            return self._plain[sender]
        site = sender_site(sender)
        present = self.base[site][None] if now is None else now
        made = self._written(sender, self.other[site], present).masked_fill(~self.at[..., None], 0)
        if now is None:
            self._plain[sender] = made
        return made

    def _written(self, sender: Node, value: Tensor, less: Tensor) -> Tensor:
        """What `sender` adds to the stream at `value` of its site, less what it adds at `less`."""
        if sender.kind != "head" or sender.layer is None:
            return exact(value) - exact(less)
        if sender.layer not in self._weights:
            self._weights[sender.layer] = exact(output_projection(self.model, sender.layer)[0])
        change = exact(value[..., sender.head, :]) - exact(less[..., sender.head, :])
        return change @ self._weights[sender.layer][sender.head]

    def _recorded(
        self, inputs: Mapping[str, Tensor], sites: Sequence[Site]
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        wanted = [*dict.fromkeys(sites), *([self.metric_site] if self.metric_site is not None else [])]
        run = self.model.run(self.trimmed(inputs), read=wanted)
        seen = self.kept(run.logits) if self.metric_site is None else run[self.metric_site][:, -1].flatten(1)
        return self.metric(seen), {site: run[site] for site in sites}

    def trimmed(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Inputs of a run that computes only the logits that the metric reads."""
        made: dict[str, Any] = dict(inputs)
        if self.metric.keep is not None and "logits_to_keep" in self.model.forward_parameters:
            made["logits_to_keep"] = self.metric.keep
        return made

    def kept(self, logits: Tensor) -> Tensor:
        """Logits at the positions that the metric reads."""
        whole = self.metric.keep is None or logits.dim() == 2
        return logits if whole else logits[:, -self.metric.keep :]  # type: ignore[operator]

    def entry(self, layer: int) -> Site:
        """Where an MLP reads the stream: in mid-block, or where it runs beside attention, before it."""
        return Site("resid_pre" if self.graph.parallel[layer] else "resid_mid", layer)
