"""TTPD on planted affirmative and negated statements, against numpy, scikit-learn and the authors' recipe."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import veridical as vd
from veridical import LogisticProbe
from veridical.errors import DataError, UnknownNameError
from veridical.probes.base import Problems
from veridical.probes.mass_mean import MassMeanProbe
from veridical.probes.solver import Design
from veridical.probes.ttpd import TTPDProbe, truth_directions


def statements(rows=800, width=12, seed=0, negated=0.5, general=1.5, sensitive=4.0, parted=3.0):
    """Truth along axis 0, truth times polarity (stronger) along axis 1, polarity along axis 2."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 2, rows)
    polarity = np.where(random.random(rows) < negated, -1, 1)
    sign = 2 * truth - 1
    x = random.normal(size=(rows, width)) + 2
    x[:, 0] += general * sign
    x[:, 1] += sensitive * sign * polarity
    x[:, 2] += parted * polarity
    return x, truth, polarity


@pytest.mark.parametrize("width", [12, 1200])
def test_the_truth_directions_are_those_of_least_squares(width):
    x, truth, polarity = statements(rows=300, width=width, negated=0.3)
    masks = np.stack([np.ones(300), np.arange(300) % 3 > 0], 1).astype(float)
    design = Design.of(torch.from_numpy(x), standardise=False)
    problems = Problems(
        torch.from_numpy(truth[:, None].repeat(2, 1).astype(float)),
        torch.from_numpy(masks),
        torch.ones(2, dtype=torch.float64),
    )
    general, sensitive = truth_directions(design, problems, torch.from_numpy(polarity.astype(float)))
    for at in range(2):
        rows = masks[:, at] > 0
        centred, sign = x[rows] - x[rows].mean(0), 2.0 * truth[rows] - 1
        wanted = np.linalg.lstsq(np.stack([sign, sign * polarity[rows]], 1), centred)[0]
        np.testing.assert_allclose((design.basis @ general[:, at]).numpy(), wanted[0], atol=1e-10)
        assert sensitive is not None
        np.testing.assert_allclose((design.basis @ sensitive[:, at]).numpy(), wanted[1], atol=1e-10)


def test_it_equals_the_steps_of_the_paper_done_with_sklearn():
    x, truth, polarity = statements(parted=0.5)
    probe = TTPDProbe(C=1e6).fit(x, truth, polarity=polarity)
    sign, plain = 2.0 * truth - 1, {"C": np.inf, "tol": 1e-10, "max_iter": 10_000}
    general = np.linalg.lstsq(np.stack([sign, sign * polarity], 1), x - x.mean(0))[0][0]
    about = LogisticRegression(**plain).fit(x, polarity).coef_[0]
    plane = np.stack([x @ general, x @ about], 1)
    plane /= plane.std(0)
    reference = LogisticRegression(**plain).fit(plane, truth)
    np.testing.assert_allclose(
        probe.decision_function(x), reference.decision_function(plane), rtol=2e-3, atol=2e-3
    )


def test_it_reads_truth_in_statements_of_either_polarity():
    x, truth, polarity = statements()
    fresh, wanted, turned = statements(seed=1)
    probe = TTPDProbe().fit(x, truth, polarity=polarity)
    right = probe.predict(fresh) == wanted
    assert right[turned > 0].mean() > 0.85
    assert right[turned < 0].mean() > 0.85
    assert abs(probe.direction_[1]) < 0.15
    # A probe of affirmative statements alone reads the polarity-sensitive direction and inverts on others.
    naive = MassMeanProbe().fit(x[polarity > 0], truth[polarity > 0])
    assert (naive.predict(fresh) == wanted)[turned > 0].mean() > 0.95
    assert (naive.predict(fresh) == wanted)[turned < 0].mean() < 0.15


def test_few_negated_statements_are_enough_where_a_mean_difference_is_misled():
    x, truth, polarity = statements(rows=2000, negated=0.1)
    fresh, wanted, _ = statements(seed=1, negated=1.0)
    probe = TTPDProbe().fit(x, truth, polarity=polarity)
    assert (probe.predict(fresh) == wanted).mean() > 0.8
    assert (MassMeanProbe().fit(x, truth).predict(fresh) == wanted).mean() < 0.3


def test_the_names_of_the_polarities_do_not_matter():
    x, truth, polarity = statements(rows=200)
    first = TTPDProbe().fit(x, truth, polarity=polarity)
    for named in (np.where(polarity > 0, "affirmative", "negated"), polarity < 0, torch.from_numpy(polarity)):
        again = TTPDProbe("kind").fit(x, truth, polarity=named)
        np.testing.assert_allclose(again.coef_, first.coef_, rtol=1e-5, atol=1e-9)
    spoilt = TTPDProbe().fit(x, truth, polarity=np.random.default_rng(0).permutation(polarity))
    assert not np.allclose(spoilt.coef_, first.coef_, rtol=0.1)


def test_the_unit_of_the_activations_does_not_matter():
    x, truth, polarity = statements(rows=200, width=40)
    first = TTPDProbe(C=0.1).fit(x, truth, polarity=polarity)
    tiny = TTPDProbe(C=0.1).fit(1e-3 * x, truth, polarity=polarity)
    np.testing.assert_allclose(
        tiny.decision_function(1e-3 * x), first.decision_function(x), rtol=1e-5, atol=1e-7
    )


def test_without_polarity_it_is_a_logistic_scale_on_the_mean_difference():
    x, truth, polarity = statements(rows=400)
    x, truth = x[polarity > 0], truth[polarity > 0]
    probe = TTPDProbe(polarity=None).fit(x, truth)
    assert probe.direction_ @ MassMeanProbe().fit(x, truth).direction_ == pytest.approx(1)
    reference = LogisticProbe(C=1e4).fit((x @ probe.direction_)[:, None], truth)
    np.testing.assert_allclose(
        probe.decision_function(x),
        reference.decision_function((x @ probe.direction_)[:, None]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_fold_of_one_polarity_falls_back_on_the_mean_difference():
    x, truth, polarity = statements(rows=200)
    design = Design.of(torch.from_numpy(x), standardise=False)
    weights = torch.from_numpy((polarity > 0).astype(float))[:, None]
    problems = Problems(
        torch.from_numpy(truth.astype(float))[:, None],
        weights,
        torch.ones(1, dtype=torch.float64),
        columns={"polarity": polarity},
    )
    found = design.raw(TTPDProbe().solve(design, problems).weights)[0][0].numpy()
    assert np.isfinite(found).all()
    general = design.basis @ truth_directions(design, problems, torch.from_numpy(polarity * 1.0))[0][:, 0]
    wanted = truth[polarity > 0] * 2.0 - 1
    kept = x[polarity > 0]
    np.testing.assert_allclose(general.numpy(), wanted @ (kept - kept.mean(0)) / len(kept), atol=1e-10)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({}, r"needs that column: fit\(X, y, polarity=values\)"),
        ({"polarity": np.ones(20)}, r"polarity has 1 values \(1.0\); expected two"),
        ({"polarity": np.arange(20)}, r"polarity has 20 values"),
        ({"polarity": np.arange(19) % 2}, "polarity has shape"),
    ],
)
def test_refuses_a_polarity_that_is_none(columns, said):
    with pytest.raises(DataError, match=said):
        TTPDProbe().fit(np.random.default_rng(0).normal(size=(20, 3)), np.tile([0, 1], 10), **columns)


def test_a_sweep_without_the_column_says_which_one_it_needs_and_how_to_give_it():
    x, truth, polarity = statements(rows=80)
    options = {"bootstrap": 10, "shuffles": 2, "text_baseline": False, "progress": False}
    rows = {"label": truth, "negatd": polarity < 0}
    with pytest.raises(UnknownNameError) as caught:
        vd.fit_probes({"site": x}, rows=rows, probe=TTPDProbe("negated"), **options)
    said = str(caught.value)
    assert "\n" not in said
    for part in (
        "unknown column 'negated'; nearest: negatd",
        "a column of two values beside the label",
        "whether it is affirmative or negated",
        "such a column named negated",
        'TTPDProbe(polarity="column")',
        "TTPDProbe(polarity=None)",
        "--estimator ttpd:polarity=column",
    ):
        assert part in said
    for probe in (TTPDProbe("negatd"), "ttpd:polarity=negatd", TTPDProbe(polarity=None)):
        assert vd.fit_probes({"site": x}, rows=rows, probe=probe, **options).best().name == "ttpd"


def test_refuses_columns_that_it_does_not_read():
    with pytest.raises(TypeError, match="unexpected keyword argument 'polarity'"):
        LogisticProbe().fit(np.eye(4), [0, 1, 0, 1], polarity=[0, 0, 1, 1])
