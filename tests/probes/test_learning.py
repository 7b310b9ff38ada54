"""Learning curves: against plain fits on the same draws, and what they must and must not show."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import veridical as vd
from veridical.errors import DataError, UnknownNameError
from veridical.pairs.splits import assign
from veridical.probes import LogisticProbe
from veridical.probes.learning import learning_curve
from veridical.reporting.section import Reportable

QUICK = {"bootstrap": 60, "text_baseline": False, "progress": False, "strengths": (0.001, 0.1)}


def curve(data, **options):
    given = {"target": data.labels, "groups": data.pairs, "sizes": (10, 40), "repeats": 6, **QUICK, **options}
    return learning_curve(data.acts, **given)


@pytest.fixture(scope="module")
def data(planted):
    return planted(pairs=300, width=40, distance=2.0)


def test_more_pairs_help_and_the_last_point_is_the_sweep(data):
    found = curve(data, sizes=(10, 20, 50, 100, 400))
    frame = found.to_frame()
    assert found.site == "signal"
    assert frame["pairs"].tolist() == [10, 20, 50, 100, 210]
    assert frame["draws"].tolist() == [6, 6, 6, 6, 1]
    assert frame["auroc"].iloc[-1] > frame["auroc"].iloc[0] + 0.1
    assert frame["auroc_sd"].iloc[0] > frame["auroc_sd"].iloc[3]
    assert (frame["auroc_low"] <= frame["auroc"]).all()
    assert (frame["auroc"] <= frame["auroc_high"]).all()
    assert frame["rows"].tolist() == [20, 40, 100, 200, 420]
    options = {**QUICK, "shuffles": 0}
    sweep = vd.fit_probes(data.acts, target=data.labels, groups=data.pairs, **options)
    assert found.whole.value == pytest.approx(sweep["signal"].metrics["auroc"].value)
    assert found.whole.low == pytest.approx(sweep["signal"].metrics["auroc"].low)
    assert frame["auroc"].iloc[-1] == found.whole.value


def test_all_pairs_get_the_strength_and_figure_of_the_sweep(planted):
    """Pairs are named so that their order by name is not that by number, and strengths are close in worth."""
    data = planted(pairs=120, width=40, distance=1.2)
    names = np.array([f"entity {pair}" for pair in data.pairs])
    for seed in range(6):
        given = {
            "target": data.labels,
            "groups": names,
            "seed": seed,
            "progress": False,
            "text_baseline": False,
        }
        found = learning_curve(data.acts, sizes=(10, 20), repeats=3, site="signal", **given)
        sweep = vd.fit_probes(data.acts, shuffles=0, **given)
        assert found.draws["C"].iloc[-1] == sweep["signal"].probe.C
        assert found.whole == sweep["signal"].metrics["auroc"]


def test_draws_equal_plain_fits_on_their_pairs(data, monkeypatch):
    """Recover the drawn pairs, fit each with the strength that was chosen, and compare."""
    from veridical.probes import learning

    seen = []
    plain = learning._Curve._fit
    monkeypatch.setattr(
        learning._Curve, "_fit", lambda self, w, c: (seen.append((w, c)), plain(self, w, c))[1]
    )
    found = curve(data, site="signal", repeats=3)
    (weights, strengths), x, y = seen[0], data.acts["signal"], data.labels
    test = assign(data.pairs, {"rest": 0.7, "test": 0.3}, 0, y == 1) == "test"
    mean, scale = x[~test].mean(0), x[~test].std(0)
    standard = (x - mean) / scale
    assert weights.shape == (420, 7)
    for column, line in enumerate(found.draws.to_dict("records")):
        rows = np.flatnonzero(~test)[weights[:, column] == 1]
        assert len(np.unique(data.pairs[rows])) == line["pairs"]
        probe = LogisticProbe(C=strengths[column], standardise=False).fit(standard[rows], y[rows])
        expected = roc_auc_score(y[test], probe.decision_function(standard[test]))
        assert line["auroc"] == pytest.approx(expected, abs=1e-6)
        assert line["C"] == strengths[column]
    # Draws are nested: the 10 pairs of a draw are among its 40.
    for draw in range(3):
        small, large = weights[:, draw] == 1, weights[:, 3 + draw] == 1
        assert not (small & ~large).any()
    assert not (weights[:, 0] == weights[:, 1]).all()


def test_noise_stays_at_chance_at_every_size(data):
    found = curve(data, site="noise", sizes=(10, 50, 100))
    assert (abs(found.to_frame()["auroc"] - 0.5) < 0.1).all()


def test_labels_that_are_constant_within_pairs_are_drawn_in_both_classes(data):
    labels = (data.pairs % 5 == 0).astype(int)
    x = data.acts["noise"] + 3 * labels[:, None]
    found = learning_curve({"site": x}, target=labels, groups=data.pairs, sizes=(10, 30), repeats=5, **QUICK)
    assert (found.to_frame()["auroc"] > 0.9).all()


def test_held_out_prompts_and_texts(data):
    held = np.tile([False, False, True], 200)
    rows = pd.DataFrame({"pair": data.pairs, "label": data.labels, "held": held})
    texts = [f"it is {'so' if y else 'not'}, number {i // 2}" for i, y in enumerate(data.labels)]
    options = {**QUICK, "text_baseline": True}
    found = learning_curve(
        data.acts, rows=rows, texts=texts, holdout="held=True", sizes=(10,), repeats=2, **options
    )
    assert found.text.value > 0.95
    assert found.counts["test_rows"] < 90
    assert any("text alone" in said for said in found.findings())


def test_other_estimators_and_the_same_seed(data):
    for name in ("mass_mean", "lda", "ridge", "lat"):
        one, two = (curve(data, site="signal", probe=name, repeats=2) for _ in range(2))
        pd.testing.assert_frame_equal(one.draws, two.draws, check_exact=True)
        assert one.to_frame()["auroc"].iloc[-1] > 0.8
        assert one.estimator == name


def test_it_can_be_shown(data):
    found = curve(data)
    assert isinstance(found, Reportable)
    assert "\n" not in repr(found)
    assert "<table" in found._repr_html_()
    line = next(t for t in found.figure().data if t.name == "logistic" and t.mode != "lines")
    assert list(line.x) == [10, 40, 210]
    np.testing.assert_allclose(list(line.y), found.to_frame()["auroc"])
    assert "with all 210 it is" in found.report_section().text


def test_bad_input_is_refused_in_one_line(data):
    bad = [
        (DataError, "4 at least", {"sizes": (2,)}),
        (DataError, "4 at least", {"sizes": ()}),
        (DataError, "4 at least", {"sizes": (10.5,)}),
        (DataError, "repeats is 0", {"repeats": 0}),
        (DataError, "shuffles means nothing", {"shuffles": 3}),
        (UnknownNameError, "nearest: signal", {"site": "signl"}),
        (DataError, "one class only", {"target": np.ones(600)}),
    ]
    for kind, said, options in bad:
        with pytest.raises(kind, match=said) as caught:
            curve(data, **options)
        assert "\n" not in str(caught.value)
