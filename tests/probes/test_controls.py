"""Controls beside every probe: random directions, selectivity, and rows that no probe was fitted on."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import veridical as vd
from veridical.errors import DataError
from veridical.probes import evaluate
from veridical.probes.controls import DRAWS, random_directions


def fit(data, quick, **options):
    return vd.fit_probes(data.acts, target=data.labels, groups=data.pairs, **{**quick, **options})


# Random directions


@pytest.mark.parametrize("standardise", [True, False])
def test_random_directions_equal_a_plain_loop(standardise):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(120, 7)) * np.arange(1, 8) + 5, random.random(120) < 0.4
    x[:, 2] += 3 * y
    x[:80, 6] = 2.5
    found = random_directions(
        torch.from_numpy(x[:80]),
        y[:80],
        torch.from_numpy(x[80:]),
        y[80:],
        standardise=standardise,
        draws=20,
        seed=3,
    )
    drawn = np.random.default_rng([3, 4]).normal(size=(7, 20))
    for direction, auroc in zip(drawn.T, found):
        direction = direction / x[:80].std(0).clip(1e-9) if standardise else direction.copy()
        direction[6] = 0  # constant in the fitted rows
        sign = 1 if roc_auc_score(y[:80], x[:80] @ direction) >= 0.5 else -1
        assert auroc == pytest.approx(roc_auc_score(y[80:], sign * x[80:] @ direction), abs=1e-12)


def test_one_direction_in_many_is_hard_to_hit_and_a_shift_of_all_features_is_not(planted, quick):
    data = planted(pairs=150, width=100, distance=3.0)
    narrow = fit(data, quick)["signal"]
    assert len(narrow.random) == DRAWS
    assert narrow.random.mean() < 0.65
    assert narrow.metrics["auroc"].value > np.quantile(narrow.random, 0.95) + 0.1
    # Two features that both carry the label: any direction reads it.
    random = np.random.default_rng(0)
    data.acts = {"wide": random.normal(size=(300, 1)) + 4 * data.labels[:, None]}
    sweep = fit(data, quick)
    assert sweep["wide"].random.mean() > 0.98
    assert any("nearly any direction parts these classes" in said for said in sweep.findings())
    assert not any("nearly any direction" in said for said in fit(planted(), quick).findings())


# Selectivity


def test_selectivity_and_its_interval_equal_a_slow_bootstrap():
    random = np.random.default_rng(0)
    positive = random.random(60) < 0.5
    scores, controls = random.normal(size=60) + 2 * positive, random.normal(size=(60, 3))
    labels = np.stack([random.permutation(positive) for _ in range(3)], 1)
    weights = evaluate.resample_weights(np.arange(60) // 2, 40, 0)
    found = evaluate.selectivity(scores, positive, controls, labels, weights)

    def difference(w):
        chance = [roc_auc_score(labels[:, s], controls[:, s], sample_weight=w) for s in range(3)]
        return roc_auc_score(positive, scores, sample_weight=w) - np.mean(chance)

    slow = [difference(w) for w in weights]
    assert found.value == pytest.approx(difference(np.ones(60)))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])))
    assert evaluate.selectivity(scores, positive, controls[:, :0], labels[:, :0], weights) is None


def test_selectivity_stands_in_table_verdict_card_and_file(planted, quick, tmp_path):
    data = planted(pairs=200)
    sweep = fit(data, quick, shuffles=8)
    frame = sweep.to_frame().set_index("site")
    assert frame.loc["signal", "selectivity_low"] > 0.3
    assert frame.loc["noise", "selectivity_low"] < 0.1
    expected = sweep["signal"].metrics["auroc"].value - sweep["signal"].control.mean()
    assert frame.loc["signal", "selectivity"] == pytest.approx(expected)
    assert {"random_direction_auroc", "random_direction_auroc_p95"} <= set(frame)
    said = " ".join(sweep.findings())
    most = 1 - sweep["signal"].control.mean()
    assert f"the most that it could be here, with an AUROC of 1, is {most:.3f}" in said
    assert frame.loc["signal", "selectivity"] <= most
    assert "at most about 0.5" in sweep.report_section().text
    assert "labels permuted over pairs" in said
    loaded = vd.ProbeSweep.load(sweep.save(tmp_path / "sweep"))
    pd.testing.assert_frame_equal(loaded.to_frame(), sweep.to_frame())
    card = (tmp_path / "sweep" / "best" / "README.md").read_text()
    assert f"| selectivity (at most {most:.3f}: an AUROC of 1 less that of shuffled labels) |" in card
    assert "| random directions |" in card
    names = {trace.name for trace in loaded.figure().data}
    assert "random directions, 95 % below" in names


# Rows that are never fitted on


def test_rows_held_out_are_never_fitted_on_and_alone_make_the_test(planted, quick):
    data = planted(pairs=100)
    random = np.random.default_rng(0)
    held = random.random(200) < 0.4
    rows = pd.DataFrame({"pair": data.pairs, "label": data.labels, "prompt_held_out": held})
    sweep = vd.fit_probes(data.acts, rows=rows, holdout="prompt_held_out=True", **quick)
    from veridical.pairs.splits import assign

    test = assign(data.pairs, {"rest": 0.7, "test": 0.3}, 0, data.labels == 1) == "test"
    assert sweep.counts["fit_vectors"] == (~test & ~held).sum()
    assert sweep.counts["test_vectors"] == (test & held).sum()
    assert sweep.counts["excluded"] == {
        "prompt_held_out=True, of fitted pairs": (~test & held).sum(),
        "not prompt_held_out=True, of held-out pairs": (test & ~held).sum(),
    }
    assert "prompt_held_out=True" in sweep.counts["split"]
    # What such rows hold changes no coefficient.
    changed = {site: np.where(held[:, None], 1e3, x) for site, x in data.acts.items()}
    other = vd.fit_probes(changed, rows=rows, holdout={"prompt_held_out": True}, **quick)
    for a, b in zip(sweep.results, other.results):
        np.testing.assert_array_equal(a.probe.coef_, b.probe.coef_)
    assert other["signal"].metrics["auroc"].value == 0.5


def test_a_holdout_that_marks_nothing_is_refused(planted, quick):
    data = planted(pairs=40)
    rows = pd.DataFrame({"pair": data.pairs, "label": data.labels, "held": False})
    with pytest.raises(DataError, match=r"no row is left where held=True; the column holds False"):
        vd.fit_probes(data.acts, rows=rows, holdout="held=True", **quick)
