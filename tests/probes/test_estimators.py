"""What holds for every estimator that reads one vector: the contract, the batch, bad data, files, sweeps."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

import veridical as vd
from veridical.errors import InputError, UnknownNameError
from veridical.probes.base import Problems
from veridical.probes.kinds import estimator, kind
from veridical.probes.solver import Design

NAMES = ("logistic", "ridge", "mass_mean", "lda", "lat", "ccs", "ttpd")
every = pytest.mark.parametrize("name", NAMES)

# scikit-learn's checks have no pairs: rows 2i and 2i + 1 are taken as one.
UNPAIRED = {
    "check_positive_only_tag_during_fit": "its twenty rows in order of label are pairs of one class, refused",
    "check_classifiers_train": "its clusters are consecutive rows, which are no contrasting pairs",
    "check_non_transformer_estimators_n_iter": "iris in order of label is pairs of one class, refused",
}


def made(name, **options):
    """The estimator, without polarity where it would need a column."""
    return kind(name)(**({"polarity": None} if name == "ttpd" else {}), **options)


@every
@pytest.mark.filterwarnings("ignore")
def test_sklearn_accepts_the_estimator(name):
    check_estimator(made(name), expected_failed_checks=UNPAIRED if name == "ccs" else {})


@every
def test_finds_the_planted_direction_and_gives_odds_that_are_right(planted, name):
    data = planted(pairs=1200, distance=4.0)
    x = data.acts["signal"]
    probe = made(name).fit(x[:1200], data.labels[:1200], data.pairs[:1200])
    assert probe.direction_ @ data.direction > 0.95
    assert np.linalg.norm(probe.direction_) == pytest.approx(1)
    # Two unit normals four apart: the log-odds rise by four per unit, and are zero halfway, at the origin.
    assert np.linalg.norm(probe.coef_) == pytest.approx(4, rel=0.25)
    assert probe.decision_function(np.zeros((1, 24)))[0] == pytest.approx(0, abs=0.5)
    assert (probe.predict(x[1200:]) == data.labels[1200:]).mean() > 0.95


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ccs"])
def test_odds_are_calibrated_on_new_rows(name):
    random = np.random.default_rng(1)
    labels = np.tile([0, 1, 0, 0], 2000)
    x = random.normal(size=(8000, 6)) * [1, 1, 2, 1, 1, 1] + 2.0 * labels[:, None] * [1, 0, 0, 0, 0, 0]
    x[:, 0] *= 3  # so that the axis of the label is also the widest, which the unsupervised ones need
    groups = np.repeat(np.arange(2000), 4)
    probe = made(name).fit(x[:4000], labels[:4000], groups[:4000])
    given = probe.predict_proba(x[4000:])[:, 1]
    for low, high in ((0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1)):
        inside = (given >= low) & (given < high)
        expected = given[inside].mean()
        assert labels[4000:][inside].mean() == pytest.approx(expected, abs=0.02 + 2 / np.sqrt(inside.sum()))


def batch(data, random, folds=3, shuffles=4):
    """Every fold of true and shuffled labels as columns, with the masks as weights."""
    n = len(data.labels)
    flips = random.integers(0, 2, (n // 2, shuffles)).repeat(2, axis=0)
    labels = np.column_stack([data.labels, np.where(flips, 1 - data.labels[:, None], data.labels[:, None])])
    masks = np.stack([data.pairs % folds != fold for fold in range(folds)], 1).astype(float)
    sets = labels.shape[1]
    return labels.repeat(folds, axis=1).astype(float), np.tile(masks, (1, sets)), sets * folds


@every
@pytest.mark.parametrize("width", [5, 80])
def test_a_problem_among_many_gets_the_numbers_it_gets_alone(planted, name, width):
    data, random = planted(pairs=30, width=width), np.random.default_rng(0)
    labels, masks, count = batch(data, random)
    probe = made(name)
    design = Design.of(torch.from_numpy(data.acts["signal"]), probe.standardise)
    strengths = torch.from_numpy(np.resize([0.01, 1.0], count))
    pairs = torch.from_numpy(data.pairs)
    problems = Problems(torch.from_numpy(labels), torch.from_numpy(masks), strengths, pairs)
    together = probe.solve(design, problems)
    assert together.weights.shape == (design.rows.shape[1], count)
    assert bool(together.converged.all())
    alone = [probe.solve(design, problems.pick(torch.tensor([at]))).weights[:, 0] for at in range(count)]
    torch.testing.assert_close(together.weights, torch.stack(alone, 1), rtol=1e-7, atol=1e-9)
    assert not torch.allclose(together.weights[:, 0], together.weights[:, 1], rtol=1e-2)


@every
def test_rows_of_weight_zero_do_not_count(planted, name):
    data = planted(pairs=60, width=8)
    probe = made(name, standardise=False)
    design = Design.of(torch.from_numpy(data.acts["signal"]), standardise=False)
    labels = torch.from_numpy(data.labels.astype(float))[:, None]
    weights = torch.from_numpy((data.pairs < 40).astype(float))[:, None]
    pairs = torch.from_numpy(data.pairs)
    spoilt = torch.where(weights > 0, labels, 1 - labels)
    one = torch.ones(1, dtype=torch.float64)
    kept = probe.solve(design, Problems(labels, weights, one, pairs)).weights
    torch.testing.assert_close(probe.solve(design, Problems(spoilt, weights, one, pairs)).weights, kept)
    assert not torch.allclose(
        probe.solve(design, Problems(spoilt, weights * 0 + 1, one, pairs)).weights, kept
    )
    # And they are those of a fit on the other rows alone.
    raw = design.raw(kept)[0][0].numpy()
    few = clone(probe).fit(data.acts["signal"][:80], data.labels[:80], data.pairs[:80]).direction_
    assert raw @ few / np.linalg.norm(raw) > (0.99 if name in ("ccs", "ttpd") else 1 - 1e-9)


@pytest.mark.parametrize("name", ["ridge", "mass_mean", "lda", "lat"])
def test_a_pair_of_weight_two_counts_as_two_pairs(planted, name):
    data = planted(pairs=40, width=6)
    x, again = data.acts["signal"], np.r_[0:80, 0:20]
    weights = torch.ones(80, 1, dtype=torch.float64)
    weights[:20] = 2
    probe, one = made(name, standardise=False), torch.ones(1, dtype=torch.float64)
    design = Design.of(torch.from_numpy(x), standardise=False)
    labels = torch.from_numpy(data.labels.astype(float))[:, None]
    weighted = probe.solve(design, Problems(labels, weights, one, torch.from_numpy(data.pairs)))
    groups = np.r_[data.pairs, 100 + data.pairs[:20]]
    repeated = clone(probe).fit(x[again], data.labels[again], groups)
    coefficients, intercept = design.raw(weighted.weights)
    np.testing.assert_allclose(coefficients[0], repeated.coef_[0], rtol=1e-9)
    np.testing.assert_allclose(intercept, repeated.intercept_, rtol=1e-9)


@every
def test_perfectly_separable_data_have_finite_weights(planted, name):
    data = planted(pairs=30, width=4, distance=1e6)
    wide = planted(pairs=10, width=200)
    for at in (data, wide):
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            probe = made(name).fit(at.acts["signal"], at.labels, at.pairs)
            scores = probe.decision_function(at.acts["signal"])
            chances = probe.predict_log_proba(at.acts["signal"])
        assert np.isfinite(scores).all()
        assert np.isfinite(chances).all()
    assert (
        made(name).fit(data.acts["signal"], data.labels, data.pairs).predict(data.acts["signal"])
        == data.labels
    ).all()


@every
def test_classes_without_any_spread_have_finite_weights(name):
    labels = np.tile([0, 1], 10)
    x = np.stack([labels, np.ones(20), 1 - labels], 1).astype(float)
    probe = made(name).fit(x, labels, np.repeat(np.arange(10), 2))
    assert np.isfinite(probe.coef_).all()
    assert (probe.predict(x) == labels).all()
    assert probe.coef_[0, 1] == 0


@every
def test_constant_features_get_no_weight(planted, name):
    data = planted(pairs=60)
    x = data.acts["signal"].copy()
    x[:, 3] = 1e6 + 0.1
    probe = made(name).fit(x, data.labels, data.pairs)
    assert abs(probe.coef_[0, 3]) < 1e-9
    assert np.isfinite(probe.decision_function(x)).all()
    assert probe.decision_function(x).std() > 0.1


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_what_is_not_finite(planted, name, bad):
    data = planted(pairs=10)
    x = data.acts["signal"].copy()
    x[3, 2] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        made(name).fit(x, data.labels, data.pairs)


@every
def test_refuses_one_class(planted, name):
    data = planted(pairs=10)
    with pytest.raises(ValueError, match="one class only"):
        made(name).fit(data.acts["signal"], np.zeros(20), data.pairs)


@every
def test_a_problem_without_one_class_says_nothing_and_stays_finite(planted, name):
    data = planted(pairs=20, width=5)
    probe = made(name)
    labels = torch.from_numpy(np.stack([data.labels, np.ones(40)], 1).astype(float))
    problems = Problems(
        labels, torch.ones_like(labels), torch.ones(2, dtype=torch.float64), torch.from_numpy(data.pairs)
    )
    weights = probe.solve(Design.of(torch.from_numpy(data.acts["signal"])), problems).weights
    assert torch.isfinite(weights).all()
    assert weights[:-1, 1].norm() < 1e-2 * weights[:-1, 0].norm()
    assert weights[-1, 1] > 3


@every
def test_refuses_groups_of_another_length(planted, name):
    data = planted(pairs=10)
    with pytest.raises(ValueError, match="groups has shape"):
        made(name).fit(data.acts["signal"], data.labels, data.pairs[:-1])


@every
def test_a_saved_probe_gives_the_same_numbers(planted, name, tmp_path):
    data = planted(pairs=20)
    probe = made(name, standardise=True).fit(data.acts["signal"], data.labels == 1, data.pairs)
    loaded = vd.load_probe(probe.save(tmp_path / name))
    assert type(loaded) is type(probe)
    assert loaded.get_params() == probe.get_params()
    assert np.array_equal(loaded.predict_proba(data.acts["signal"]), probe.predict_proba(data.acts["signal"]))
    assert np.array_equal(loaded.direction_, probe.direction_)
    assert probe.said() in (tmp_path / name / "README.md").read_text()


@every
def test_scales_and_shifts_of_features_do_not_matter_when_standardised(planted, name):
    data = planted(pairs=60)
    x = data.acts["signal"]
    plain = made(name, standardise=True).fit(x, data.labels, data.pairs)
    other = x * np.geomspace(0.01, 100, 24) - 7
    moved = made(name, standardise=True).fit(other, data.labels, data.pairs)
    np.testing.assert_allclose(
        moved.decision_function(other), plain.decision_function(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["ridge", "mass_mean", "lda", "lat", "ccs", "ttpd"])
def test_a_sweep_takes_the_estimator(planted, quick, name, tmp_path):
    data = planted()
    sweep = vd.fit_probes(data.acts, probe=made(name), target=data.labels, groups=data.pairs, **quick)
    assert sweep.best_site == "signal"
    assert sweep["signal"].metrics["auroc"].value > 0.9
    assert sweep["noise"].metrics["auroc"].value < 0.75
    # Estimators without labels find the same direction under every shuffle, with a sign by chance.
    assert np.mean(sweep["signal"].control) < 0.7
    assert sweep.to_frame()["auroc"].notna().all()
    assert sweep.report_section().text
    again = vd.ProbeSweep.load(sweep.save(tmp_path / "sweep"))
    assert np.array_equal(again.best().coef_, sweep.best().coef_)
    held = sweep.best()
    assert held.direction_ @ data.direction > 0.8
    assert (held.predict(data.acts["signal"]) == data.labels).mean() > 0.85


def test_a_sweep_hands_the_named_columns_over(planted, quick):
    data = planted()
    flips = np.random.default_rng(0).integers(0, 2, 150).repeat(2)
    rows = {"pair": data.pairs, "label": data.labels, "form": data.labels ^ flips, "kind": data.pairs % 2}
    for probe in (kind("ccs")("form"), kind("ttpd")("kind")):
        sweep = vd.fit_probes(data.acts, probe=probe, target="label", rows=rows, **quick)
        assert sweep["signal"].metrics["auroc"].value > 0.9
        misnamed = clone(probe).set_params(**{probe.columns[0]: "fom"})
        with pytest.raises(UnknownNameError, match="unknown column 'fom'; nearest: form"):
            vd.fit_probes(data.acts, probe=misnamed, target="label", rows=rows, **quick)


def test_parameters_follow_the_name_after_colons():
    made = estimator("ridge:C=0.5:standardise=false")
    assert (made.name, made.C, made.standardise) == ("ridge", 0.5, False)
    assert estimator("ttpd:polarity=null").polarity is None
    assert estimator("lda").get_params() == kind("lda")().get_params()
    for said, error in (("lda:Z=1", "unknown parameter of lda 'Z'"), ("lda:C", "expected PARAMETER=VALUE")):
        with pytest.raises(InputError, match=error):
            estimator(said)


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(UnknownNameError, match="mass_mean"):
        kind("massmean")
