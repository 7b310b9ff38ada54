"""Lenses and direct contributions on models in which it is known what is written where."""

import micro
import pytest
import torch

from veridical.interventions import direct_logits, logit_lens


def test_the_answer_is_written_by_the_induction_head_alone(family):
    model, texts = micro.handle(micro.induction(family)), micro.contrast("key")
    found = direct_logits(model, texts.clean, answers=texts.answers, wrong=texts.wrong)
    parts = dict(zip(found.table["component"], found.values))
    head = f"head.1.{micro.INDUCTION}"
    assert parts.pop(head) == pytest.approx([micro.ANSWER] * 4, rel=1e-6)
    assert {name: abs(values).max() for name, values in parts.items()} == pytest.approx(
        dict.fromkeys(parts, 0.0), abs=1e-6
    )
    nothing = direct_logits(model, texts.corrupt, answers=texts.answers, wrong=texts.wrong)
    assert abs(nothing.values).max() < 1e-6


def test_the_terms_of_a_linear_model():
    ids = micro.repeated(5, 8, seed=2)
    model = micro.handle(micro.linear())
    found = direct_logits(model, ids, answers=micro.RIGHT, wrong=micro.WRONG)
    x, y = micro.values()[ids].double().unbind(-1)
    parts = dict(zip(found.table["component"], map(torch.tensor, found.values)))
    for name, expected in {
        "embed": 0.5 * x[:, -1],
        "head.0.0": 2 * x.mean(1),
        "head.0.1": -y.mean(1),
    }.items():
        torch.testing.assert_close(parts.pop(name), expected, rtol=1e-5, atol=1e-5)
    assert all(abs(values).max() == 0 for values in parts.values())
    torch.testing.assert_close(torch.tensor(found.totals).float(), micro.by_hand(ids), rtol=1e-5, atol=1e-5)


def test_the_chain_answers_through_its_last_mlp():
    model, texts = micro.handle(micro.chain()), micro.chain_texts()
    for ids, sign in ((texts.clean, 1), (texts.corrupt, -1)):
        found = direct_logits(model, ids, answers=texts.answers, wrong=texts.wrong)
        parts = {name: values.tolist() for name, values in zip(found.table["component"], found.values)}
        assert parts.pop("mlp.1") == pytest.approx([sign * micro.GAIN] * 3, rel=1e-12)
        assert all(values == [0.0] * 3 for values in parts.values())


def test_the_logit_lens_shows_the_answer_after_the_second_layer_only(family):
    model, ids = micro.handle(micro.induction(family)), micro.repeated(3, 6)
    sites = ["resid_pre.0", "resid_post.0", "resid_mid.1", "resid_post.1"]
    found = logit_lens(model, ids, sites=sites, answers=ids[:, 1])
    # At the last token of "a b c a b c", the answer is "a".
    last = found.positions == ids.shape[1] - 1
    early, late = found.probability[:2, last], found.probability[2:, last]
    assert early == pytest.approx(1 / micro.VOCABULARY, rel=1e-5)
    assert late.min() > 0.999
    assert (found.rank[2:, last] == 0).all()
    # Before anything is repeated, no layer knows.
    unknown = (found.positions > 0) & (found.positions < 7)
    assert found.kl[:, unknown].max() < 1e-5
