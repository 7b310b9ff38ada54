"""The tools explain models whose weights were written by hand: they find what is there, and no more."""

import micro
import pytest
import torch

from veridical.interventions import ablate

pytestmark = pytest.mark.usefixtures("no_effect_is_expected")
"""Heads that do nothing are ablated and patched on purpose here."""


def answered(model, ids):
    """Probability of the right continuation where a repeated text is known, `[rows, letters - 1]`."""
    letters = ids.shape[1] // 2
    with torch.no_grad():
        p = model.logits(ids).softmax(-1)
    return p[:, letters + 1 : -1].gather(-1, ids[:, letters + 2 :, None])[..., 0]


def is_chance(p):
    torch.testing.assert_close(p, torch.full_like(p, 1 / micro.VOCABULARY), rtol=1e-6, atol=0)


# Ablation


def test_ablating_either_head_leaves_chance_and_any_other_leaves_all(family):
    model, ids = micro.handle(micro.induction(family)), micro.repeated(4, 8)
    plain = answered(model, ids)
    assert plain.min() > 0.999
    for layer in range(2):
        for head in range(4):
            with ablate(model, f"z.{layer}", heads=head):
                p = answered(model, ids)
            if (layer, head) in {(0, micro.PREVIOUS), (1, micro.INDUCTION)}:
                is_chance(p)
            else:
                torch.testing.assert_close(p, plain, rtol=1e-6, atol=0)


def test_a_mean_tells_no_token_apart(family):
    model, ids = micro.handle(micro.induction(family)), micro.repeated(4, 8)
    with ablate(model, "z.0", heads=micro.PREVIOUS, mode="mean", over="batch"):
        is_chance(answered(model, ids))
    with ablate(model, "z.0", heads=micro.PREVIOUS, mode="resample", seed=1):
        assert answered(model, ids).mean() < 0.4


def test_ablating_the_values_of_one_letter_loses_that_letter_as_an_answer(family):
    model, texts = micro.handle(micro.induction(family)), micro.contrast("key", rows=3)
    last = torch.arange(3), -1
    for row in range(3):
        letter = int(texts.answers[row])
        with ablate(model, "v.1", tokens=[letter]), torch.no_grad():
            p = model.logits(texts.clean).softmax(-1)[last]
        kept = p[torch.arange(3), texts.answers] > 0.999
        assert kept.tolist() == [int(answer) != letter for answer in texts.answers]


@pytest.mark.parametrize(
    ("site", "part", "matters"),
    [
        ("resid_pre.1", "PREV", True),
        ("resid_pre.1", "TOK", True),
        ("resid_pre.1", "OUT", False),
        ("resid_post.1", "PREV", False),
        ("resid_post.1", "TOK", False),
        ("resid_post.1", "OUT", True),
    ],
)
def test_directions_that_carry_it_are_projected_out(site, part, matters):
    model, ids = micro.handle(micro.induction("llama")), micro.repeated(4, 8)
    with ablate(model, site, mode="project", directions=torch.eye(128)[getattr(micro, part)]):
        p = answered(model, ids)
    is_chance(p) if matters else torch.testing.assert_close(p, answered(model, ids), rtol=1e-6, atol=0)


def test_generation_goes_on_with_the_text_and_with_nothing_without_the_head(family):
    model = micro.handle(micro.induction(family))
    assert model.generate("d a f k d", max_new_tokens=6) == "a f k d a f"
    with ablate(model, "z.0", heads=micro.PREVIOUS):
        assert "f" not in model.generate("d a f k d", max_new_tokens=6)
    assert model.generate("d a f k d", max_new_tokens=6) == "a f k d a f"
