"""Sweeps of patches on models whose cells are known: the whole effect there, exactly nothing elsewhere."""

import micro
import numpy as np
import pytest
import torch

from veridical.interventions import patch
from veridical.sites import Site

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
PER_HEAD = ("q", "k", "v", "z")

pytestmark = pytest.mark.usefixtures("no_effect_is_expected")


def cells_of(found, length):
    """Effects by site, position from the end, and head, `[rows]` each."""
    lines = found.table.to_dict("records")
    return {
        (
            Site.parse(line["site"]).short,
            int(line["position"]) - length,
            None if line["head"] < 0 else line["head"],
        ): effect
        for line, effect in zip(lines, found.effects)
    }


def sweep(model, texts, **more):
    """Every position of every site, whole and by head."""
    whole = patch(model, texts.clean, texts.corrupt, sites=[f"{kind}.*" for kind in STREAM], **more)
    heads = [f"{kind}.*" for kind in PER_HEAD]
    each = patch(model, texts.clean, texts.corrupt, sites=heads, heads="all", **more)
    length = texts.clean.shape[1]
    return {**cells_of(whole, length), **cells_of(each, length)}


@pytest.mark.parametrize("what", ["key", "query", "value"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_cells_of_the_truth_and_no_others(family, what, direction):
    texts = micro.contrast(what, length=8)
    model = micro.handle(micro.induction(family))
    found = sweep(model, texts, direction=direction, **micro.options(texts))
    wanted = micro.cells(texts.truth, family)
    assert wanted <= found.keys()
    heads = 2 * 4 + 2 * (2 if family == "llama_grouped" else 4)
    assert len(found) == 2 * 8 * (len(STREAM) + heads)
    sign = 1 if direction == "denoising" else -1
    for cell, effect in found.items():
        expected = [sign * texts.truth.effect * (cell in wanted)] * 4
        close = pytest.approx(expected, abs=1e-6) if family == "gpt2" else expected
        assert effect.tolist() == close, cell


def test_the_chain():
    model, texts = micro.handle(micro.chain()), micro.chain_texts()
    found = sweep(model, texts, **micro.options(texts))
    for cell, effect in found.items():
        assert effect.tolist() == [texts.truth.effect * (cell in texts.truth.cells)] * 3, cell


def test_a_sweep_of_a_linear_model_is_done_by_hand():
    ids, other = micro.repeated(5, 8, seed=2), micro.repeated(5, 8, seed=3)
    model = micro.handle(micro.linear())
    right, wrong = torch.full((5,), micro.RIGHT), torch.full((5,), micro.WRONG)
    given = {"metric": "logit_diff", "answers": right, "wrong": wrong, "progress": False}
    x, y = (micro.values()[ids] - micro.values()[other]).double().unbind(-1)
    by_hand = (2 * x - y) / 17
    by_hand[:, -1] += 0.5 * x[:, -1]
    found = patch(model, ids, other, sites="resid_pre.0", **given)
    np.testing.assert_allclose(found.effects, by_hand.T, rtol=1e-5, atol=1e-5)
    everything = patch(model, ids, other, sites="resid_pre.0", positions="all", **given)
    total = micro.by_hand(ids) - micro.by_hand(other)
    np.testing.assert_allclose(everything.effects[0], total, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(everything.recovered, 1, rtol=1e-5)


def test_texts_of_several_lengths_at_once(family):
    """Padded together, each text's own letters and positions matter as they do alone."""
    model = micro.handle(micro.induction(family))
    parts = [micro.contrast("key", rows=1, length=length, seed=length) for length in (7, 10, 9)]
    clean, corrupt = ([micro.text(getattr(part, side))[0] for part in parts] for side in ("clean", "corrupt"))
    answers, wrong = ([int(getattr(part, side)) for part in parts] for side in ("answers", "wrong"))
    found = patch(
        model, clean, corrupt, sites="resid_pre.1", metric="logit_diff", answers=answers, wrong=wrong,
        progress=False,
    )  # fmt: skip
    for row, part in enumerate(parts):
        effects = found.effects[:, row]
        there = np.isfinite(effects)
        assert there.sum() == part.clean.shape[1]
        assert np.flatnonzero(np.abs(np.nan_to_num(effects)) > 1).tolist() == [
            np.flatnonzero(there)[part.places["B"]]
        ]
        assert np.nanmax(effects) == pytest.approx(micro.ANSWER, abs=1e-6)
