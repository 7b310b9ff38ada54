"""Calibration: curves against scikit-learn's, errors against plain loops, and what a probe carries."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.calibration import _SigmoidCalibration
from sklearn.metrics import brier_score_loss

import veridical as vd
from veridical.errors import DataError
from veridical.probes import LogisticProbe, calibration
from veridical.probes.firing import balanced_threshold, false_positive_threshold
from veridical.reporting.section import Reportable


@pytest.fixture(scope="module")
def sweep(planted, quick):
    data = planted(pairs=300, width=40, distance=1.5)
    return vd.fit_probes(data.acts, target=data.labels, groups=data.pairs, **quick)


def scored(n=400, seed=0):
    random = np.random.default_rng(seed)
    scores = 3 * random.normal(size=n) + 1
    return scores, random.random(n) < expit(0.4 * scores - 1)


def test_platts_curve_is_sklearns():
    scores, positive = scored()
    theirs = _SigmoidCalibration().fit(scores, positive)
    grid = np.linspace(-8, 10, 50)
    curve = calibration.fit_platt(scores, positive)
    np.testing.assert_allclose(calibration.platt(grid, curve), theirs.predict(grid), atol=1e-4)
    assert curve["slope"] == pytest.approx(0.4, abs=0.12)
    assert curve["intercept"] == pytest.approx(-1, abs=0.35)


def test_platts_curve_makes_his_gradient_zero_and_is_finite_on_separable_scores():
    for scores, positive in (scored(), (np.linspace(-1, 1, 20), np.arange(20) >= 10)):
        curve = calibration.fit_platt(scores, positive)
        n1, n0 = positive.sum(), (~positive).sum()
        hopes = np.where(positive, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
        left = calibration.platt(scores, curve) - hopes
        np.testing.assert_allclose([left.sum(), (left * scores).sum()], 0, atol=1e-3)
        assert np.isfinite(list(curve.values())).all()
        assert curve["slope"] > 0


def test_errors_and_intervals_equal_plain_loops(sweep):
    found = sweep.calibration(bins=5)
    result, labels = sweep[sweep.best_site], sweep.labels
    probability = expit(result.test_scores)
    frame = found.to_frame().set_index("method")
    assert frame.loc["as given", "brier"] == pytest.approx(brier_score_loss(labels.test, probability))
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(order, 5)
    slow = sum(abs(probability[p].mean() - labels.test[p].mean()) * len(p) for p in parts) / len(order)
    assert frame.loc["as given", "ece"] == pytest.approx(slow)
    bins = found.bins[found.bins["method"] == "as given"]
    assert bins["rows"].tolist() == [len(p) for p in parts]
    np.testing.assert_allclose(bins["share"], [labels.test[p].mean() for p in parts])
    assert (bins["low"] <= bins["share"]).all()
    assert (bins["share"] <= bins["high"]).all()
    assert (frame["ece_low"] < frame["ece_high"]).all()
    assert found.rows == {"fit_vectors": 420, "test_vectors": 180, "test_pairs": 90}


def test_equal_probabilities_share_a_bin():
    values = np.array([0.1] * 6 + [0.5, 0.6, 0.9, 0.9])
    number = calibration.bin_numbers(values, 5)
    assert len(set(number[:6])) == 1
    assert number[8] == number[9]
    assert number.tolist() == sorted(number)
    assert set(number) == set(range(number.max() + 1))


def test_both_curves_mend_a_probe_that_is_too_sure(planted, quick):
    data = planted(pairs=400, width=60, distance=1.5)
    data.acts.pop("noise")
    unpenalised = vd.fit_probes(
        data.acts,
        target=data.labels,
        groups=data.pairs,
        **{**quick, "strengths": (1e4,), "test_fraction": 0.5},
    )
    frame = unpenalised.calibration().to_frame().set_index("method")
    assert frame.loc["as given", "ece"] > 0.05
    assert frame.loc["Platt", "ece"] < frame.loc["as given", "ece"]
    assert frame.loc["Platt", "brier"] < frame.loc["as given", "brier"]
    assert frame.loc["isotonic", "brier"] < frame.loc["as given", "brier"]
    assert unpenalised.best().origin_.calibration["slope"] < 1


def test_the_chosen_probe_carries_its_curve_and_thresholds_also_when_saved(sweep, planted, tmp_path):
    probe = sweep.best()
    result, fitted = sweep[sweep.best_site], sweep.labels.fit
    assert probe.origin_.calibration == pytest.approx(calibration.fit_platt(result.out_of_fold, fitted))
    assert probe.origin_.thresholds == {
        "balanced": balanced_threshold(result.out_of_fold, fitted),
        "fpr1": false_positive_threshold(result.out_of_fold[~fitted]),
    }
    assert (result.out_of_fold[~fitted] > probe.origin_.thresholds["fpr1"]).mean() <= 0.01
    loaded = vd.load_probe(probe.save(tmp_path / "probe"))
    assert loaded.origin_ == probe.origin_
    x = planted(pairs=300, width=40, distance=1.5).acts["signal"][:20]
    expected = expit(
        probe.origin_.calibration["slope"] * probe.decision_function(x)
        + probe.origin_.calibration["intercept"]
    )
    np.testing.assert_allclose(calibration.calibrated_proba(loaded, x), expected, rtol=1e-12)
    card = (tmp_path / "probe" / "README.md").read_text()
    assert "calibrated probability (Platt)" in card
    assert "1 % false positives (out of fold)" in card


def test_a_loaded_sweep_gives_the_same_calibration(sweep, tmp_path):
    loaded = vd.ProbeSweep.load(sweep.save(tmp_path / "sweep"))
    pd.testing.assert_frame_equal(loaded.calibration().to_frame(), sweep.calibration().to_frame())
    pd.testing.assert_frame_equal(loaded.calibration().bins, sweep.calibration().bins)


def test_it_can_be_shown(sweep):
    found = sweep.calibration("noise")
    assert isinstance(found, Reportable)
    assert "\n" not in repr(found)
    assert "<table" in found._repr_html_()
    names = [trace.name for trace in found.figure().data]
    assert {"perfect", "as given", "Platt", "isotonic"} <= set(names)
    assert found.report_section().headline[0][1].count(",") == 1
    assert "expected calibration error" in found.findings()[0]


def test_bad_input(sweep):
    with pytest.raises(DataError, match="bins is 1; expected 2 to 180"):
        sweep.calibration(bins=1)
    with pytest.raises(DataError, match="carries no calibration"):
        calibration.calibrated_proba(LogisticProbe().fit(np.eye(4), [0, 1, 0, 1]), np.eye(4))
