"""Stacking over sites: what it gains, that no row scores itself, files, what it refuses."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

import veridical as vd
from veridical.errors import DamagedFileError, DataError, UnknownNameError
from veridical.pairs.splits import assign, folds
from veridical.probes import LogisticProbe
from veridical.probes.ccs import CCSProbe
from veridical.probes.mass_mean import MassMeanProbe
from veridical.probes.stacked import StackedProbe
from veridical.probes.ttpd import TTPDProbe


def halves(pairs=200, seed=0, distance=1.5):
    """Two sites that each hold a part of the label in noise of their own, and one that holds nothing."""
    random = np.random.default_rng(seed)
    labels, groups = np.tile([0, 1], pairs), np.repeat(np.arange(pairs), 2)
    sites = {
        name: random.normal(size=(2 * pairs, width))
        for name, width in (("early", 8), ("late", 12), ("none", 5))
    }
    for name in ("early", "late"):
        sites[name][:, 0] += distance * labels
    return sites, labels, groups


def test_two_sites_read_more_than_either():
    sites, labels, groups = halves()
    fresh, wanted, _ = halves(seed=1)
    stacked = StackedProbe().fit(sites, labels, groups)
    reached = roc_auc_score(wanted, stacked.decision_function(fresh))
    single = {
        name: roc_auc_score(wanted, LogisticProbe().fit(x, labels).decision_function(fresh[name]))
        for name, x in sites.items()
    }
    assert reached > max(single.values()) + 0.04
    assert abs(stacked.mixture_["none"]) < 0.5 * min(stacked.mixture_["early"], stacked.mixture_["late"])
    assert (stacked.predict(fresh) == wanted).mean() > 0.8


def test_it_is_a_logistic_regression_on_scores_of_held_out_pairs():
    sites, labels, groups = halves(pairs=60)
    probe = StackedProbe(LogisticProbe(C=0.1), C=0.5, folds=4, seed=3).fit(sites, labels, groups)
    scores = np.empty((120, 3))
    for at, x in enumerate(sites.values()):
        # As in a sweep, features are scaled by all fitted rows: their labels are not seen, their spread is.
        scaled = StandardScaler().fit_transform(x)
        for train, held in folds(groups, 4, 3, labels):
            one = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(scaled[train], labels[train])
            scores[held, at] = one.decision_function(scaled[held])
    final = LogisticProbe(C=0.5).fit(scores, labels)
    np.testing.assert_allclose(list(probe.mixture_.values()), final.coef_[0], rtol=1e-3, atol=1e-5)
    each = [LogisticProbe(C=0.1).fit(x, labels).decision_function(x) for x in sites.values()]
    np.testing.assert_allclose(
        probe.decision_function(sites), final.decision_function(np.stack(each, 1)), rtol=1e-3, atol=1e-4
    )


def test_scores_of_fitted_rows_would_trust_noise():
    random = np.random.default_rng(0)
    labels, groups = np.tile([0, 1], 50), np.repeat(np.arange(50), 2)
    sites = {
        "wide": random.normal(size=(100, 300)),
        "signal": random.normal(size=(100, 3)) + 1.0 * labels[:, None],
    }
    honest = StackedProbe().fit(sites, labels, groups)
    probes = {name: LogisticProbe().fit(x, labels) for name, x in sites.items()}
    seen = {name: probe.decision_function(sites[name]) for name, probe in probes.items()}
    fooled = StackedProbe.from_scores(seen, labels, probes)
    fresh = {
        "wide": random.normal(size=(100, 300)),
        "signal": random.normal(size=(100, 3)) + 1.0 * labels[:, None],
    }
    reached, lost = (roc_auc_score(labels, probe.decision_function(fresh)) for probe in (honest, fooled))
    assert reached > lost + 0.1


def test_from_scores_is_fit_without_fitting_again():
    sites, labels, groups = halves(pairs=60)
    fitted = StackedProbe("ridge", folds=3).fit(sites, labels, groups)
    probes = {name: vd.probes.kinds.kind("ridge")().fit(x, labels, groups) for name, x in sites.items()}
    scores = {}
    for name, x in sites.items():
        scores[name] = np.empty(120)
        for train, held in folds(groups, 3, 0, labels):
            scaled = StandardScaler().fit(x)
            one = vd.probes.kinds.kind("ridge")(standardise=False).fit(
                scaled.transform(x)[train], labels[train]
            )
            scores[name][held] = one.decision_function(scaled.transform(x)[held])
    made = StackedProbe.from_scores(scores, labels, probes, folds=3)
    assert made.sites_ == fitted.sites_
    np.testing.assert_allclose(made.decision_function(sites), fitted.decision_function(sites), rtol=1e-6)
    assert made.said() == fitted.said()


def test_it_is_linear_with_a_direction_per_site():
    sites, labels, groups = halves()
    probe = StackedProbe("mass_mean").fit(sites, labels, groups)
    assert list(probe.direction_) == ["early", "late", "none"]
    before = probe.decision_function(sites)
    for name, direction in probe.direction_.items():
        assert np.linalg.norm(direction) == pytest.approx(1)
        moved = probe.decision_function({**sites, name: sites[name] + direction})
        np.testing.assert_allclose(moved - before, np.linalg.norm(probe.coef_[name]))
    assert probe.direction_["early"][0] > 0.9
    np.testing.assert_allclose(
        np.concatenate(list(sites.values()), 1) @ np.concatenate(list(probe.coef_.values()))
        + probe.intercept_,
        before,
    )
    assert probe.predict_proba(sites).sum(1) == pytest.approx(1)


def test_pairs_and_columns_reach_the_base():
    sites, labels, groups = halves(pairs=60, distance=4)
    side = np.where(np.repeat(np.random.default_rng(0).integers(0, 2, 60), 2), labels, 1 - labels)
    with_pairs = StackedProbe(CCSProbe("side", restarts=3)).fit(sites, labels, groups, side=side)
    assert (with_pairs.predict(sites) == labels).mean() > 0.9
    polarity = np.repeat([0, 1], 60)
    with_column = StackedProbe(TTPDProbe()).fit(sites, labels, groups, polarity=polarity)
    assert (with_column.predict(sites) == labels).mean() > 0.9


def test_folds_keep_pairs_together():
    sites, labels, groups = halves(pairs=40)
    # Rows of a pair are nearly equal, with opposite labels: a fold with one of them would invert the other.
    twins = {"x": np.random.default_rng(0).normal(size=(40, 60)).repeat(2, 0) + 1e-3 * sites["none"][:, :1]}
    probe = StackedProbe(LogisticProbe(C=10.0)).fit(twins, labels, groups)
    apart = StackedProbe(LogisticProbe(C=10.0)).fit(twins, labels)
    assert abs(probe.mixture_["x"]) < abs(apart.mixture_["x"])


def test_tensors_of_any_float_type():
    sites, labels, groups = halves(pairs=40)
    halved = {name: torch.from_numpy(x).to(torch.bfloat16) for name, x in sites.items()}
    probe = StackedProbe().fit(halved, torch.from_numpy(labels), torch.from_numpy(groups))
    same = StackedProbe().fit(
        {name: x.to(torch.float64).numpy() for name, x in halved.items()}, labels, groups
    )
    assert np.array_equal(probe.decision_function(halved), same.decision_function(halved))


@pytest.mark.parametrize("base", ["logistic", MassMeanProbe(standardise=True), TTPDProbe(polarity=None)])
def test_a_saved_stack_gives_the_same_numbers(tmp_path, base):
    sites, labels, groups = halves(pairs=40)
    many = {f"blocks.{at}.hook_resid_post": sites["early"] + at for at in range(12)}
    probe = StackedProbe(base, C=0.3).fit(many, np.where(labels, "yes", "no"), groups)
    loaded = vd.load_probe(probe.save(tmp_path / "stack"))
    assert isinstance(loaded, StackedProbe)
    assert loaded.sites_ == tuple(many)
    assert np.array_equal(loaded.predict_proba(many), probe.predict_proba(many))
    assert loaded.mixture_ == probe.mixture_
    assert loaded.said() == probe.said()
    assert repr(loaded).partition(":")[2] == repr(probe).partition(":")[2]
    assert "blocks.3.hook_resid_post" in (tmp_path / "stack" / "README.md").read_text()
    content = bytearray((tmp_path / "stack" / "weights.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "stack" / "weights.safetensors").write_bytes(content)
    with pytest.raises(DamagedFileError, match="weights"):
        vd.load_probe(tmp_path / "stack")


def test_the_config_of_a_saved_stack_names_its_base(tmp_path):
    sites, labels, groups = halves(pairs=20)
    StackedProbe(LogisticProbe(C=0.2)).fit(sites, labels, groups).save(tmp_path / "stack")
    parameters = json.loads((tmp_path / "stack" / "config.json").read_text())["parameters"]
    assert parameters["base"]["kind"] == "logistic"
    assert parameters["base"]["parameters"]["C"] == 0.2


def test_the_order_and_further_sites_do_not_matter_when_reading():
    sites, labels, groups = halves(pairs=40)
    probe = StackedProbe().fit({"early": sites["early"], "late": sites["late"]}, labels, groups)
    turned = {"none": sites["none"], "late": sites["late"], "early": sites["early"]}
    np.testing.assert_allclose(probe.decision_function(turned), probe.decision_function(sites))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"early": np.zeros((5, 8))}, r"site late has shape \(80, 12\); expected \[5, d\]"),
        ({"late": np.zeros((79, 12))}, r"site late has shape \(79, 12\); expected \[80, d\]"),
        ({"late": np.zeros(80)}, "site late has shape"),
        ({"late": np.full((80, 12), np.nan)}, "site late has NaN or infinity in 80 of 80 rows"),
    ],
)
def test_refuses_sites_that_do_not_fit_together(change, said):
    sites, labels, groups = halves(pairs=40)
    with pytest.raises(DataError, match=said):
        StackedProbe().fit({**sites, **change}, labels, groups)


def test_refuses_what_is_no_dict_of_sites():
    sites, labels, groups = halves(pairs=20)
    for x, said in ((sites["early"], "ndarray arrived"), ({}, "an empty dict arrived")):
        with pytest.raises(DataError, match=said):
            StackedProbe().fit(x, labels, groups)
    probe = StackedProbe().fit(sites, labels, groups)
    with pytest.raises(DataError, match="ndarray arrived"):
        probe.predict(sites["early"])
    with pytest.raises(UnknownNameError, match="unknown site 'late'"):
        probe.predict({"early": sites["early"], "none": sites["none"]})
    with pytest.raises(DataError, match="site late has width 8; the probe was fitted on 12"):
        probe.predict({**sites, "late": sites["early"]})


def test_refuses_labels_bases_and_folds_that_do_not_fit():
    sites, labels, groups = halves(pairs=20)
    with pytest.raises(DataError, match="y has shape"):
        StackedProbe().fit(sites, labels[:-1], groups)
    with pytest.raises(DataError, match="one class only"):
        StackedProbe().fit(sites, labels * 0, groups)
    with pytest.raises(DataError, match="at least 21 pairs"):
        StackedProbe(folds=21).fit(sites, labels, groups)
    with pytest.raises(DataError, match="expected an estimator of one site"):
        StackedProbe(StackedProbe()).fit(sites, labels, groups)
    with pytest.raises(UnknownNameError, match="nearest: logistic"):
        StackedProbe("logistik").fit(sites, labels, groups)
    with pytest.raises(DataError, match="C is 0"):
        StackedProbe(C=0).fit(sites, labels, groups)


def test_refuses_scores_that_belong_to_other_probes():
    sites, labels, _ = halves(pairs=20)
    probes = {name: LogisticProbe().fit(sites[name], labels) for name in ("early", "late")}
    scores = {name: probe.decision_function(sites[name]) for name, probe in probes.items()}
    with pytest.raises(DataError, match="expected the same sites"):
        StackedProbe.from_scores({"late": scores["late"]}, labels, probes)
    with pytest.raises(DataError, match=r"tells \[0, 1\] apart; the labels are \[2, 3\]"):
        StackedProbe.from_scores(scores, labels + 2, probes)


@pytest.mark.parametrize("probe", [StackedProbe(), "stacked"])
def test_a_sweep_of_one_site_at_a_time_says_what_to_do_instead(probe):
    sites, labels, groups = halves(pairs=40)
    with pytest.raises(DataError, match=r"reads several sites.*StackedProbe\.from_sweep\(sweep\)") as caught:
        vd.fit_probes(sites, probe=probe, target=labels, groups=groups, bootstrap=10, progress=False)
    assert "\n" not in str(caught.value)


def test_a_sweep_is_stacked_and_judged_on_its_held_out_pairs(tmp_path):
    sites, labels, groups = halves(pairs=200)
    sweep = vd.fit_probes(sites, target=labels, groups=groups, bootstrap=50, shuffles=2, progress=False)
    stack = StackedProbe.from_sweep(sweep)
    scores = {result.site: result.out_of_fold for result in sweep.results}
    kept = {result.site: result.probe for result in sweep.results}
    slow = StackedProbe.from_scores(scores, sweep.labels.fit.astype(int), kept)
    np.testing.assert_allclose(stack.decision_function(sites), slow.decision_function(sites))
    # The pairs that the sweep held out are those whose scores it kept.
    held = assign(groups, {"rest": 0.7, "test": 0.3}, 0, labels == 1) == "test"
    test = {site: x[held] for site, x in sites.items()}
    wanted = roc_auc_score(labels[held], slow.decision_function(test))
    assert stack.origin_.metrics["auroc"] == pytest.approx(wanted, abs=1e-12)
    assert stack.origin_.metrics["auroc"] > sweep.metrics["auroc"]
    assert stack.origin_.metrics["auroc_low"] < wanted < stack.origin_.metrics["auroc_high"]
    assert stack.site == "early + late + none"
    two = StackedProbe.from_sweep(sweep, ["early", "late"], C=0.1)
    assert two.sites_ == ("early", "late")
    loaded = vd.load_probe(two.save(tmp_path / "p"))
    np.testing.assert_array_equal(loaded.decision_function(test), two.decision_function(test))
    assert loaded.origin_ == two.origin_
    with pytest.raises(UnknownNameError, match="unknown site 'erly'; nearest: early"):
        StackedProbe.from_sweep(sweep, ["erly"])


def test_a_sweep_of_sequences_is_not_stacked():
    random = np.random.default_rng(0)
    acts = {"site": random.normal(size=(60, 3, 4))}
    options = {"target": np.tile([0, 1], 30), "bootstrap": 5, "shuffles": 1, "folds": 2, "progress": False}
    sweep = vd.fit_probes(acts, probe="mean_tokens", strengths=(1.0,), **options)
    with pytest.raises(DataError, match="mean_tokens reads sequences of tokens"):
        StackedProbe.from_sweep(sweep)
