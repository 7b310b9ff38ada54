"""Features that tell two sides apart: planted ones are found, and nothing where there is nothing."""

import numpy as np
import pytest
import torch
from sae_makers import exact_sae, random_sae

import veridical as vd
from veridical.errors import DataError, InputError, UnknownNameError
from veridical.saes.pooled import pooled_latents
from veridical.saes.separate import separate_labels, separate_models

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def pairs():
    """Two texts a pair; the positive one says silver."""
    import pandas as pd

    words = ["truth", "lie", "answer", "capital", "symbol", "France", "Italy", "Rome", "Paris", "yes"]
    lines = [
        {"pair": number, "prompt": f"{a} and {b} of {'silver' if label else 'gold'}", "label": label}
        for number, (a, b) in enumerate([(a, b) for a in words for b in words[:6]])
        for label in (0, 1)
    ]
    return vd.Pairs.from_pandas(pd.DataFrame(lines))


@pytest.fixture(scope="module")
def acts(hooked, pairs):
    return vd.collect(hooked("llama"), pairs, sites=SITE, tokens="all", progress=False)


@pytest.fixture(scope="module")
def sae():
    return random_sae("relu", d_in=32, width=64, site=SITE)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_pooling_equals_a_loop(acts, sae, pool):
    found = pooled_latents(sae, acts, pool)
    latents = sae.encode(acts[SITE]).numpy()
    rows = acts.index["row"].to_numpy()
    for row in (0, 7, len(acts.rows) - 1):
        own = latents[rows == row]
        wanted = own.max(0) if pool == "max" else own.mean(0)
        np.testing.assert_allclose(found[row], wanted, rtol=1e-5, atol=1e-6)


def test_labels_of_the_last_token_are_told_apart(acts, sae):
    found = separate_labels(sae, acts, permutations=50, bootstrap=100)
    best = found.to_frame().iloc[0]
    assert best["p"] == pytest.approx(1 / 51)
    assert best["auroc_low"] > 0.6 or best["auroc_high"] < 0.4
    assert found.sides == ("label = 0", "label = 1")
    assert best["auroc_low"] <= best["auroc"] <= best["auroc_high"]
    assert found.counts["judge_pairs"] + found.counts["rank_pairs"] == 60
    assert "separate label = 1 from label = 0" in found.findings()[0]
    assert found.report_section().figures


def test_labels_that_say_nothing_are_not(acts, sae):
    """Under permuted labels p at most 0.05 comes up about one time in twenty, with all features counted."""
    hits, held = 0, []
    for seed in range(40):
        random = np.random.default_rng(seed)
        shuffled = acts.filter(lambda rows: np.ones(len(rows), dtype=bool))
        labels = random.permuted(acts.rows["label"].to_numpy().reshape(-1, 2), axis=1).reshape(-1)
        shuffled.rows = acts.rows.assign(label=labels)
        frame = separate_labels(sae, shuffled, permutations=99, bootstrap=1, top=1, seed=seed).to_frame()
        found = frame.iloc[0]
        hits += found["p"] <= 0.05
        held.append(found["auroc"] if found["chosen_by"] > 0.5 else 1 - found["auroc"])
    assert hits <= 7
    assert np.mean(held) == pytest.approx(0.5, abs=0.06)


def test_a_model_against_itself_shows_nothing(acts, sae):
    found = separate_models(sae, acts, acts, permutations=20, bootstrap=20)
    frame = found.to_frame()
    assert (frame["chosen_by"] == 0).all()
    assert (frame["difference"] == 0).all()
    assert (frame["p"] == 1).all()
    assert found.findings()[0].startswith("0 of")


def test_a_planted_change_is_found(hooked, pairs, acts):
    """A model steered along one feature differs in that feature."""
    from veridical.saes.splice import steer

    model, sae = hooked("llama"), exact_sae(32, SITE)
    with steer(model, sae, {11: 0.5}):
        steered = vd.collect(model, pairs, sites=SITE, tokens="all", progress=False)
    found = separate_models(sae, acts, steered, permutations=30, bootstrap=50, names=("plain", "steered"))
    best = found.to_frame().iloc[0]
    assert best["feature"] in (11, 43)  # the dimension, and its negative
    assert best["p"] == pytest.approx(1 / 31)
    frame = found.to_frame().set_index("feature")
    change = frame["difference"].get(11, 0) - frame["difference"].get(43, 0)
    assert change == pytest.approx(0.5, abs=1e-4)
    others = frame.drop(index=[n for n in (11, 43) if n in frame.index])
    assert others["difference"].abs().max() < 1e-5 if len(others) else True
    assert found.report_section().figures


def test_bad_input_is_named(hooked, pairs, acts, sae):
    with pytest.raises(UnknownNameError, match="nearest: label"):
        separate_labels(sae, acts, "lable")
    with pytest.raises(UnknownNameError, match="pool"):
        separate_labels(sae, acts, pool="median")
    with pytest.raises(InputError, match="top is 0"):
        separate_labels(sae, acts, top=0)
    other = vd.collect(hooked("llama"), pairs, sites=SITE, tokens="last", progress=False)
    with pytest.raises(InputError, match="other rows or tokens"):
        separate_models(sae, acts, other)
    few = acts.filter(pair=[0, 1, 2])
    with pytest.raises(DataError, match="3 pairs are too few"):
        separate_models(sae, few, few)
    silent = random_sae("relu", d_in=32, width=64, site=SITE)
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    with pytest.raises(DataError, match="no feature fires"):
        separate_labels(silent, acts)
