"""Edge attribution against the derivative of the exact edge patch, in float64, for every family."""

import numpy as np
import pytest
import torch
from float64 import Float64, exact

import veridical as vd
from lens_models import bridge, hooked_transformer
from tiny_models import TINY, make
from veridical.errors import InputError, ModelError, NonFiniteError, UnknownNameError
from veridical.interventions import attribute, backward, edges
from veridical.interventions.attribution import Attribution
from veridical.interventions.contributions import contribution, sender_site, sender_sites
from veridical.interventions.graph import Graph
from veridical.interventions.inputs import Inputs
from veridical.sites import Site

FAMILIES = [name for name in TINY if name not in ("bert", "opt_post_norm")]
CLEAN = [[5, 9, 17, 40, 77, 120], [6, 61, 18, 44]]
CORRUPT = [[5, 88, 17, 41, 77, 120], [6, 3, 210, 44]]
STEP = 1e-4


def difference(logits):
    last = logits if logits.dim() == 2 else logits[:, -1]
    return (last[:, 1] - last[:, 2]).tanh() + last[:, 0] ** 2


@pytest.fixture
def in_float64():
    with Float64():
        yield


def runs_of(model):
    if model.kind != "vision":
        return CLEAN, CORRUPT
    images = torch.randn(2, 2, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return images[0], images[1]


class ExactPatch:
    """One edge moved by a part of the way, in the plainest manner: the receiver alone sees another stream."""

    def __init__(self, model, base, source):
        self.model, self.base = model, base
        self.graph = Graph.of(model)
        reads = sender_sites(self.graph.senders)
        reads += [
            Site(kind, n) for n in range(model.n_layers) for kind in ("resid_pre", "resid_post", "resid_mid")
        ]
        reads = [site for site in reads if site in model.architecture.places]
        self.values = model.run(base, read=reads).values
        theirs = model.run(source, read=reads).values
        self.change = {
            sender: contribution(model, sender, theirs) - contribution(model, sender, self.values)
            for sender in self.graph.senders
        }

    def metric(self, edge, strength):
        model, receiver = self.model, edge.receiver
        moved = strength * self.change[edge.sender]
        if receiver.kind == "logits":
            site = Site("resid_post", model.n_layers - 1)
            return self.judged({site: lambda value: value + moved})
        kind = "resid_pre" if receiver.kind == "head" or self.graph.parallel[receiver.layer] else "resid_mid"
        stream, out = Site(kind, receiver.layer), Site(receiver.port, receiver.layer)
        out = Site("mlp_out", receiver.layer) if receiver.kind == "mlp" else out
        seen = model.run(
            self.base, read=[out], write={stream: lambda value: self.values[stream.name] + moved}, stop=True
        )[out]

        def put(value):
            if receiver.head is None:
                return seen
            value[:, :, receiver.head] = seen[:, :, receiver.head]
            return value

        return self.judged({out: put})

    def judged(self, write):
        return difference(self.model.run(self.base, write=write).logits)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_the_derivatives_of_exact_edge_patches(name):
    model = exact(name)
    clean, corrupt = runs_of(model)
    found = attribute(model, clean, corrupt, metric=difference, method="edges")
    inputs = Inputs.of(model, clean, corrupt)
    with torch.no_grad():
        patch = ExactPatch(model, inputs.corrupt, inputs.clean)
        for change in patch.change.values():
            change.masked_fill_(~inputs.mask[..., None], 0)
        for number, receiver in enumerate(patch.graph.receivers):
            senders = patch.graph.senders_of(receiver)
            edge = patch.graph.edge(f"{senders[number % len(senders)]}->{receiver}")
            slope = (patch.metric(edge, STEP) - patch.metric(edge, -STEP)) / (2 * STEP)
            np.testing.assert_allclose(found[edge.name], slope, rtol=2e-5, atol=1e-7, err_msg=edge.name)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", FAMILIES)
def test_edges_out_of_a_sender_add_up_to_its_own_score(name):
    """By the chain rule: all that a sender does, it does through its edges."""
    model = exact(name)
    clean, corrupt = runs_of(model)
    found = attribute(model, clean, corrupt, metric=difference, method="edges")
    graph = Graph.of(model)
    sites = [site.short for site in sender_sites(graph.senders)]
    nodes = attribute(model, clean, corrupt, metric=difference, method="atp", sites=sites)
    out = np.nansum(found.edge_scores, axis=2)
    for number, sender in enumerate(graph.senders):
        scores = np.nansum(nodes[sender_site(sender).short], axis=1)
        expected = scores[:, sender.head] if sender.kind == "head" else scores
        np.testing.assert_allclose(out[:, number], expected, rtol=1e-9, atol=1e-12, err_msg=sender.name)
    np.testing.assert_array_equal(np.isfinite(found.edge_scores[0]), graph.mask)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_small_chunks_give_the_same(name, monkeypatch):
    model = exact(name)
    whole = attribute(model, CLEAN, CORRUPT, metric=difference, method="edges").edge_scores
    monkeypatch.setattr(backward, "CHUNK", 1)
    one = attribute(model, CLEAN, CORRUPT, metric=difference, method="edges").edge_scores
    monkeypatch.setattr(backward, "CHUNK", 12 * 32 * 3 * 4)
    three = attribute(model, CLEAN, CORRUPT, metric=difference, method="edges").edge_scores
    np.testing.assert_allclose(one, whole, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(three, whole, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("by_position", [False, True])
def test_one_pass_for_both_runs_and_the_common_beginning_left_out_give_the_same(
    name, by_position, monkeypatch
):
    """Against two passes over every position, which a model with a hook on it gets."""
    model = exact(name)
    given = {"metric": difference, "method": "edges", "by_position": by_position}
    clean, corrupt = runs_of(model)
    if model.kind == "causal":
        clean, corrupt = [row[:] for row in clean], [row[:] for row in corrupt]
        corrupt[0][1] = clean[0][1]  # the first difference is at the third token of each row
        corrupt[1][0], corrupt[1][1] = clean[1][0], 3
    joined = attribute(model, clean, corrupt, **given)
    monkeypatch.setattr(edges, "JOINED", 0)
    apart = attribute(model, clean, corrupt, **given)
    handle = model.architecture.blocks[0].register_forward_hook(lambda *_: None)
    try:
        whole = attribute(model, clean, corrupt, **given)
    finally:
        handle.remove()
    for found in (joined, apart):
        np.testing.assert_allclose(found.edge_scores, whole.edge_scores, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.source_metric, whole.source_metric, rtol=1e-12)


@pytest.mark.usefixtures("in_float64")
def test_positions_apart_add_up_and_padding_is_absent():
    model = exact("llama")
    whole = attribute(model, CLEAN, CORRUPT, metric=difference, method="edges")
    apart = attribute(model, CLEAN, CORRUPT, metric=difference, method="edges", by_position=True)
    np.testing.assert_allclose(np.nansum(apart.edge_scores, 1), np.nan_to_num(whole.edge_scores), atol=1e-13)
    assert np.isnan(apart.edge_scores[1, :2]).all()
    assert "position" in apart.to_frame()
    assert len(apart.to_frame()) == 6 * len(Graph.of(model))


@pytest.mark.usefixtures("in_float64")
def test_examples_do_not_depend_on_their_batch():
    model = exact("qwen2")
    metric = {"metric": "logit_diff", "answers": [7, 9], "wrong": [8, 11], "method": "edges"}
    together = attribute(model, CLEAN, CORRUPT, **metric)
    split = attribute(model, CLEAN, CORRUPT, batch_tokens=1, **metric)
    alone = attribute(model, CLEAN[1:], CORRUPT[1:], **{**metric, "answers": 9, "wrong": 11})
    np.testing.assert_allclose(together.edge_scores, split.edge_scores, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(together.edge_scores[1], alone.edge_scores[0], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("in_float64")
def test_noising_is_the_reverse():
    model = exact("gpt2")
    one = attribute(model, CLEAN, CORRUPT, metric=difference, method="edges", direction="noising")
    other = attribute(model, CORRUPT, CLEAN, metric=difference, method="edges")
    np.testing.assert_array_equal(one.edge_scores, other.edge_scores)


def test_half_precision_is_scored_in_float32():
    model = vd.load(make("llama").to(torch.bfloat16))
    found = attribute(model, CLEAN, CORRUPT, metric=difference, method="edges")
    with Float64():
        expected = attribute(exact("llama"), CLEAN, CORRUPT, metric=difference, method="edges")
    assert found.edge_scores.dtype == np.float32
    a, b = np.nan_to_num(found.edge_scores).ravel(), np.nan_to_num(expected.edge_scores).ravel()
    assert np.corrcoef(a, b)[0, 1] > 0.98


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("build", [bridge, hooked_transformer])
def test_transformer_lens_models(hooked, tokenizer, tmp_path, name, build):
    model = vd.load(build(name, tokenizer, tmp_path))
    found = attribute(model, CLEAN, CORRUPT, metric=difference, method="edges")
    expected = attribute(hooked(name), CLEAN, CORRUPT, metric=difference, method="edges")
    np.testing.assert_allclose(found.edge_scores, expected.edge_scores, rtol=1e-3, atol=2e-4)


@pytest.mark.usefixtures("in_float64")
def test_some_edges():
    model = exact("llama")
    whole = attribute(model, CLEAN, CORRUPT, metric=difference, method="edges")
    some = attribute(
        model, CLEAN, CORRUPT, metric=difference, method="edges", edges=["head.*->logits", "mlp.0->mlp.1"]
    )
    table = some.to_frame()
    assert len(table) == 12 + 1
    for name, score in zip(table["edge"], table["score"]):
        assert score == pytest.approx(whole[name].mean(), abs=1e-12)
    assert set(table["receiver"]) == {"logits", "mlp.1:in"}


@pytest.mark.usefixtures("in_float64")
def test_a_result_keeps_itself(tmp_path):
    model = exact("gpt2")
    found = attribute(model, CLEAN, CORRUPT, metric=difference, method="edges")
    loaded = Attribution.load(found.save(tmp_path / "edges"))
    np.testing.assert_array_equal(loaded.edge_scores, found.edge_scores)
    assert loaded.top(5).equals(found.top(5))
    top = found.top(5)
    assert list(top["score"].abs()) == sorted(top["score"].abs(), reverse=True)
    assert len(found.figure().data) == 1
    assert len(found.matrix().data[0].z) == len(found.senders)
    assert found.report_section().headline[0][1] == top["edge"][0]
    assert top["edge"][0].replace(">", "&gt;") in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"edges": "head.0.0"}, "expected sender->receiver"),
        ({"edges": "head.0.9->logits"}, "unknown sender 'head.0.9'"),
        ({"edges": "head.0.0->logit"}, "unknown receiver 'logit'; nearest: logits"),
        ({"edges": "mlp.2->mlp.0"}, "read the stream before"),
        ({"sites": "embed"}, "choose with edges="),
        ({"corrupt": None}, "give corrupt="),
        ({"metric": "rank", "answers": 3}, "has no gradient"),
    ],
)
def test_what_is_refused(hooked, options, said):
    given = {"corrupt": CORRUPT, "metric": difference, "method": "edges", **options}
    with pytest.raises(InputError, match=said) as raised:
        attribute(hooked("llama"), CLEAN, **given)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("in_float64")
def test_a_model_whose_parts_do_not_add_up_is_refused():
    with pytest.raises(ModelError, match="not the sum of its parts"):
        attribute(exact("bert"), CLEAN, CORRUPT, metric=difference, method="edges")


@pytest.mark.usefixtures("in_float64")
def test_names_that_were_not_scored():
    found = attribute(exact("gpt2"), CLEAN, CORRUPT, metric=difference, method="edges")
    with pytest.raises(UnknownNameError, match="unknown receiver"):
        found["mlp.0->mlp.9:in"]


@pytest.mark.usefixtures("in_float64")
def test_nan_is_an_error():
    model = exact("gpt2")
    with torch.no_grad():
        model.model.transformer.h[1].mlp.c_proj.bias[3] = float("nan")
    with pytest.raises((NonFiniteError, ModelError)):
        attribute(model, CLEAN, CORRUPT, metric=difference, method="edges")


@pytest.mark.parametrize("tokens", [1, 16, 128, 4096])
def test_memory_is_under_a_tenth_of_storing_both_sides(tokens):
    stored, here = edges.sizes(tokens, layers=32, heads=32, kv_heads=32, d_model=4096, d_head=128)
    assert stored == 4162 * tokens * 4096
    assert here < stored / 10
    assert here >= 65 * tokens * 4096


@pytest.mark.usefixtures("in_float64")
def test_what_is_held_is_what_the_formula_says(monkeypatch):
    """The largest set of tensors held by differences and by one step of the walk."""
    model = exact("llama")
    graph = Graph.of(model)
    held = []
    plain = edges._contract

    def watched(differences, arrived, scores):
        kept = [*differences.plain.values(), *(z for _, z in differences.heads.values())]
        blocks = max(block.numel() for _, block in differences.blocks(len(graph.senders)))
        held.append(sum(tensor.numel() for tensor in kept) + blocks + arrived[2].numel())
        plain(differences, arrived, scores)

    monkeypatch.setattr(edges, "_contract", watched)
    monkeypatch.setattr(backward, "CHUNK", 1)
    attribute(model, CLEAN, CORRUPT, metric=difference, method="edges")
    _, here = edges.sizes(12, model.n_layers, model.n_heads, model.n_kv_heads, model.d_model, model.d_head)
    assert max(held) <= here


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt_neox", "gemma2"])
def test_integrated_edges_out_of_the_embedding_add_up_to_integrated_gradients(family, in_float64):
    """All that reads the embedding, together, is the stream at the first block; so edges out of it share out
    what integrated gradients give there, which is the metric's whole difference but for the rule's error."""
    model = vd.load(make(family).double(), check=False)
    given = {"metric": difference, "steps": 6}
    found = attribute(model, CLEAN[0], CORRUPT[0], method="edges_ig", **given)
    whole = attribute(model, CLEAN[0], CORRUPT[0], method="ig", sites="resid_pre.0", **given)
    added = np.nansum(found.edge_scores[:, found.senders.index("embed")], axis=-1)
    np.testing.assert_allclose(added, whole.totals["resid_pre.0"], rtol=1e-9)
    gap = added - (found.source_metric - found.base_metric)
    linear = attribute(model, CLEAN[0], CORRUPT[0], metric=difference, method="edges")
    off = np.nansum(linear.edge_scores[:, 0], axis=-1) - (found.source_metric - found.base_metric)
    assert np.abs(gap) < 0.3 * np.abs(off)


def test_one_step_in_the_middle_is_the_gradient_there(in_float64):
    """A rule of one node takes the gradient half way; by hand, from hooks, for the edges into the logits."""
    model = vd.load(make("gpt2").double(), check=False)
    found = attribute(model, CLEAN[0], CORRUPT[0], metric=difference, method="edges_ig", steps=1)
    inputs = Inputs.of(model, CLEAN[0], CORRUPT[0])
    sites = [Site("resid_pre", 0), *sender_sites(Graph.of(model).senders)]
    base, source = (
        model.run(side, read=list(dict.fromkeys(sites))) for side in (inputs.corrupt, inputs.clean)
    )
    middle = (base[Site("resid_pre", 0)] + source[Site("resid_pre", 0)]).detach() / 2
    end = Site("resid_post", model.n_layers - 1)
    run = model.run(
        inputs.corrupt, read=[end], write={Site("resid_pre", 0): lambda value: middle.requires_grad_()}
    )
    (slope,) = torch.autograd.grad(difference(run.logits).sum(), [run[end]])
    for number, sender in enumerate(Graph.of(model).senders):
        change = contribution(model, sender, source.values) - contribution(model, sender, base.values)
        expected = (change.detach() * slope).sum((1, 2)).numpy()
        np.testing.assert_allclose(found.edge_scores[:, number, -1], expected, rtol=1e-9)


@pytest.mark.parametrize(("method", "steps"), [("edges", 4), ("atp", 4), ("edges_ig", 0), ("ig", 2.5)])
def test_steps_that_do_not_fit_are_refused(method, steps):
    model = vd.load(make("gpt2"), check=False)
    with pytest.raises(InputError, match="steps"):
        attribute(model, CLEAN[0], CORRUPT[0], metric=difference, method=method, steps=steps)
