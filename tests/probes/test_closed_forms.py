"""Ridge, mass-mean and LDA against scikit-learn and numpy; the log-odds along a direction."""

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from veridical.errors import DataError
from veridical.probes.base import Problems
from veridical.probes.directions import alike, along
from veridical.probes.lda import LDAProbe
from veridical.probes.mass_mean import MassMeanProbe
from veridical.probes.ridge import RidgeProbe, least_squares
from veridical.probes.solver import Design

SHAPES = pytest.mark.parametrize(("rows", "width"), [(200, 12), (60, 90)])


def skewed(rows, width, seed=0, share=0.3):
    """Correlated features, unequal classes."""
    random = np.random.default_rng(seed)
    labels = (random.random(rows) < share).astype(int)
    labels[:2] = [0, 1]
    mixed = random.normal(size=(rows, width)) @ random.normal(size=(width, width)) / np.sqrt(width)
    return mixed + 5 + np.outer(labels, random.normal(size=width)), labels


def posed(labels, weights, strengths=1.0):
    weights = torch.from_numpy(np.asarray(weights, dtype=float))
    targets = torch.from_numpy(labels.astype(float))
    if weights.ndim == 1:
        weights = weights[:, None]
    targets = targets[:, None].expand(-1, weights.shape[1])
    return Problems(
        targets, weights, torch.as_tensor(strengths, dtype=torch.float64).expand(weights.shape[1])
    )


@SHAPES
@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_least_squares_equals_sklearn_with_row_weights(rows, width, strength):
    x, labels = skewed(rows, width)
    random = np.random.default_rng(1)
    kinds = [
        np.ones(rows),
        (np.arange(rows) % 3 > 0) * 1.0,
        random.integers(0, 3, rows) * 1.0,
        random.random(rows),
    ]
    design = Design.of(torch.from_numpy(x), standardise=False)
    found = least_squares(design, posed(labels, np.stack(kinds, 1), strength))
    coefficients, intercepts = design.raw(found)
    for at, weights in enumerate(kinds):
        reference = Ridge(alpha=1 / strength, solver="cholesky", tol=1e-12)
        reference.fit(x, 2.0 * labels - 1, sample_weight=weights)
        np.testing.assert_allclose(coefficients[at], reference.coef_, rtol=1e-7, atol=1e-10)
        assert float(intercepts[at]) == pytest.approx(reference.intercept_, rel=1e-7)


@SHAPES
def test_ridge_has_the_direction_of_sklearns_classifier(rows, width):
    x, labels = skewed(rows, width)
    probe = RidgeProbe(C=0.02).fit(x, labels)
    reference = make_pipeline(StandardScaler(), RidgeClassifier(alpha=50)).fit(x, labels)
    ours, theirs = probe.decision_function(x), reference.decision_function(x)
    slope, offset = np.polyfit(theirs, ours, 1)
    assert slope > 0
    np.testing.assert_allclose(ours, slope * theirs + offset, atol=1e-9 * np.abs(ours).max())
    assert not np.allclose(RidgeProbe(C=1.0).fit(x, labels).direction_, probe.direction_, atol=1e-3)


def test_a_ridge_that_float64_cannot_solve_says_so():
    x, labels = skewed(30, 60)
    design = Design.of(torch.from_numpy(x))
    with pytest.raises(DataError, match="smaller C"):
        least_squares(design, posed(labels, np.arange(30) % 2, 1e25))


@SHAPES
def test_mass_mean_is_the_difference_of_means_on_raw_activations(rows, width):
    x, labels = skewed(rows, width)
    wanted = x[labels == 1].mean(0) - x[labels == 0].mean(0)
    np.testing.assert_allclose(
        MassMeanProbe().fit(x, labels).direction_, wanted / np.linalg.norm(wanted), atol=1e-10
    )


@SHAPES
def test_odds_along_a_direction_are_those_of_a_discriminant_on_the_projections(rows, width):
    x, labels = skewed(rows, width)
    probe = MassMeanProbe().fit(x, labels)
    line = (x @ probe.direction_)[:, None]
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(line, labels)
    np.testing.assert_allclose(
        probe.decision_function(x), reference.decision_function(line), rtol=1e-7, atol=1e-8
    )


def test_the_length_and_sign_of_a_direction_do_not_matter():
    x, labels = skewed(100, 6)
    design, problem = Design.of(torch.from_numpy(x)), posed(labels, np.ones(100))
    direction = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = along(design, direction, problem).weights
    torch.testing.assert_close(along(design, -1e-8 * direction, problem).weights, first)
    torch.testing.assert_close(along(design, 1e8 * direction, problem).weights, first)


@SHAPES
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0, None])
def test_lda_equals_sklearn(rows, width, share):
    x, labels = skewed(rows, width)
    means = np.stack([x[labels == at].mean(0) for at in (0, 1)])
    given = ledoit_wolf_shrinkage(x - means[labels], assume_centered=True) if share is None else share
    assert 0 < given <= 1
    probe = LDAProbe(share, standardise=False).fit(x, labels)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=given).fit(x, labels)
    np.testing.assert_allclose(probe.coef_, reference.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(probe.intercept_, reference.intercept_, rtol=1e-6)


def test_lda_without_shrinkage_and_standardised_equals_sklearn():
    x, labels = skewed(200, 12)
    probe = LDAProbe(0.0).fit(x * np.geomspace(0.1, 10, 12), labels)
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(x, labels)
    np.testing.assert_allclose(
        probe.decision_function(x * np.geomspace(0.1, 10, 12)),
        reference.decision_function(x),
        rtol=1e-6,
        atol=1e-8,
    )


def test_lda_in_folds_shrinks_each_fold_by_itself():
    x, labels = skewed(90, 40)
    masks = np.stack([np.arange(90) % 3 != fold for fold in range(3)], 1)
    design = Design.of(torch.from_numpy(x), standardise=False)
    coefficients, _ = design.raw(LDAProbe().solve(design, posed(labels, masks)).weights)
    for fold in range(3):
        alone = LDAProbe(standardise=False).fit(x[masks[:, fold]], labels[masks[:, fold]])
        np.testing.assert_allclose(coefficients[fold], alone.coef_[0], rtol=1e-7, atol=1e-10)


def test_whitening_reads_better_where_a_nuisance_is_correlated_with_the_direction():
    random = np.random.default_rng(0)
    labels = np.tile([0, 1], 500)
    nuisance = 5 * random.normal(size=1000)
    x = np.stack([labels + nuisance, nuisance + 0.3 * random.normal(size=1000)], 1)
    right = {
        made: (made().fit(x, labels).predict(x) == labels).mean()
        for made in (MassMeanProbe, LDAProbe, RidgeProbe)
    }
    assert right[LDAProbe] > 0.9
    assert right[RidgeProbe] > 0.9
    assert right[MassMeanProbe] < 0.65


def test_noise_is_not_read_by_lda_when_held_out():
    random = np.random.default_rng(0)
    x, labels = random.normal(size=(30, 128)), np.tile([0, 1], 15)
    fresh = random.normal(size=(3000, 128))
    assert (LDAProbe().fit(x, labels).predict(x) == labels).mean() > 0.9
    assert (LDAProbe().fit(x, labels).predict(fresh) == np.tile([0, 1], 1500)).mean() < 0.55
    # Ledoit and Wolf see that 30 rows say nothing of 128 x 128 covariances, and odds stay modest.
    assert np.abs(LDAProbe().fit(x, labels).decision_function(fresh)).mean() < 15


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_refuses_a_shrinkage_that_is_no_share(share):
    with pytest.raises(DataError, match=r"shrinkage is .*expected a share from 0 to 1"):
        LDAProbe(share).fit(np.eye(4), [0, 1, 0, 1])


@pytest.mark.parametrize("strength", [0, -1.0, float("nan")])
def test_refuses_a_strength_that_is_none(strength):
    with pytest.raises(DataError, match="expected a number above 0"):
        RidgeProbe(C=strength).fit(np.eye(4), [0, 1, 0, 1])


def test_equal_columns_of_weights_are_found():
    columns = torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 1]])
    different, which = alike(columns)
    assert different.shape == (3, 3)
    assert torch.equal(different[:, which], columns)
    assert which[0] == which[2]
