"""The estimator: scikit-learn's own checks, tensors, the direction, what it refuses."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from veridical import LogisticProbe
from veridical.errors import DataError

torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore")
def test_sklearn_accepts_the_estimator():
    check_estimator(LogisticProbe())


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_equals_sklearn_on_standardised_data_in_raw_space(planted, strength):
    data = planted()
    x, y = data.acts["signal"] * np.linspace(0.1, 10, 24), data.labels
    probe = LogisticProbe(C=strength).fit(x, y)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-10, max_iter=10_000))
    reference.fit(x, y)
    np.testing.assert_allclose(
        probe.decision_function(x), reference.decision_function(x), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(probe.predict_proba(x), reference.predict_proba(x), atol=1e-5)
    np.testing.assert_allclose(x @ probe.coef_[0] + probe.intercept_[0], probe.decision_function(x))


def test_without_standardising_it_is_plain_logistic_regression(planted):
    data = planted()
    probe = LogisticProbe(standardise=False).fit(data.acts["signal"], data.labels)
    reference = LogisticRegression(tol=1e-10, max_iter=10_000).fit(data.acts["signal"], data.labels)
    np.testing.assert_allclose(probe.coef_, reference.coef_, rtol=1e-4, atol=1e-6)
    assert not np.allclose(probe.coef_, LogisticProbe().fit(data.acts["signal"], data.labels).coef_)


def test_direction_is_the_unit_normal_in_activation_space(planted):
    data = planted(pairs=1000)
    scales = np.linspace(0.5, 2, 24)
    probe = LogisticProbe(C=0.1).fit(data.acts["signal"] * scales, data.labels)
    assert np.linalg.norm(probe.direction_) == pytest.approx(1)
    # For isotropic noise scaled by s, the optimal normal in raw space is the planted direction over s.
    wanted = data.direction / scales
    assert probe.direction_ @ wanted / np.linalg.norm(wanted) > 0.95
    inside = data.acts["signal"] * scales
    moved = probe.decision_function(inside + probe.direction_) - probe.decision_function(inside)
    np.testing.assert_allclose(moved, np.linalg.norm(probe.coef_))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_takes_tensors_of_any_float_type_and_computes_in_float64(planted, dtype):
    data = planted()
    x = torch.from_numpy(data.acts["signal"]).to(dtype)
    probe = LogisticProbe().fit(x, torch.from_numpy(data.labels))
    same = LogisticProbe().fit(x.to(torch.float64).numpy(), data.labels)
    assert np.array_equal(probe.coef_, same.coef_)
    assert probe.coef_.dtype == np.float64
    assert np.array_equal(probe.predict_proba(x), same.predict_proba(x.to(torch.float64).numpy()))


def test_labels_keep_their_names_and_the_second_is_positive(planted):
    data = planted()
    named = np.where(data.labels == 1, "true", "false")
    probe = LogisticProbe().fit(data.acts["signal"], named)
    assert list(probe.classes_) == ["false", "true"]
    assert (probe.predict(data.acts["signal"]) == named).mean() > 0.8
    assert probe.direction_ @ data.direction > 0.8


def test_probabilities_stay_sound_far_from_the_plane(planted):
    data = planted()
    probe = LogisticProbe().fit(data.acts["signal"], data.labels)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        far = probe.predict_log_proba(probe.direction_[None] * 1e4)
    assert np.isfinite(far).all()
    assert probe.predict_proba(probe.direction_[None] * 1e4)[0].tolist() == [0.0, 1.0]


def test_constant_and_huge_features_do_no_harm(planted):
    data = planted()
    x = data.acts["signal"].copy()
    x[:, 0] = 1e6 + 0.1
    x[:, 1] *= 1e8
    probe = LogisticProbe().fit(x, data.labels)
    assert probe.coef_[0, 0] == 0
    assert np.isfinite(probe.decision_function(x)).all()


@pytest.mark.parametrize(
    ("labels", "said"), [(np.zeros(20), "one class only"), (np.arange(20) % 3, "Only binary"), (None, "y")]
)
def test_refuses_labels_that_are_not_two_classes(labels, said):
    with pytest.raises(ValueError, match=said):
        LogisticProbe().fit(np.random.default_rng(0).normal(size=(20, 3)), labels)


def test_refuses_a_strength_that_is_none():
    with pytest.raises(DataError, match="C is 0"):
        LogisticProbe(C=0).fit(np.eye(4), [0, 1, 0, 1])


def test_works_in_sklearn_tools(planted):
    data = planted()
    probe = clone(LogisticProbe(C=0.01))
    assert probe.C == 0.01
    assert cross_val_score(probe, data.acts["signal"], data.labels, scoring="roc_auc").mean() > 0.9
    assert cross_val_score(probe, data.acts["noise"], data.labels, scoring="roc_auc").mean() < 0.7
