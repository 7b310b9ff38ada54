"""The slow, obvious reference of edge and path patching: one receiver at a time, by plain runs."""

import torch

from veridical.interventions.graph import Graph
from veridical.sites import Site

CLEAN, CORRUPT = [[5, 9, 17, 40, 77], [6, 61, 18]], [[5, 19, 27, 140, 7], [6, 65, 118]]


def metric(logits):
    return (logits[:, -1] if logits.dim() == 3 else logits)[:, :40].square().sum(-1)


class Slow:
    """Edges of one model between two batches of equal shape, each value found by a full run of its own."""

    def __init__(self, model, base, other, at=None, partner=None):
        self.model, self.graph = model, Graph.of(model)
        self.base, self.inputs = self.contributions(base, {}), base
        self.other = self.contributions(other, {})
        if partner is not None:  # for each position of the base, the other run's
            index = torch.arange(len(partner))[:, None], partner.clamp(min=0)
            self.other = {node: value[index] for node, value in self.other.items()}
        first = next(iter(self.other.values()))
        self.at = torch.ones(first.shape[:2], dtype=torch.bool) if at is None else at

    def contributions(self, inputs, write):
        """What every sender adds to the stream, `[batch, pos, d]`."""
        run = self.model.run(inputs, read="resid_pre.0, z.*, attn_out.*, mlp_out.*", write=write)
        found = {}
        for node in self.graph.senders:
            if node.kind == "embed":
                found[node] = run["resid_pre.0"]
            elif node.kind == "head":
                z = run[f"z.{node.layer}"]
                alone = torch.zeros_like(z)
                alone[:, :, node.head] = z[:, :, node.head]
                found[node] = self.project(node.layer, alone) - self.project(node.layer, torch.zeros_like(z))
            else:
                found[node] = run[f"{node.kind}_out.{node.layer}"]
        return found

    def project(self, layer, z):
        """The output projection of a layer, of all heads side by side."""
        return self.model.place(Site("z", layer)).module(z.flatten(-2))

    def edges(self, patched):
        """Logits with the edges in `patched` carrying the other run, receiver by receiver in causal order."""
        forced, final = {}, None
        for receiver in sorted(self.graph.receivers, key=self.graph.before):
            senders = [s for s in self.graph.senders_of(receiver) if f"{s.name}->{receiver.name}" in patched]
            if not senders:
                continue
            now = self.contributions(self.inputs, self.writes(forced))
            change = sum(self.other[s] - now[s] for s in senders) * self.at[..., None]
            if receiver.kind == "logits":
                final = change
                continue
            self.force(forced, receiver, self.received(receiver, change, self.writes(forced)))
        writes = self.writes(forced)
        if final is not None:
            last = Site("resid_post", self.model.n_layers - 1)
            writes[last] = lambda value: value + final
        return self.model.run(self.inputs, write=writes).logits

    def received(self, receiver, change, writes=None):
        """The query, key or value of a head, or the output of an MLP, whose input has `change` added."""
        layer = receiver.layer
        middle = receiver.kind == "mlp" and not self.graph.parallel[layer]
        site = Site("mlp_out" if receiver.kind == "mlp" else receiver.port, layer)
        edit = {Site("resid_mid" if middle else "resid_pre", layer): lambda value: value + change}
        kept = {s: w for s, w in (writes or {}).items() if s not in edit and s != site}
        value = self.model.run(self.inputs, read=[site], write={**kept, **edit}, stop=True)[site]
        return value if receiver.kind == "mlp" else value[:, :, receiver.head]

    def force(self, forced, receiver, value):
        site = Site("mlp_out" if receiver.kind == "mlp" else receiver.port, receiver.layer)
        forced.setdefault(site, {})[receiver.head] = value

    def writes(self, forced):
        def edit(values):
            def put(value):
                for head, new in values.items():
                    if head is None:
                        value = new.clone()
                    else:
                        value[:, :, head] = new
                return value

            return put

        return {site: edit(dict(values)) for site, values in forced.items()}

    def path(self, names):
        """Logits with one path: sender, receivers between, and "logits" or a last receiver."""
        change = (self.other[self.graph.sender(names[0])] - self.base[self.graph.sender(names[0])]) * self.at[
            ..., None
        ]
        for place, name in enumerate(names[1:], start=1):
            receiver = self.graph.receiver(name)
            if receiver.kind == "logits":
                last = Site("resid_post", self.model.n_layers - 1)
                return self.model.run(self.inputs, write={last: change.add}).logits
            forced = {}
            self.force(forced, receiver, self.received(receiver, change))
            if place == len(names) - 1:
                return self.model.run(self.inputs, write=self.writes(forced)).logits
            after = self.contributions(self.inputs, self.writes(forced))
            if receiver.kind == "mlp":
                senders = [self.graph.sender(f"mlp.{receiver.layer}")]
            elif self.graph.whole_attention:
                senders = [self.graph.sender(f"attn.{receiver.layer}")]
            else:
                size = 1 if receiver.port == "q" else self.graph.n_heads // self.graph.n_kv_heads
                heads = range(receiver.head * size, (receiver.head + 1) * size)
                senders = [self.graph.sender(f"head.{receiver.layer}.{h}") for h in heads]
            change = sum(after[s] - self.base[s] for s in senders)
        raise AssertionError
