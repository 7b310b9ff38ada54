"""The trained probes of the repository read what their cards say, on the model that is in it.

Figures of the cards are made again here from the saved weights: AUROC and firing on the held-out rows for
the probes of a sweep, the share that fires for the monitor.
"""

from pathlib import Path

import numpy as np
import pytest

import veridical as vd
from veridical.probes.fits import place_for

TRAINED = Path(__file__).parents[2] / "probes" / "tiny-liar"
NAMES = sorted(folder.name for folder in TRAINED.iterdir() if (folder / "config.json").is_file())
LIED = [name for name in NAMES if name.startswith("lied") and not name.endswith("monitor")]


@pytest.fixture(scope="module")
def model():
    return vd.load("tiny-liar")


@pytest.fixture(scope="module")
def honesty(model):
    """The honesty pairs with the labels of belief, as the recipes make them."""
    return vd.check_beliefs(model, vd.Pairs.load("honesty"), progress=False)


def held_out(pairs):
    return pairs.filter(np.array(pairs["split"]) == "test")


def never_fitted(pairs, where):
    """Rows of pairs without a fitted row; outside the test split, those that meet the conditions were."""
    fitted = np.array(pairs["split"]) != "test"
    for condition in where:
        name, value = condition.split("=")
        fitted &= np.array([str(bool(v)) == value for v in pairs[name]])
    return pairs.filter(~np.isin(pairs.groups, pairs.groups[fitted]))


def test_there_is_one_of_every_kind_that_lying_can_be_fitted_with():
    kinds = {vd.load_probe(TRAINED / name).name for name in LIED}
    assert kinds == {"logistic", "ridge", "mass_mean", "lda", "lat", "ccs", "max_tokens", "attention"}
    assert {"lied-monitor", "safe", "toxic"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_probe_fits_the_embedded_model(name, model):
    probe = vd.load_probe(TRAINED / name)
    assert place_for(model, probe) == probe.site
    assert probe.origin_.model_fingerprint == model.fingerprint()
    assert set(probe.origin_.thresholds) == {"balanced", "fpr1"}
    assert set(probe.origin_.calibration) == {"slope", "intercept"}
    assert np.isfinite(probe.coef_).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_of_a_card_has_its_interval_and_the_text_beside_it(name):
    card = (TRAINED / name / "README.md").read_text()
    table = card.split("## Figures on held-out pairs")[1].split("\n\n")[1].splitlines()
    assert "text alone" in table[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert all("[" in cells[1] for cells in lines), "a figure without an interval"
    auroc = next(cells for cells in lines if cells[0] == "auroc")
    assert "[" in auroc[3], "no text alone beside the AUROC"
    if not name.endswith("monitor"):
        assert "95 % below" in auroc[4], "no shuffled labels beside the AUROC"
        selectivity = next(cells for cells in lines if cells[0].startswith("selectivity"))
        assert "at most 0." in selectivity[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LIED, "safe", "toxic"])
def test_it_scores_and_fires_on_held_out_rows_as_its_card_says(name, model, honesty):
    probe = vd.load_probe(TRAINED / name)
    pairs = never_fitted(honesty if name in LIED else vd.Pairs.load(name), probe.origin_.where)
    acts = vd.collect(model, pairs, sites=probe.site, tokens=probe.origin_.tokens, progress=False)
    judged = vd.probes.judge_probe(probe, acts, bootstrap=20, text_baseline=False)
    said = probe.origin_.metrics
    for figure in ("auroc", "accuracy", "recall_at_1pct_fpr"):
        assert judged.metrics[figure].value == pytest.approx(said[figure], abs=1e-6)
    if name in LIED:
        fires = {
            f"fires_fpr1 ({line['rows_of']})": line["fires_fpr1"] for line in judged.firing.to_dict("records")
        }
        shown = {k: value for k, value in said.items() if k.startswith("fires_fpr1") and k[-1] == ")"}
        assert shown == pytest.approx(fires, abs=1e-6)


@pytest.mark.slow
def test_the_monitor_fires_as_its_card_says(model, honesty):
    """The card is cross-fitted; the saved probe saw these pairs, so its own shares are held on one side."""
    probe = vd.load_probe(TRAINED / "lied-monitor")
    acts = vd.collect(model, honesty, sites=probe.site, tokens=probe.origin_.tokens, progress=False)
    fires = probe.decision_function(acts[probe.site]) > probe.origin_.thresholds["fpr1"]
    told, known, lied, confused, right = (
        np.array([bool(value) for value in honesty[name]])
        for name in ("instructed_to_lie", "known", "lied", "confused", "label_true")
    )
    said = probe.origin_.metrics
    assert fires[told & known & lied].mean() >= said["recall_fpr1_low"]
    assert fires[known & ~told & right].mean() <= 0.012
    assert fires[confused].mean() <= said["confused_fpr1_high"]


@pytest.mark.slow
def test_the_monitor_tells_a_lie_that_is_being_written_from_an_honest_answer(model, honesty):
    probe, pairs = vd.load_probe(TRAINED / "lied-monitor"), held_out(honesty)
    lies = [row["prompt"] for row in pairs.filter(lied=True, form="choice")][:20]
    honest = [row["prompt"] for row in pairs.filter(lied=False, known=True, instructed_to_lie=False)][:20]
    with probe.monitor(model, aggregate="last") as scores:
        model.generate([*lies, *honest], max_new_tokens=8)
    before = scores.to_frame().query("~generated").groupby("row")["score"].last().to_numpy()
    fired = before > scores.threshold
    assert fired[:20].mean() > 0.9
    assert fired[20:].mean() < 0.1
