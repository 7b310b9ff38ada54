"""Nested cross-fitting against the same thing written out fold by fold."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from veridical.probes import LogisticProbe
from veridical.probes.baseline import cross_fit_texts
from veridical.probes.crossfit import Nested, Plan, cross_fit, fold_numbers
from veridical.probes.data import read_source
from veridical.probes.kinds import KINDS, kind
from veridical.probes.sequence import SequenceProbe

STRENGTHS = (0.001, 0.1, 10.0)


@pytest.fixture(scope="module")
def setting(planted):
    """60 pairs; a quarter of the rows may not be fitted on, and strength is chosen on another subset."""
    data = planted(pairs=60, width=12, distance=2.0)
    source = read_source(data.acts, None, data.pairs, None, None)
    random = np.random.default_rng(1)
    fit, positive = random.random(120) < 0.75, data.labels == 1
    fold_of = fold_numbers(data.pairs, 4, 0, positive)
    return data, source, Plan(fit, positive, fit & (random.random(120) < 0.9), fold_of, 4, STRENGTHS)


def by_hand(x, plan, out, strength):
    """One plain fit without some folds, as scores of every row."""
    mean, scale = x[plan.fit].mean(0), x[plan.fit].std(0)
    train = plan.fit & ~np.isin(plan.fold_of, out)
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
    model.fit((x[train] - mean) / scale, plan.positive[train])
    return model.decision_function((x - mean) / scale)


def auroc(scores, plan, fold):
    rows = plan.judged & (plan.fold_of == fold)
    return roc_auc_score(plan.positive[rows], scores[rows])


def test_every_row_is_judged_as_a_plain_nested_loop_judges_it(setting):
    data, source, plan = setting
    x = data.acts["signal"]
    found = cross_fit(source, "signal", plan, LogisticProbe())
    for k in range(4):
        others = [j for j in range(4) if j != k]
        chosen = [np.mean([auroc(by_hand(x, plan, (k, j), c), plan, j) for j in others]) for c in STRENGTHS]
        strength = STRENGTHS[int(np.argmax(np.round(chosen, 9)))]
        assert found.found[k] == pytest.approx(max(chosen), abs=1e-9)
        here = plan.fold_of == k
        np.testing.assert_allclose(found.scores[here], by_hand(x, plan, (k,), strength)[here], rtol=1e-3)
        assert np.isnan(found.inner[k, here]).all()
        for j in others:
            held = plan.fold_of == j
            expected = by_hand(x, plan, (k, j), strength)[held]
            np.testing.assert_allclose(found.inner[k, held], expected, rtol=1e-2, atol=1e-3)
    whole = [np.mean([auroc(by_hand(x, plan, (k,), c), plan, k) for k in range(4)]) for c in STRENGTHS]
    assert STRENGTHS[int(np.argmax(np.round(whole, 9)))] == found.probe.C
    expected = by_hand(x, plan, (), found.probe.C)
    np.testing.assert_allclose(found.probe.decision_function(x), expected, rtol=1e-3, atol=1e-6)


def test_a_fold_sees_nothing_of_its_labels_and_rows_left_out_change_nothing(setting):
    data, source, plan = setting
    found = cross_fit(source, "signal", plan, LogisticProbe())
    labels = plan.positive.copy()
    labels[plan.fold_of == 2] = ~labels[plan.fold_of == 2]
    other = cross_fit(
        source, "signal", Plan(plan.fit, labels, plan.judged, plan.fold_of, 4, STRENGTHS), LogisticProbe()
    )
    here = plan.fold_of == 2
    np.testing.assert_allclose(other.scores[here], found.scores[here], rtol=1e-9)
    assert not np.allclose(other.scores[~here], found.scores[~here], rtol=1e-3)
    wild = np.where(plan.fit[:, None], data.acts["signal"], 1e4)
    source = read_source({"signal": wild}, None, data.pairs, None, None)
    changed = cross_fit(source, "signal", plan, LogisticProbe())
    for one, other in zip(changed.probes, found.probes, strict=True):
        np.testing.assert_array_equal(one.coef_, other.coef_)


def test_the_probe_of_each_fold_gives_the_scores_of_its_fold(setting):
    data, source, plan = setting
    found = cross_fit(source, "signal", plan, LogisticProbe())
    for fold in range(4):
        here = plan.fold_of == fold
        scores = found.probes[fold].decision_function(data.acts["signal"][here])
        np.testing.assert_allclose(found.scores[here], scores, rtol=1e-6)
    assert found.probe is found.probes[4]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("stacked", "ttpd")])
def test_every_estimator_can_be_cross_fitted(name, planted):
    data = planted(pairs=40, width=8, distance=4.0)
    probe = kind(name)()
    positive = data.labels == 1
    acts = {"signal": data.acts["signal"]}
    if isinstance(probe, SequenceProbe):
        acts = {"signal": [np.stack([row, row]) for row in data.acts["signal"]]}
    source = probe.source(acts, None, data.pairs, None, None)
    every = np.ones(80, dtype=bool)
    plan = Plan(every, positive, every, fold_numbers(data.pairs, 3, 0, positive), 3, (0.1,))
    found = cross_fit(source, "signal", plan, probe)
    assert roc_auc_score(positive, found.scores) > 0.9
    assert np.isfinite(found.probe.decision_function(acts["signal"])).all()


def test_every_fold_chooses_its_own_site(setting):
    _, source, plan = setting
    crossed = {("logistic", site): cross_fit(source, site, plan, LogisticProbe()) for site in source.sites}
    nested = Nested.of(crossed)
    assert set(nested.by_fold) == {("logistic", "signal")} == {nested.best}
    np.testing.assert_array_equal(nested.scores(plan.fold_of), crossed["logistic", "signal"].scores)
    forced = Nested(crossed, (("logistic", "noise"), *nested.by_fold[1:]), nested.best)
    first = plan.fold_of == 0
    np.testing.assert_array_equal(
        forced.scores(plan.fold_of)[first], crossed["logistic", "noise"].scores[first]
    )
    np.testing.assert_array_equal(forced.inner()[0], crossed["logistic", "noise"].inner[0])


def test_the_text_baseline_of_a_fold_saw_nothing_of_it(planted):
    data = planted(pairs=60)
    positive = data.labels == 1
    texts = np.array([f"fact {p} is {'so' if y else 'not'}" for p, y in zip(data.pairs, positive)], object)
    fold_of = fold_numbers(data.pairs, 3, 0, positive)
    fit = np.ones(120, dtype=bool)
    found = cross_fit_texts(texts, positive, np.arange(120), fit, fold_of)
    assert roc_auc_score(positive, found.on(texts, fold_of)) > 0.99
    # Each text is a word of its own at random: known to the model of all pairs, and to no fold.
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), size=(120, 8))
    names = np.array(["".join(word) for word in letters], dtype=object)
    memory = cross_fit_texts(names, positive, np.arange(120), fit, fold_of)
    assert roc_auc_score(positive, memory.on(names, np.full(120, -1))) > 0.95
    assert abs(roc_auc_score(positive, memory.on(names, fold_of)) - 0.5) < 0.25
