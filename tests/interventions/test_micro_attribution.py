"""Attribution by gradients on models whose effects can be done by hand, or whose circuit is known."""

import micro
import numpy as np
import pytest
import torch

from veridical.interventions import Graph, attribute


@pytest.fixture(scope="module")
def linear():
    """The linear model, two sets of texts, and the options of the metric that `micro.by_hand` does."""
    model = micro.handle(micro.linear())
    right, wrong = torch.full((5,), micro.RIGHT), torch.full((5,), micro.WRONG)
    given = {"metric": "logit_diff", "answers": right, "wrong": wrong, "progress": False}
    return model, micro.repeated(5, 8, seed=2), micro.repeated(5, 8, seed=3), given


def by_token(ids):
    """`[rows, pos, 3]`: what each token adds to the linear metric directly, by head 0.0 and by 0.1."""
    x, y = micro.values()[ids].double().unbind(-1)
    direct = torch.zeros_like(x)
    direct[:, -1] = 0.5 * x[:, -1]
    return torch.stack([direct, 2 * x / ids.shape[1], -y / ids.shape[1]], dim=-1)


def close(found, expected):
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5, atol=1e-5)


def test_grad_x_input_of_a_linear_model_is_each_tokens_share(linear):
    model, ids, _, given = linear
    found = attribute(model, ids, method="grad_x_input", sites="embed", **given)
    close(found["embed"], by_token(ids).sum(-1))
    close(found["embed"].sum(1), micro.by_hand(ids))


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_attribution_patching_of_a_linear_model_adds_up(linear, direction):
    model, ids, other, given = linear
    sites = "resid_pre.0, v.0, z.0, attn_out.0, resid_post.0"
    found = attribute(model, ids, other, method="atp", sites=sites, direction=direction, **given)
    change = (by_token(ids) - by_token(other)) * (1 if direction == "denoising" else -1)
    total = (micro.by_hand(ids) - micro.by_hand(other)).double() * (1 if direction == "denoising" else -1)
    close(found["resid_pre.0"], change.sum(-1))
    close(found["resid_pre.0"].sum(1), total)
    close(found["v.0"][..., :2], change[..., 1:])
    close(found["v.0"][..., 2:], np.zeros((5, 17, 2)))
    at_last = np.zeros((5, 17, 4))
    at_last[:, -1, :2] = change[..., 1:].sum(1)
    close(found["z.0"], at_last)
    close(found["attn_out.0"], at_last.sum(-1))
    close(found["resid_post.0"][:, -1], total)
    assert not found["resid_post.0"][:, :-1].any()


def test_integrated_gradients_of_a_linear_model_need_one_step_and_leave_no_gap(linear):
    model, ids, other, given = linear
    found = attribute(model, ids, other, method="ig", sites="embed", steps=1, **given)
    close(found["embed"], (by_token(ids) - by_token(other)).sum(-1))
    close(found.gaps["embed"], np.zeros(5))


def test_edges_of_a_linear_model_are_their_terms(linear):
    model, ids, other, given = linear
    found = attribute(model, ids, other, method="edges", **given)
    direct, first, second = (by_token(ids) - by_token(other)).sum(1).unbind(-1)
    wanted = {
        "embed->logits": direct,
        "head.0.0->logits": first,
        "head.0.1->logits": second,
        "embed->head.0.0:v": first,
        "embed->head.0.1:v": second,
    }
    for edge in Graph.of(model).edges:
        close(found[edge.name], wanted.get(edge.name, np.zeros(5)))


def test_edges_of_the_chain_are_its_circuit():
    """Where its relu is a straight line the first order is the whole effect."""
    model, texts = micro.handle(micro.chain()), micro.chain_texts()
    found = attribute(model, texts.clean, texts.corrupt, method="edges", **micro.options(texts))
    for edge in Graph.of(model).edges:
        assert found[edge.name].tolist() == [texts.truth.effect * (edge.name in micro.CHAIN)] * 3, edge.name


@pytest.mark.parametrize("family", micro.FAMILIES)
@pytest.mark.parametrize("what", ["key", "query", "value"])
def test_the_largest_edges_of_induction_are_its_circuit(family, what):
    texts = micro.contrast(what)
    model = micro.handle(micro.induction(family, sharpness=micro.SOFT))
    found = attribute(model, texts.clean, texts.corrupt, method="edges", **micro.options(texts))
    wanted = micro.edges(texts.truth, family)
    best = found.top(len(wanted) + 1)
    assert set(best["edge"][:-1]) == wanted
    assert best["score"][: len(wanted)].min() > 5 * abs(best["score"].iloc[-1])


def test_saturated_attention_has_no_gradient_that_says_so():
    """Why exact checks follow: at EXACT the keys' edge has the whole effect, and no slope."""
    texts, model = micro.contrast("key"), micro.handle(micro.induction("llama"))
    found = attribute(model, texts.clean, texts.corrupt, method="edges", **micro.options(texts))
    edge = f"head.0.{micro.PREVIOUS}->head.1.{micro.INDUCTION}:k"
    assert found[edge].tolist() == [0.0] * 4


def test_attribution_patching_finds_the_tokens_of_induction():
    texts = micro.contrast("key")
    model = micro.handle(micro.induction("llama", sharpness=micro.SOFT))
    found = attribute(model, texts.clean, texts.corrupt, method="atp", sites="z.*", **micro.options(texts))
    best = {site: np.abs(found[site]).mean(0) for site in ("z.0", "z.1")}
    places = texts.places
    assert np.unravel_index(best["z.0"].argmax(), best["z.0"].shape) == (places["B"], micro.PREVIOUS)
    assert np.unravel_index(best["z.1"].argmax(), best["z.1"].shape) == (places["last"], micro.INDUCTION)
