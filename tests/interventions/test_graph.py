"""Senders, receivers and edges of every family, and what each sender adds to the stream."""

import pytest
import torch

import veridical as vd
from lens_models import bridge, hooked_transformer
from tiny_models import TINY, make
from veridical.errors import InputError, ModelError, UnknownNameError
from veridical.interventions.contributions import (
    contribution,
    head_contributions,
    linear_map,
    output_projection,
    sender_sites,
)
from veridical.interventions.graph import Edge, Graph, Node
from veridical.sites import Site

REFUSED = ("bert", "opt_post_norm")
WHOLE = ("gemma2", "gemma3", "olmo2")
FAMILIES = [name for name in TINY if name not in REFUSED]
ROWS = [[5, 9, 17, 40, 77], [6, 61, 18, 44, 250]]


def inputs_of(model):
    return model.dummy_inputs() if model.kind == "vision" else model.batch(ROWS)


@pytest.mark.parametrize("name", FAMILIES)
def test_contributions_add_up_to_the_stream(hooked, name):
    model = hooked(name)
    graph = Graph.of(model)
    last = Site("resid_post", model.n_layers - 1)
    with torch.no_grad():
        run = model.run(inputs_of(model), read=[*sender_sites(graph.senders), last])
        total = sum(contribution(model, sender, run.values) for sender in graph.senders)
        for layer in range(model.n_layers):
            bias = output_projection(model, layer)[1]
            if not graph.whole_attention and bias is not None:
                total = total + bias
    torch.testing.assert_close(total, run[last], rtol=1e-4, atol=1e-4)
    assert graph.whole_attention == (name in WHOLE)


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_of_nodes_and_edges(hooked, name):
    model = hooked(name)
    graph = Graph.of(model)
    layers, heads, kv = model.n_layers, model.n_heads, model.n_kv_heads
    writes = 1 if name in WHOLE else heads
    assert len(graph.senders) == 1 + layers * (writes + 1)
    assert len(graph.receivers) == layers * (heads + 2 * kv + 1) + 1
    edges = 0
    for layer in range(layers):
        earlier = 1 + layer * (writes + 1)
        edges += (heads + 2 * kv) * earlier + earlier + (0 if name == "gpt_neox" else writes)
    edges += len(graph.senders)
    assert len(graph) == len(graph.edges) == edges == int(graph.mask.sum())
    assert all(edge in graph and edge.name in graph for edge in graph.edges)
    assert graph.edges == tuple(graph.edge(edge.name) for edge in graph.edges)


def test_an_edge_reaches_nothing_that_reads_before_it(hooked):
    """Editing a sender's contribution changes exactly the receivers that it has an edge to."""
    for name in ("llama", "gpt_neox", "gemma2"):
        model = hooked(name)
        graph = Graph.of(model)
        reads = {}
        for receiver in graph.receivers:
            kind = "mlp_post" if receiver.port == "in" else receiver.port
            last = Site("resid_post", model.n_layers - 1)
            reads[receiver] = last if kind is None else Site(kind, receiver.layer)
        with torch.no_grad():
            clean = model.run(inputs_of(model), read=list(set(reads.values())))
            for sender in graph.senders:
                (site,) = sender_sites([sender])

                def edit(value, sender=sender):
                    part = value[..., sender.head, :] if sender.kind == "head" else value
                    part += torch.randn(part.shape, generator=torch.Generator().manual_seed(0))
                    return value

                edited = model.run(inputs_of(model), read=list(set(reads.values())), write={site: edit})
                for receiver, read in reads.items():
                    at = slice(None) if receiver.head is None else (..., receiver.head, slice(None))
                    same = torch.equal(clean[read][at], edited[read][at])
                    assert same == (sender not in graph.senders_of(receiver)), (name, sender, receiver)


def test_a_parallel_block_and_a_sequential_one(hooked):
    assert "head.1.0->mlp.1" not in Graph.of(hooked("gpt_neox"))
    sequential = Graph.of(hooked("gpt_neox_sequential"))
    assert "head.1.0->mlp.1" in sequential
    assert "mlp.1->head.1.0:q" not in sequential
    with pytest.raises(InputError, match="in parallel"):
        Graph.of(hooked("gpt_neox")).edge("head.1.0->mlp.1")


def test_names(hooked):
    graph = Graph.of(hooked("llama"))
    edge = graph.edge("head.0.3->head.2.1:k")
    assert edge == Edge(Node("head", 0, 3), Node("head", 2, 1, "k"))
    assert str(edge) == "head.0.3->head.2.1:k"
    assert graph.edge("mlp.-1->logits").name == "mlp.2->logits"
    assert graph.edge(" embed -> mlp.0 ").receiver.name == "mlp.0:in"
    assert graph.senders_of("head.0.1:v") == (Node("embed"),)
    assert Edge(Node("head", 9, 9), Node("logits")) not in graph
    assert 3 not in graph


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("head.0.3", "expected sender->receiver"),
        ("head.0.9->logits", r"unknown sender 'head.0.9'; nearest: .*There are heads 0 to 3"),
        ("head.0.0->head.1.2:k", r"unknown receiver 'head.1.2:k'.*2 heads \(0 to 1\), each shared by 2"),
        ("head.0.0->head.1.2", r"unknown receiver.*reads by :q, :k or :v"),
        ("mpl.0->logits", r"unknown sender 'mpl.0'; nearest: mlp.0"),
        ("head.1.0->head.1.2:q", r"reads the stream before head.1.0 writes"),
    ],
)
def test_what_is_no_edge(hooked, text, said):
    graph = Graph.of(hooked("llama"))
    assert text not in graph
    with pytest.raises(InputError, match=said) as raised:
        graph.edge(text)
    assert "\n" not in str(raised.value)


def test_senders_behind_a_norm_are_whole_layers(hooked):
    with pytest.raises(UnknownNameError, match=r"whole layers, attn\.L"):
        Graph.of(hooked("gemma2")).sender("head.0.1")


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_add_up_are_refused(hooked, name):
    with pytest.raises(ModelError, match="not the sum of its parts"):
        Graph.of(hooked(name))


class LowRank(torch.nn.Linear):
    """A projection with a low-rank update beside its weight, as adapters put it there."""

    def forward(self, x):
        down = torch.linspace(-1, 1, self.in_features, dtype=x.dtype)
        return super().forward(x) + (x @ down)[..., None] * torch.ones(self.out_features, dtype=x.dtype)


def test_a_projection_with_an_adapter_is_taken_as_it_acts():
    module = make("qwen2").double()
    for layer in module.model.layers:
        plain = layer.self_attn.o_proj
        layer.self_attn.o_proj = LowRank(32, 32, bias=False, dtype=torch.float64)
        layer.self_attn.o_proj.weight = plain.weight
    model = vd.load(module)
    with torch.no_grad():
        run = model.run(model.batch(ROWS), read=["z.1", "attn_out.1"])
        found = head_contributions(model, 1, run["z.1"]).sum(2)
    torch.testing.assert_close(found, run["attn_out.1"], rtol=1e-12, atol=1e-12)
    assert len(Graph.of(model).senders) == 1 + 3 * 5


def test_an_unknown_linear_module_is_taken_as_it_acts():
    linear = torch.nn.Linear(6, 3)
    weight, bias = linear_map(torch.nn.Sequential(linear), 6, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(weight, linear.weight.detach().T)
    torch.testing.assert_close(bias, linear.bias.detach())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("build", [bridge, hooked_transformer])
def test_transformer_lens_models(hooked, tokenizer, tmp_path, name, build):
    model = vd.load(build(name, tokenizer, tmp_path))
    graph, plain = Graph.of(model), Graph.of(hooked(name))
    assert (graph.senders, graph.receivers, graph.edges) == (plain.senders, plain.receivers, plain.edges)
    for layer in range(3):
        found, expected = output_projection(model, layer)[0], output_projection(hooked(name), layer)[0]
        torch.testing.assert_close(found, expected)
