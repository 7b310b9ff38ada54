"""A probe moved between two models that hold the same thing turned, scaled and noisy."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import Ridge

import veridical as vd
from veridical.errors import DataError, UnknownNameError
from veridical.probes.model_transfer import (
    CONTROL,
    MOVED,
    OWN_A,
    OWN_B,
    _regress,
    procrustes_map,
    transfer_to,
)
from veridical.reporting.section import Reportable

QUICK = {"bootstrap": 60, "shuffles": 10, "text_baseline": False, "progress": False, "strengths": (0.01, 0.1)}


@pytest.fixture(scope="module")
def two(planted):
    """Model A, and model B whose second site is A's signal in another basis of other width."""
    data = planted(pairs=200, width=16, distance=3.0)
    random = np.random.default_rng(5)
    turn = np.linalg.qr(random.normal(size=(20, 20)))[0][:16]
    signal = 2 * (data.acts["signal"] - 3) @ turn + 0.2 * random.normal(size=(400, 20)) + 1
    other = {"elsewhere": random.normal(size=(400, 20)), "there": signal}
    rows = pd.DataFrame({"pair": data.pairs, "label": data.labels})
    return data.acts, other, rows


@pytest.mark.parametrize("method", ["ridge", "procrustes"])
def test_a_moved_probe_does_as_well_as_the_models_own(two, method):
    acts, other, rows = two
    found = transfer_to(acts, other, rows=rows, method=method, **QUICK)
    lines = found.to_frame().set_index("probe")
    assert lines.loc[MOVED, "site"] == "there"
    assert lines.loc[OWN_A, "site"] == "signal"
    assert lines.loc[MOVED, "auroc"] > 0.95
    assert abs(lines.loc[MOVED, "auroc"] - lines.loc[OWN_B, "auroc"]) < 0.03
    assert found.lead_over_own.low <= 0 <= found.lead_over_own.high + 0.02
    assert abs(lines.loc[CONTROL, "auroc"] - 0.5) < 0.15
    assert found.control.std() > 0.02
    assert found.fit > 0.9
    assert found.cosine > 0.8
    # The moved probe reads B's activations as A's probe reads A's.
    agree = np.corrcoef(
        found.probe.decision_function(other["there"]), found.first.best().decision_function(acts["signal"])
    )
    assert agree[0, 1] > 0.95
    assert found.probe.origin_.site == "there"


def test_nothing_is_moved_where_the_models_share_nothing(two):
    acts, other, rows = two
    found = transfer_to(acts, other, rows=rows, other_site="elsewhere", **QUICK)
    line = found.to_frame().set_index("probe").loc[MOVED]
    assert line["auroc_low"] <= 0.5 <= line["auroc_high"]
    assert found.fit < 0.05


def test_the_ridge_of_the_decision_value_is_that_of_the_whole_map_read_by_the_probe():
    random = np.random.default_rng(0)
    x, y, w = random.normal(size=(60, 7)), random.normal(size=(60, 5)), random.normal(size=5)
    y += x[:, :5]
    penalties = torch.tensor([0.5, 30.0], dtype=torch.float64)
    weights, shift = _regress(torch.from_numpy(x), torch.from_numpy(y @ w)[:, None], penalties)
    for at, penalty in enumerate(penalties):
        whole = Ridge(alpha=float(penalty)).fit(x, y)
        np.testing.assert_allclose(weights[at, :, 0], whole.coef_.T @ w, atol=1e-10)
        assert float(shift[at, 0]) == pytest.approx(float(whole.intercept_ @ w))


def test_the_turn_is_scipys_and_the_scale_of_least_error():
    random = np.random.default_rng(0)
    x, y, w = random.normal(size=(80, 6)) + 2, random.normal(size=(80, 6)) - 1, random.normal(size=6)
    y += x @ np.linalg.qr(random.normal(size=(6, 6)))[0]
    weights, shift = procrustes_map(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(w), 0.3)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    turn, total = orthogonal_procrustes(centred_x, centred_y)
    scale = total / (centred_x**2).sum()
    moved = scale * centred_x @ turn + y.mean(0)
    np.testing.assert_allclose(x @ weights.numpy() + float(shift), moved @ w + 0.3)
    error = ((moved - y) ** 2).sum()
    for factor in (0.99, 1.01):
        assert ((factor * scale * centred_x @ turn + y.mean(0) - y) ** 2).sum() > error


def test_held_out_pairs_and_rows_enter_neither_map_nor_probe(two):
    from veridical.pairs.splits import assign

    acts, other, rows = two
    held = np.tile([True, False, False, True], 100)
    rows = rows.assign(held=held)
    test = assign(rows["pair"], {"rest": 0.7, "test": 0.3}, 0, rows["label"] == 1) == "test"
    hidden = (test | held)[:, None]
    wild_a = {site: np.where(hidden, 77.0, x) for site, x in acts.items()}
    wild_b = {site: np.where(hidden, -55.0, x) for site, x in other.items()}
    options = {**QUICK, "rows": rows, "holdout": "held=True"}
    one, two_ = transfer_to(acts, other, **options), transfer_to(wild_a, wild_b, **options)
    np.testing.assert_allclose(one.probe.coef_, two_.probe.coef_, rtol=1e-9)
    assert one.own.counts["test_pairs"] == one.first.counts["test_pairs"]


def test_labels_may_differ_between_the_models(two):
    acts, other, rows = two
    theirs = rows.assign(label=1 - rows["label"])
    found = transfer_to(acts, other, rows=rows, other_rows=theirs, **QUICK)
    lines = found.to_frame().set_index("probe")
    assert lines.loc[MOVED, "auroc"] < 0.1
    assert lines.loc[OWN_B, "auroc"] > 0.95
    assert found.cosine < -0.8


def test_it_can_be_shown_and_the_probe_saved(two, tmp_path):
    acts, other, rows = two
    found = transfer_to(acts, other, rows=rows, **QUICK)
    assert isinstance(found, Reportable)
    assert "\n" not in repr(found)
    assert "<table" in found._repr_html_()
    assert list(found.figure().data[0].x) == list(found.to_frame()["probe"])
    loaded = vd.load_probe(found.probe.save(tmp_path / "moved"))
    np.testing.assert_array_equal(
        loaded.decision_function(other["there"]), found.probe.decision_function(other["there"])
    )
    assert "ridge map fitted on" in (tmp_path / "moved" / "README.md").read_text()


def test_bad_input_is_refused_in_one_line(two):
    acts, other, rows = two
    short = {site: x[:-2] for site, x in other.items()}
    texts = rows.assign(text=[f"row {i}" for i in range(400)])
    moved = texts.assign(text=["row 1", "row 0", *texts["text"][2:]])
    bad = [
        (DataError, "model A has 400 vectors and model B 398", short, {"other_rows": rows[:-2]}),
        (
            DataError,
            r"vector 0 was read after another text in each model \(2 such\)",
            other,
            {"rows": texts, "other_rows": moved},
        ),
        (UnknownNameError, "nearest: procrustes", other, {"method": "procrustean"}),
        (UnknownNameError, "nearest: there", other, {"other_site": "ther"}),
        (UnknownNameError, "nearest: signal", other, {"site": "signl"}),
        (DataError, "attention reads more than one vector", other, {"probe": "attention"}),
    ]
    for kind, said, given, options in bad:
        with pytest.raises(kind, match=said) as caught:
            transfer_to(acts, given, **{"rows": rows, **QUICK, **options})
        assert "\n" not in str(caught.value)
