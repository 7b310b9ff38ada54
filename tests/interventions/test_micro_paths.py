"""Edge and path patching, and circuits, on models whose edges are known."""

import warnings

import micro
import pytest
import torch
from veridical.interventions.paths import patch_paths

from veridical.interventions.graph import Graph


@pytest.fixture(params=micro.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def _no_effect_is_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def options(texts):
    return {"metric": "logit_diff", "answers": texts.answers, "wrong": texts.wrong, "progress": False}


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
    found = patch_paths(model, texts.clean, texts.corrupt, edges="*", direction=direction, **options(texts))
    ends = {"clean": found.clean.tolist(), "corrupt": found.corrupt.tolist()}
    agree(ends, {"clean": [texts.truth.effect] * 4, "corrupt": [0.0] * 4}, family)
    sign = 1 if direction == "denoising" else -1
    effects = {name: (sign * effect).tolist() for name, effect in zip(found.names, found.effects)}
    assert len(effects) == len(Graph.of(model))
    agree(effects, {name: [texts.truth.effect * (name in wanted)] * 4 for name in effects}, family)


def test_the_chain_has_three_edges():
    model, texts = micro.handle(micro.chain()), micro.chain_texts()
    found = patch_paths(model, texts.clean, texts.corrupt, edges="*", **options(texts))
    effects = {name: effect.tolist() for name, effect in zip(found.names, found.effects)}
    assert effects == {name: [texts.truth.effect * (name in micro.CHAIN)] * 3 for name in effects}


def test_head_to_head_by_keys_only():
    model, texts = micro.handle(micro.induction()), micro.contrast("key")
    previous, finder = f"head.0.{micro.PREVIOUS}", f"head.1.{micro.INDUCTION}"
    found = patch_paths(
        model, texts.clean, texts.corrupt, senders=previous, receivers=f"{finder}:*", **options(texts)
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
    found = patch_paths(model, texts.clean, texts.corrupt, paths=list(ways), **options(texts))
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
            model, texts.clean, texts.corrupt, edges=edges, positions=position, **options(texts)
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
