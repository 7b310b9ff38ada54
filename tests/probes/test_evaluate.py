"""Figures, intervals and permutations against slow and obvious versions of themselves."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score, roc_curve

from veridical.pairs import splits
from veridical.probes import evaluate
from veridical.probes.firing import balanced_threshold, false_positive_threshold


def scored(n=200, seed=0, ties=True):
    random = np.random.default_rng(seed)
    positive = random.random(n) < 0.4
    scores = random.normal(size=n) + positive
    return (np.round(scores, 1) if ties else scores), positive


def recall_at(scores, positive, weights, limit=0.01):
    false, true, _ = roc_curve(positive, scores, sample_weight=weights, drop_intermediate=False)
    return true[false <= limit].max()


@pytest.mark.parametrize("ties", [True, False])
def test_auroc_is_sklearns(ties):
    scores, positive = scored(ties=ties)
    both = np.stack([scores, -scores], 1)
    found = evaluate.auroc(both, positive)
    np.testing.assert_allclose(found, [roc_auc_score(positive, s) for s in both.T], atol=1e-12)
    assert np.isnan(evaluate.auroc(both, np.ones(200, dtype=bool))).all()


def test_equal_scores_tie_whatever_rounding_did():
    scores = np.array([[1.0, 1e-12], [1 + 1e-15, 2e-12], [2.0, 2e-12 + 1e-27], [3.0, 3e-12]])
    settled = evaluate.settled(scores)
    assert settled[0, 0] == settled[1, 0]
    assert settled[1, 1] == settled[2, 1]
    assert len(np.unique(settled[:, 0])) == len(np.unique(settled[:, 1])) == 3
    np.testing.assert_allclose(settled, scores, rtol=1e-9)
    assert np.array_equal(evaluate.settled(np.ones((3, 1))), np.ones((3, 1)))


@pytest.mark.parametrize("ties", [True, False])
def test_weighted_figures_equal_sklearn_with_sample_weights(ties, monkeypatch):
    scores, positive = scored(ties=ties)
    groups = np.arange(200) // 3
    weights = evaluate.resample_weights(groups, 30, 0)
    for limit in (1 << 22, 1000):
        monkeypatch.setattr(evaluate, "CHUNK_ELEMENTS", limit)
        found = evaluate.weighted_metrics(scores, positive, weights)
        for r, w in enumerate(weights):
            kept = w > 0
            args = positive[kept], scores[kept]
            assert found["auroc"][r] == pytest.approx(roc_auc_score(*args, sample_weight=w[kept]))
            wanted = accuracy_score(positive, scores > 0, sample_weight=w)
            assert found["accuracy"][r] == pytest.approx(wanted)
            assert found["recall_at_1pct_fpr"][r] == pytest.approx(recall_at(scores, positive, w))


def test_auroc_within_strata_counts_pairs_of_one_stratum_and_no_offset():
    scores, positive = scored()
    strata = np.random.default_rng(1).integers(0, 3, 200)
    weights = evaluate.resample_weights(np.arange(200) // 2, 5, 0)
    found = evaluate.auroc_within(scores, positive, strata, weights)
    for w, value in zip(weights, found):
        ordered = total = 0.0
        for i in np.flatnonzero(positive):
            for j in np.flatnonzero(~positive & (strata == strata[i])):
                ordered += w[i] * w[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
                total += w[i] * w[j]
        assert value == pytest.approx(ordered / total)
    shifted = evaluate.auroc_within(scores + 10 * strata, positive, strata, weights)
    np.testing.assert_allclose(shifted, found, atol=1e-9)
    one = evaluate.auroc_within(scores, positive, np.zeros(200), weights)
    np.testing.assert_allclose(one, evaluate.weighted_auroc(scores, positive, weights))
    assert np.isnan(evaluate.auroc_within(scores, positive, positive, weights)).all()


def test_a_resample_of_one_class_has_no_auroc():
    scores, positive = scored(n=10)
    weights = np.stack([positive, ~positive, np.ones(10)]).astype(int)
    found = evaluate.weighted_metrics(scores, positive, weights)["auroc"]
    assert np.isnan(found[:2]).all()
    assert np.isfinite(found[2])


def test_resamples_draw_whole_pairs_as_the_slow_bootstrap_does():
    groups = np.repeat(np.arange(40), [1, 3] * 20)
    weights = evaluate.resample_weights(groups, 2000, 0)
    for group in range(40):
        assert (weights[:, groups == group] == weights[:, groups == group][:, :1]).all()
    first = [np.flatnonzero(groups == g)[0] for g in range(40)]
    assert (weights[:, first].sum(1) == 40).all()
    slow = np.array([np.bincount(rows, minlength=80) for rows in splits.bootstrap(groups, 2000, 0)])
    np.testing.assert_allclose(weights.var(0), slow.var(0), atol=0.2)
    assert np.array_equal(weights, evaluate.resample_weights(groups, 2000, 0))
    assert not np.array_equal(weights, evaluate.resample_weights(groups, 2000, 1))


def test_intervals_by_pair_are_wider_than_by_row_when_rows_repeat():
    scores, positive = scored(n=60, ties=False)
    repeat = 8
    many, labels, pairs = (
        np.repeat(scores, repeat),
        np.repeat(positive, repeat),
        np.repeat(np.arange(60), repeat),
    )
    by_pair = evaluate.measure(many, labels, evaluate.resample_weights(pairs, 1000, 0))["auroc"]
    by_row = evaluate.measure(many, labels, evaluate.resample_weights(np.arange(480), 1000, 0))["auroc"]
    once = evaluate.measure(scores, positive, evaluate.resample_weights(np.arange(60), 1000, 0))["auroc"]
    assert by_pair.high - by_pair.low > 2 * (by_row.high - by_row.low)
    assert by_pair.high - by_pair.low == pytest.approx(once.high - once.low, rel=0.15)


def test_intervals_cover_the_truth_about_95_times_in_100():
    # AUROC of two unit normals 1 apart is Phi(1 / sqrt 2) = 0.760; rows come in pairs that share noise.
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        pairs = np.repeat(np.arange(60), 2)
        positive = np.repeat(random.random(60) < 0.5, 2)
        shared = np.repeat(random.normal(size=60), 2)
        scores = 0.8 * shared + 0.6 * random.normal(size=120) + positive
        found = evaluate.measure(scores, positive, evaluate.resample_weights(pairs, 200, seed))["auroc"]
        covered += found.low <= 0.760 <= found.high
    assert 180 <= covered <= 199


def test_difference_of_a_score_with_itself_is_zero():
    scores, positive = scored()
    weights = evaluate.resample_weights(np.arange(200), 50, 0)
    assert evaluate.difference(scores, scores, positive, weights) == evaluate.Estimate(0, 0, 0)
    lead = evaluate.difference(scores, np.random.default_rng(1).normal(size=200), positive, weights)
    assert lead.low > 0


@pytest.mark.parametrize("constant", [True, False])
def test_permuting_keeps_how_pairs_are_labelled_and_breaks_the_rest(constant):
    random = np.random.default_rng(0)
    sizes = random.integers(1, 5, 200)
    groups = np.repeat(np.arange(200), sizes)
    truth = np.repeat(random.random(200) < 0.5, sizes) if constant else random.random(len(groups)) < 0.5
    units = np.arange(len(groups))
    draws = np.stack([evaluate.permute_over_pairs(truth, groups, units, random) for _ in range(50)])
    assert (draws.sum(1) == truth.sum()).all()
    if constant:
        for draw in draws:
            assert all(len(set(draw[groups == g])) == 1 for g in range(200))
    agreement = (draws == truth).mean(1)
    assert abs(agreement.mean() - 0.5) < 0.03
    assert agreement.max() < 0.7


def test_permuting_keeps_contrast_pairs_balanced_and_vectors_of_a_row_together():
    random = np.random.default_rng(0)
    units = np.repeat(np.arange(80), 3)
    groups, truth = units // 2, units % 2 == 0
    draw = evaluate.permute_over_pairs(truth, groups, units, random)
    assert all(len(set(draw[units == u])) == 1 for u in range(80))
    assert all(draw[groups == g].sum() == 3 for g in range(40))
    assert 0.3 < (draw == truth).mean() < 0.7


def test_pairs_whose_size_occurs_once_are_permuted_too():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])
    truth = groups % 2 == 0
    draws = [evaluate.permute_over_pairs(truth, groups, np.arange(21), random) for _ in range(20)]
    assert all(draw.sum() == truth.sum() for draw in draws)
    assert any((draw != truth).any() for draw in draws)


def test_thresholds():
    scores = np.array([0.1, 0.2, 0.3, 0.8, 0.9, 1.0])
    positive = np.array([False, False, False, True, True, True])
    assert 0.3 <= balanced_threshold(scores, positive) < 0.8
    negatives = np.random.default_rng(0).normal(size=1000)
    limit = false_positive_threshold(negatives)
    assert (negatives > limit).mean() == 0.01
    assert (negatives[:50] > false_positive_threshold(negatives[:50])).sum() == 0
