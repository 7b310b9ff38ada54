"""Edge and path patching, and circuits, on models whose edges are known."""

import micro
import pytest
import torch

from veridical.interventions import Graph, find_circuit, patch_paths

pytestmark = pytest.mark.usefixtures("no_effect_is_expected")


def agree(found, wanted, family):
    """Equal to the last bit, but for the rounding of the mean in GPT-2's norm."""
    if family == "gpt2":
        wanted = {name: pytest.approx(value, abs=1e-6) for name, value in wanted.items()}
    assert found == wanted


@pytest.mark.parametrize("what", ["key", "query", "value"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_every_edge_of_the_truth_has_the_whole_effect_and_no_other_has_any(family, what, direction):
    model, texts = micro.handle(micro.induction(family)), micro.contrast(what)
    wanted = micro.edges(texts.truth, family)
    assert all(edge in Graph.of(model) for edge in wanted)
    found = patch_paths(
        model, texts.clean, texts.corrupt, edges="*", direction=direction, **micro.options(texts)
    )
    ends = {"clean": found.clean.tolist(), "corrupt": found.corrupt.tolist()}
    agree(ends, {"clean": [texts.truth.effect] * 4, "corrupt": [0.0] * 4}, family)
    sign = 1 if direction == "denoising" else -1
    effects = {name: (sign * effect).tolist() for name, effect in zip(found.names, found.effects)}
    assert len(effects) == len(Graph.of(model))
    agree(effects, {name: [texts.truth.effect * (name in wanted)] * 4 for name in effects}, family)


def test_the_chain_has_three_edges():
    model, texts = micro.handle(micro.chain()), micro.chain_texts()
    found = patch_paths(model, texts.clean, texts.corrupt, edges="*", **micro.options(texts))
    effects = {name: effect.tolist() for name, effect in zip(found.names, found.effects)}
    assert effects == {name: [texts.truth.effect * (name in micro.CHAIN)] * 3 for name in effects}


def test_head_to_head_by_keys_only():
    model, texts = micro.handle(micro.induction()), micro.contrast("key")
    previous, finder = f"head.0.{micro.PREVIOUS}", f"head.1.{micro.INDUCTION}"
    found = patch_paths(
        model, texts.clean, texts.corrupt, senders=previous, receivers=f"{finder}:*", **micro.options(texts)
    )
    assert dict(zip(found.names, found.effects.mean(1).tolist())) == {
        f"{previous}->{finder}:{port}": micro.ANSWER * (port == "k") for port in "qkv"
    }


def test_the_whole_way_as_one_path(family):
    model, texts = micro.handle(micro.induction(family)), micro.contrast("key")
    group = 2 if family == "llama_grouped" else 1
    previous, finder = (
        f"head.{i}.{head // group}" for i, head in ((0, micro.PREVIOUS), (1, micro.INDUCTION))
    )
    ways = {
        f"embed->{previous}:v->{finder}:k->logits": micro.ANSWER,
        f"embed->{previous}:v->{finder}:v->logits": 0.0,
        f"embed->{previous}:k->{finder}:k->logits": 0.0,
        f"embed->{previous}:v->logits": 0.0,
        f"embed->{finder}:k->logits": 0.0,
        "embed->logits": 0.0,
    }
    found = patch_paths(model, texts.clean, texts.corrupt, paths=list(ways), **micro.options(texts))
    agree(
        dict(zip(ways, found.effects.tolist())), {way: [effect] * 4 for way, effect in ways.items()}, family
    )


def test_an_edge_matters_where_its_token_stands():
    """The keys of the induction head are read where B stands; what head 0.1 read stands one token before."""
    model, texts = micro.handle(micro.induction("llama")), micro.contrast("key")
    edges = sorted(texts.truth.edges)
    places = {"embed->head.0.1:v": "A", "head.0.1->head.1.2:k": "B", "head.1.2->logits": "last"}
    for position in range(texts.clean.shape[1]):
        found = patch_paths(
            model, texts.clean, texts.corrupt, edges=edges, positions=position, **micro.options(texts)
        )
        at = [texts.places[places[edge]] == position for edge in edges]
        assert found.effects.tolist() == [[micro.ANSWER * here] * 4 for here in at]


def test_linear_effects_are_those_by_hand():
    ids = micro.repeated(5, 8, seed=2)
    other = micro.repeated(5, 8, seed=3)
    model = micro.handle(micro.linear())
    right, wrong = torch.full((5,), micro.RIGHT), torch.full((5,), micro.WRONG)
    edges = [
        "embed->logits",
        "head.0.0->logits",
        "head.0.1->logits",
        "embed->head.0.0:v",
        "embed->head.0.1:v",
    ]
    found = patch_paths(
        model, ids, other, edges=edges, metric="logit_diff", answers=right, wrong=wrong, progress=False
    )
    x, y = (micro.values()[ids] - micro.values()[other]).double().unbind(-1)
    by_hand = [0.5 * x[:, -1], 2 * x.mean(1), -y.mean(1), 2 * x.mean(1), -y.mean(1)]
    for name, effect, expected in zip(edges, found.effects, by_hand):
        torch.testing.assert_close(torch.tensor(effect), expected, rtol=1e-5, atol=1e-5, msg=name)


# Circuits


@pytest.mark.parametrize("what", ["key", "query", "value"])
def test_the_circuit_of_induction_is_found_whole_and_faithful(family, what):
    model, texts = micro.handle(micro.induction(family)), micro.contrast(what)
    found = find_circuit(
        model, texts.clean, texts.corrupt, method="exact", controls=3, **micro.options(texts)
    )
    assert set(found.edges) == micro.edges(texts.truth, family)
    assert found.faithfulness == pytest.approx(1, abs=1e-6)
    assert found.without == pytest.approx(0, abs=1e-6)
    assert found.random == pytest.approx([0] * 3, abs=1e-6)


@pytest.mark.parametrize("method", ["edges", "exact"])
def test_the_circuit_of_the_chain_is_found(method):
    model, texts = micro.handle(micro.chain()), micro.chain_texts()
    found = find_circuit(model, texts.clean, texts.corrupt, method=method, controls=3, **micro.options(texts))
    assert set(found.edges) == set(micro.CHAIN)
    assert (found.faithfulness, found.without) == (1.0, 0.0)


@pytest.mark.parametrize("what", ["key", "query", "value"])
def test_ranked_by_gradients_and_pruned_it_is_the_same_circuit(family, what):
    texts = micro.contrast(what)
    model = micro.handle(micro.induction(family, sharpness=micro.SOFT))
    found = find_circuit(
        model, texts.clean, texts.corrupt, keep=20, prune=0.02, controls=1, **micro.options(texts)
    )
    assert set(found.edges) == micro.edges(texts.truth, family)
    assert found.faithfulness == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("missing", range(3))
def test_a_circuit_that_lacks_an_edge_explains_nothing(missing):
    model, texts = micro.handle(micro.chain()), micro.chain_texts()
    edges = [edge for place, edge in enumerate(micro.CHAIN) if place != missing]
    found = patch_paths(
        model,
        texts.clean,
        texts.corrupt,
        edges=edges,
        together=True,
        direction="noising",
        **micro.options(texts),
    )
    rest = patch_paths(
        model,
        texts.clean,
        texts.corrupt,
        edges=micro.CHAIN[missing],
        direction="noising",
        **micro.options(texts),
    )
    assert found.effects.tolist() == rest.effects.tolist() == [[-texts.truth.effect] * 3]
