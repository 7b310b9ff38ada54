"""The honesty protocol on planted rows: a lie along one direction, the instruction along another."""

import numpy as np
import pandas as pd
import pytest

import veridical as vd
from veridical.errors import DataError, UnknownNameError
from veridical.probes import LogisticProbe
from veridical.probes.firing import false_positive_threshold
from veridical.probes.honesty import honesty_protocol
from veridical.probes.honesty_report import CHOSEN
from veridical.reporting.section import Reportable

QUICK = {"folds": 4, "strengths": (0.01, 1.0), "bootstrap": 80, "text_baseline": False, "progress": False}
SITE = "blocks.1.hook_resid_post"


def planted_lies(pairs=220, lie=5.0, told_shift=4.0, seed=0):
    """Four rows a pair: told and not, under a fitted and a held-out prompt. Feature 0 lies, 1 is told."""
    random = np.random.default_rng(seed)
    kind = np.repeat(random.integers(0, 3, pairs), 4)  # 0 lies, 1 refuses, 2 is confused
    told = np.tile([True, False, True, False], pairs)
    held = np.tile([False, False, True, True], pairs)
    known, lied = kind != 2, told & (kind == 0)
    x = random.normal(size=(4 * pairs, 10))
    x[:, 0] += lie * lied
    x[:, 1] += told_shift * told
    rows = pd.DataFrame(
        {
            "pair": np.repeat(np.arange(pairs), 4),
            "instructed_to_lie": told,
            "known": known,
            "lied": lied,
            "refused_to_lie": told & (kind == 1),
            "confused": ~known,
            "label_true": ~lied,
            "system_held_out": held,
            "scenario": np.repeat(random.random(pairs) < 0.5, 4),
            "belief_confidence": np.where(known, 0.75 + 0.25 * random.random(4 * pairs), 0.4),
        }
    )
    noise = random.normal(size=x.shape)
    return {"blocks.0.hook_resid_post": noise, SITE: x}, rows


@pytest.fixture(scope="module")
def planted_set():
    return planted_lies()


@pytest.fixture(scope="module")
def found(planted_set):
    acts, rows = planted_set
    return honesty_protocol(acts, rows=rows, **QUICK)


def test_the_lying_probe_reads_the_lie_and_the_instruction_probe_the_instruction(found):
    lying, told = found.line("lying"), found.line("instruction")
    assert lying["auroc_lied"] > 0.98
    # What is left is chance: nothing within told rows keeps the probe from leaning a little either way.
    assert abs(lying["auroc_told_of_truthful"] - 0.5) < 0.25
    assert told["auroc_told_of_truthful"] > 0.98
    # Only those who are told to lie do, so the lie says something of the instruction too.
    assert told["auroc_lied"] < lying["auroc_lied"] - 0.1
    cosine = found.cosines.query("site == @SITE")["lying"].tolist()[0]
    assert cosine == pytest.approx(found.lying.direction_ @ found.instruction.direction_)
    assert found.lying.site == found.instruction.site == SITE
    assert {site for _, site in found.chosen["lying"]} == {SITE}
    assert abs(found.line("lying", site="blocks.0.hook_resid_post")["auroc_lied"] - 0.5) < 0.1


def test_a_probe_that_lives_on_the_instruction_is_found_out():
    acts, rows = planted_lies(lie=0.0)
    found = honesty_protocol({SITE: acts[SITE]}, rows=rows, **QUICK)
    assert found.line("lying")["auroc_lied_low"] <= 0.5 <= found.line("lying")["auroc_lied_high"]
    every = found.line("lying, all rows")
    assert every["auroc_told_of_truthful"] > 0.95
    said = [line for line in found.findings() if "`lying, all rows`" in line and "true answers" in line]
    assert "besides the lie it reads something of the instruction" in said[0]


def test_figures_equal_a_plain_loop(planted_set, found):
    """Scores, thresholds and firing of one probe at one site, fold by fold."""
    from veridical.probes.crossfit import fold_numbers

    acts, rows = planted_set
    x = acts[SITE]
    told, known, lied, held = (
        rows[c].to_numpy() for c in ("instructed_to_lie", "known", "lied", "system_held_out")
    )
    strata = np.array([f"{~h:d}{b:d}{c:d}" for h, b, c in zip(held, lied, known)])
    fold_of = fold_numbers(rows["pair"].to_numpy(), 4, 0, strata)
    fit, honest = told & known & ~held, known & ~told
    line = found.line("lying", "held-out prompts", SITE)
    best = None
    for strengths in (
        (a, b, c, d) for a in (0.01, 1) for b in (0.01, 1) for c in (0.01, 1) for d in (0.01, 1)
    ):
        scores, fires = np.zeros(len(x)), np.zeros(len(x), dtype=bool)
        for k, strength in enumerate(strengths):
            here, train = fold_of == k, fit & (fold_of != k)
            scores[here] = LogisticProbe(C=strength).fit(x[train], lied[train]).decision_function(x[here])
            inner = np.full(len(x), np.nan)
            for j in set(range(4)) - {k}:
                less = train & (fold_of != j)
                probe = LogisticProbe(C=strength).fit(x[less], lied[less])
                inner[fold_of == j] = probe.decision_function(x[fold_of == j])
            limit = false_positive_threshold(inner[honest & ~held & ~here])
            fires[here] = scores[here] > limit
        gap = abs(fires[held & lied].mean() - line["recall_fpr1"])
        if best is None or gap < best[0]:
            best = gap, scores, fires
    _, scores, fires = best
    from sklearn.metrics import roc_auc_score

    among = told & known & held
    # Standardising differs by a hair: the protocol's is over all fitted rows, the loop's over each fold's.
    assert line["auroc_lied"] == pytest.approx(roc_auc_score(lied[among], scores[among]), abs=0.005)
    assert line["recall_fpr1"] == pytest.approx(fires[held & lied].mean(), abs=0.03)
    assert line["honest_fpr1"] == pytest.approx(fires[held & honest].mean(), abs=0.02)
    confused = ~known & held
    assert line["confused_fpr1"] == pytest.approx(fires[confused].mean(), abs=0.03)
    assert line["n_lied"] == (lied & held).sum()
    assert line["n_honest"] == (honest & held).sum()


def test_thresholds_are_set_on_honest_answers_and_hold_on_others(found, planted_set):
    line = found.line("lying, all rows")
    assert line["recall_fpr1"] > 0.9
    assert line["honest_fpr1"] < 0.03
    assert line["confused_fpr1"] < 0.2
    assert line["refused_fpr1"] < 0.3
    assert line["recall_balanced"] > 0.9
    acts, rows = planted_set
    probe = found.monitor
    honest = (rows["known"] & ~rows["instructed_to_lie"] & ~rows["system_held_out"]).to_numpy()
    fires = probe.decision_function(acts[SITE][honest]) > probe.origin_.thresholds["fpr1"]
    assert fires.mean() < 0.03
    assert set(probe.origin_.calibration) == {"slope", "intercept"}


def test_held_out_prompts_are_never_fitted_on(planted_set, found):
    acts, rows = planted_set
    held = rows["system_held_out"].to_numpy()
    wild = {site: np.where(held[:, None], -1e3, x) for site, x in acts.items()}
    other = honesty_protocol(wild, rows=rows, **QUICK)
    for name, probe in found.probes.items():
        np.testing.assert_array_equal(other.probes[name].coef_, probe.coef_)
        assert other.probes[name].origin_.thresholds == pytest.approx(probe.origin_.thresholds, rel=1e-5)
    assert other.line("lying", "held-out prompts")["auroc_lied"] == 0.5
    fitted = found.line("lying", "fitted prompts")
    assert other.line("lying", "fitted prompts")["auroc_lied"] == pytest.approx(fitted["auroc_lied"])
    every = honesty_protocol(acts, rows=rows, holdout=(), **QUICK)
    assert every.counts["never_fitted"] == 0
    assert "held-out prompts" not in every.parts
    explicit = honesty_protocol(acts, rows=rows, holdout="system_held_out=True", **QUICK)
    pd.testing.assert_frame_equal(explicit.table, found.table)


def test_parts_by_prompt_and_difficulty(planted_set, found):
    _, rows = planted_set
    thirds = [f"belief_confidence {said} third" for said in ("lowest", "middle", "highest")]
    kinds = [f"{h} prompts, scenario {s}" for h in ("fitted", "held-out") for s in (False, True)]
    assert set(found.parts) == {"all rows", "fitted prompts", "held-out prompts", *kinds, *thirds}
    counts = [found.line("lying", part)["n_honest"] for part in thirds]
    assert max(counts) - min(counts) < 0.15 * sum(counts)
    assert found.line("lying", thirds[0])["n_confused"] == rows["confused"].sum()
    named = planted_lies()[1].assign(difficulty=np.tile(["easy", "hard"], 440))
    acts, _ = planted_set
    other = honesty_protocol(acts, rows=named, by=("scenario",), **QUICK)
    assert {"difficulty easy", "difficulty hard"} <= set(other.parts)
    assert any(said.startswith("By difficulty") for said in other.findings())


def test_several_estimators_are_told_apart(planted_set):
    acts, rows = planted_set
    probes = [LogisticProbe(), LogisticProbe(standardise=False)]
    found = honesty_protocol({SITE: acts[SITE]}, rows=rows, probe=probes, **QUICK)
    names = set(found.table["estimator"]) - {CHOSEN}
    assert len(names) == 2
    assert "logistic" in names
    assert {estimator for estimator, _ in found.chosen["lying"]} <= names


def test_text_stands_beside(planted_set):
    acts, rows = planted_set
    texts = ["lie to me" if told else "be honest" for told in rows["instructed_to_lie"]]
    found = honesty_protocol({SITE: acts[SITE]}, rows=rows, texts=texts, **{**QUICK, "text_baseline": True})
    assert found.line("text alone, instruction", site="text")["auroc_told"] == 1
    assert found.line("text alone, lying", site="text")["auroc_lied"] == 0.5
    assert found.line("lying")["lead_over_text_low"] > 0.4
    assert "The text alone reaches 0.5" in found.findings()[0]


def test_it_can_be_shown_and_saved(found, tmp_path):
    assert isinstance(found, Reportable)
    assert "\n" not in repr(found)
    assert "<table" in found._repr_html_()
    section = found.report_section()
    assert "\n" not in section.headline[0][1]
    names = {trace.name for trace in found.figure().data}
    assert {"lying probe on lies", "lying probe on the instruction", "instruction probe on lies"} <= names
    line = next(t for t in found.figure().data if t.name == "lying probe on lies" and t.mode != "lines")
    assert list(line.x) == [0, 1]
    folder = found.save(tmp_path / "honesty")
    loaded = vd.load_probe(folder / "lying-all-rows")
    np.testing.assert_array_equal(loaded.coef_, found.monitor.coef_)
    assert loaded.origin_ == found.monitor.origin_
    assert (folder / "section.json").is_file()


def test_bad_input_is_refused_in_one_line(planted_set):
    acts, rows = planted_set
    bad = [
        (UnknownNameError, "unknown column 'known'", {"rows": rows.drop(columns="known")}),
        (UnknownNameError, "nearest: folds", {"fold": 3}),
        (DataError, "no row is lied", {"rows": rows.assign(lied=False)}),
        (DataError, "no row is refused_to_lie", {"rows": rows.assign(lied=rows["instructed_to_lie"])}),
        (DataError, "no row is an honest answer", {"rows": rows.assign(label_true=False)}),
        (DataError, "no row is left where system_held_out=maybe", {"holdout": "system_held_out=maybe"}),
        (DataError, "expected numbers", {"rows": rows.assign(difficulty=np.arange(880).astype(str) + "x")}),
        (DataError, "the estimator .* is there twice", {"probe": ["logistic"] * 3}),
        (UnknownNameError, "nearest: logistic", {"probe": "logistics"}),
        (DataError, "no estimator arrived", {"probe": []}),
    ]
    for kind, said, options in bad:
        with pytest.raises(kind, match=said) as caught:
            honesty_protocol(acts, **{"rows": rows, **QUICK, **options})
        assert "\n" not in str(caught.value)
    few = rows[rows["pair"] < 5]
    with pytest.raises(DataError, match=r"one class only without folds|pairs are left|at least 4 pairs"):
        honesty_protocol({SITE: acts[SITE][: len(few)]}, rows=few, **QUICK)
    with pytest.raises(UnknownNameError, match="nearest: lying"):
        honesty_protocol({SITE: acts[SITE]}, rows=rows, **QUICK).line("lyin")
