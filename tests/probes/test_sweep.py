"""`fit_probes` on planted data: what it finds, what it must not find, and what it refuses."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, cross_val_score

import veridical as vd
from veridical.config import ProbeConfig
from veridical.errors import DataError, InputError, NonFiniteError, UnknownNameError
from veridical.probes import LogisticProbe
from veridical.reporting.section import Reportable

torch.set_num_threads(1)


def fit(data, quick, **options):
    return vd.fit_probes(data.acts, target=data.labels, groups=data.pairs, **{**quick, **options})


# What it finds


def test_finds_the_planted_direction_and_its_site(planted, quick):
    data = planted(pairs=400, width=32)
    sweep = fit(data, quick)
    frame = sweep.to_frame().set_index("site")
    chosen = sweep.best_site
    assert chosen == "signal"
    assert frame.loc["signal", "chosen"]
    # The best possible AUROC at distance 3 is Phi(3 / sqrt 2) = 0.983.
    assert frame.loc["signal", "auroc"] == pytest.approx(0.983, abs=0.02)
    assert (
        frame.loc["signal", "auroc_low"] <= frame.loc["signal", "auroc"] <= frame.loc["signal", "auroc_high"]
    )
    assert frame.loc["signal", "accuracy"] > 0.88
    assert sweep.best().direction_ @ data.direction > 0.9
    assert frame.loc["noise", "auroc_low"] <= 0.5 <= frame.loc["noise", "auroc_high"]


def test_equals_a_plain_loop_over_sklearn(planted, quick):
    """Folds, strengths, choice, refit and test figure, one obvious fit at a time."""
    from veridical.pairs.splits import assign, folds

    data = planted(pairs=60, distance=1.2)
    config = ProbeConfig(strengths=(0.001, 0.03, 1.0), folds=4, seed=3)
    sweep = fit(data, quick, config=config, folds=4, strengths=(0.001, 0.03, 1.0), seed=3)
    positive = data.labels == 1
    test = assign(data.pairs, {"rest": 0.7, "test": 0.3}, 3, positive) == "test"
    x, y, pairs = data.acts["signal"], data.labels, data.pairs
    standard = (x - x[~test].mean(0)) / x[~test].std(0)
    rest, y_rest = standard[~test], y[~test]
    scores = {}
    for strength in config.strengths:
        model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
        scores[strength] = np.mean(
            [
                roc_auc_score(
                    y_rest[held], model.fit(rest[train], y_rest[train]).decision_function(rest[held])
                )
                for train, held in folds(pairs[~test], 4, 3, positive[~test])
            ]
        )
    chosen = max(scores, key=lambda c: scores[c])
    final = LogisticRegression(C=chosen, tol=1e-10, max_iter=10_000).fit(rest, y_rest)
    result = sweep["signal"]
    assert chosen == result.probe.C
    assert result.fold_auroc == pytest.approx(scores[chosen], abs=0.002)
    assert result.metrics["auroc"].value == pytest.approx(
        roc_auc_score(y[test], final.decision_function(standard[test])), abs=0.002
    )
    theirs = final.coef_[0] / x[~test].std(0)
    assert np.linalg.norm(result.probe.coef_[0] - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_a_probe_of_the_sweep_is_the_estimator_fitted_by_hand(planted, quick):
    data = planted()
    split = np.where(data.pairs < 100, "train", "test")
    rows = {"split": split, "pair": data.pairs, "label": data.labels}
    sweep = vd.fit_probes(data.acts, rows=rows, **quick)
    probe = sweep.best()
    by_hand = LogisticProbe(C=probe.C).fit(data.acts["signal"][:200], data.labels[:200])
    np.testing.assert_allclose(probe.coef_, by_hand.coef_, rtol=1e-6, atol=1e-10)
    assert probe.site == "signal"
    assert probe.origin_.target == "label"


# What it must not find


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_called_noise(planted, quick, seed):
    data = planted(width=64, seed=seed)
    data.acts.pop("signal")
    sweep = fit(data, quick, seed=seed, bootstrap=300)
    best = sweep[sweep.best_site].metrics["auroc"]
    assert best.low <= 0.5 <= best.high
    assert "No probe was found" in sweep.findings()[0]


def test_duplicates_within_a_pair_leak_through_random_folds_and_not_through_ours(quick):
    random = np.random.default_rng(0)
    x = np.repeat(random.normal(size=(80, 200)), 4, axis=0)
    labels, pairs = np.repeat(random.random(80) < 0.5, 4), np.repeat(np.arange(80), 4)
    leaky = cross_val_score(
        LogisticProbe(), x, labels, cv=KFold(5, shuffle=True, random_state=0), scoring="roc_auc"
    )
    assert leaky.mean() > 0.99
    sweep = vd.fit_probes({"site": x}, target=labels, groups=pairs, **quick)
    result = sweep["site"]
    assert abs(result.fold_auroc - 0.5) < 0.2
    assert result.metrics["auroc"].low <= 0.5 <= result.metrics["auroc"].high


def test_selection_never_sees_the_test(planted, quick):
    data = planted(pairs=100)
    split = np.where(data.pairs < 70, "val", "test")
    results = []
    for seed in (None, 1):
        labels, acts = data.labels.copy(), {site: x.copy() for site, x in data.acts.items()}
        if seed is not None:
            random = np.random.default_rng(seed)
            held = split == "test"
            labels[held] = random.permutation(labels[held])
            acts["noise"][held] += 100 * labels[held][:, None]
        rows = {"split": split, "pair": data.pairs}
        results.append(vd.fit_probes(acts, target=labels, rows=rows, **quick))
    true, changed = results
    assert changed.best_site == true.best_site == "signal"
    for a, b in zip(true.results, changed.results):
        assert a.probe.C == b.probe.C
        assert a.fold_auroc == b.fold_auroc
        assert np.array_equal(a.probe.coef_, b.probe.coef_)
    assert changed["signal"].metrics["auroc"].value < 0.7


def test_shuffled_control_is_at_chance_and_counts_the_choice_of_site(planted, quick):
    data = planted(pairs=120)
    data.acts |= {f"noise{i}": np.random.default_rng(i).normal(size=(240, 24)) for i in range(4)}
    sweep = fit(data, quick, shuffles=30)
    assert abs(sweep["signal"].control.mean() - 0.5) < 0.05
    assert abs(sweep.selected_control.mean() - 0.5) < 0.05
    assert sweep.to_frame()["shuffled_auroc_p95"].max() < 0.75
    assert sweep["signal"].metrics["auroc"].value > sweep.selected_control.max()


def test_control_keeps_labels_that_are_constant_within_pairs(quick):
    """Rows of a pair are near copies: were labels shuffled by row, a control would look better than it is."""
    random = np.random.default_rng(0)
    pairs = np.repeat(np.arange(60), 4)
    x = np.repeat(random.normal(size=(60, 30)), 4, axis=0) + 0.01 * random.normal(size=(240, 30))
    labels = np.repeat(random.random(60) < 0.5, 4)
    sweep = vd.fit_probes({"site": x}, target=labels, groups=pairs, **{**quick, "shuffles": 40})
    assert abs(sweep["site"].control.mean() - 0.5) < 0.08
    # About twenty held-out pairs of one label each: AUROC varies by about 0.14; single rows would give 0.07.
    assert sweep["site"].control.std() > 0.1


# Text


def test_a_label_word_in_the_text_is_found_by_the_baseline(planted, quick):
    data = planted()
    texts = [f"Fact {i}. This is {'true' if y else 'false'}." for i, y in enumerate(data.labels)]
    sweep = fit(data, quick, text_baseline=True, texts=texts)
    assert sweep.text["auroc"].value > 0.99
    assert any("solved by its text" in said for said in sweep.findings())
    assert {"text_auroc", "text_auroc_low", "lead_over_text"} <= set(sweep.to_frame())


def test_text_that_says_nothing_is_at_chance(planted, quick):
    data = planted()
    texts = [
        f"{['red', 'green', 'blue', 'grey'][i % 4]} thing"
        for i in np.random.default_rng(0).integers(0, 4, 300)
    ]
    sweep = fit(data, quick, text_baseline=True, texts=texts)
    assert sweep.text["auroc"].low <= 0.5 <= sweep.text["auroc"].high
    assert sweep["signal"].lead_over_text.low > 0.2
    assert any("probe leads by" in said for said in sweep.findings())


@pytest.mark.parametrize("texts", [[""] * 300, ["!!", "?!"] * 150])
def test_texts_without_words_do_no_harm(planted, quick, texts):
    sweep = fit(planted(), quick, text_baseline=True, texts=texts)
    assert np.isfinite(sweep.text["auroc"].value)


def test_without_text_it_says_that_nothing_was_compared(planted, quick):
    sweep = fit(planted(), quick, text_baseline=True)
    assert sweep.text is None
    assert any("no text to compare" in said for said in sweep.findings())


# Rows


def table(data, **columns):
    return pd.DataFrame({"pair": data.pairs, "label": data.labels, **columns})


def test_conditions_and_missing_labels_leave_rows_out_and_say_how_many(planted, quick):
    data = planted(pairs=120)
    told = np.tile([True, True, False, True], 60)
    labels = data.labels.astype(object)
    labels[[0, 5]] = None, float("nan")
    rows = table(data, instructed_to_lie=told, lied=labels)
    forms = ["instructed_to_lie=True", ("instructed_to_lie=true",), {"instructed_to_lie": True}]
    forms += ["instructed_to_lie!=False"]
    sweeps = [vd.fit_probes(data.acts, target="lied", rows=rows, where=w, **quick) for w in forms]
    for sweep in sweeps:
        counts = sweep.counts
        assert counts["fit_vectors"] + counts["test_vectors"] == 240 - 60 - 2
        assert sorted(counts["excluded"].values()) == [2, 60]
        assert sweep.to_frame()["auroc"].tolist() == sweeps[0].to_frame()["auroc"].tolist()
    assert "60 not instructed_to_lie=True" in sweeps[0].report_section().text
    assert sweeps[0].best().origin_.where == ("instructed_to_lie=True",)


def test_a_condition_on_text_and_on_numbers(planted, quick):
    data = planted(pairs=120)
    rows = table(data, form=np.tile(["open", "choice"], 120), size=np.repeat([1, 2], 120))
    assert vd.fit_probes(data.acts, rows=rows, where="size=2", **quick).counts["excluded"] == {
        "not size=2": 120
    }
    with pytest.raises(DataError, match="one class only"):
        vd.fit_probes(data.acts, rows=rows, where="form=open", **quick)


def test_the_split_column_wins_and_val_counts_as_fitted(planted, quick):
    data = planted(pairs=100)
    split = np.select([data.pairs < 60, data.pairs < 75], ["train", "val"], "test")
    sweep = vd.fit_probes(data.acts, rows=table(data, split=split), test_fraction=0.9, **quick)
    assert sweep.counts["fit_pairs"] == 75
    assert sweep.counts["test_pairs"] == 25
    assert "split column" in sweep.counts["split"]
    no_test = vd.fit_probes(data.acts, rows=table(data, split="train"), **quick)
    assert no_test.counts["test_pairs"] == 30


def test_pairs_of_one_row_and_mixed_sizes(planted, quick):
    data = planted(pairs=100)
    random = np.random.default_rng(0)
    for groups in (np.arange(200), np.repeat(np.arange(100), random.multinomial(200, np.full(100, 0.01)))):
        data.pairs = groups
        assert fit(data, quick).best_site == "signal"


def test_low_precision_and_head_axes(planted, quick):
    data = planted()
    exact = fit(data, quick)["signal"].metrics["auroc"].value
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        data.acts = {"signal": torch.from_numpy(planted().acts["signal"]).to(dtype).reshape(300, 4, 6)}
        found = fit(data, quick)["signal"]
        assert found.metrics["auroc"].value == pytest.approx(exact, abs=0.01)
        assert found.probe.coef_.shape == (1, 24)


def test_the_same_seed_gives_the_same_sweep_and_inputs_are_left_alone(planted, quick):
    data = planted()
    before = {site: x.copy() for site, x in data.acts.items()}
    first, second, other = fit(data, quick), fit(data, quick), fit(data, quick, seed=1)
    pd.testing.assert_frame_equal(first.to_frame(), second.to_frame(), check_exact=True)
    assert not first.to_frame().equals(other.to_frame())
    assert all(np.array_equal(before[site], data.acts[site]) for site in before)


# Firing


def lies(pairs=240, seed=0):
    """Told to lie: 0 lies, 1 refuses; confused pairs sit halfway and are never lies."""
    random = np.random.default_rng(seed)
    kind = np.repeat(random.integers(0, 3, pairs), 2)  # 0 lies, 1 refuses, 2 is confused
    told = np.tile([True, False], pairs)
    x = random.normal(size=(2 * pairs, 8))
    x[:, 0] += np.where(told & (kind == 0), 4, 0) + np.where(told & (kind == 2), 2, 0)
    rows = pd.DataFrame(
        {
            "pair": np.repeat(np.arange(pairs), 2),
            "instructed_to_lie": told,
            "lied": told & (kind == 0),
            "refused_to_lie": told & (kind == 1),
            "confused": kind == 2,
            "known": kind != 2,
        }
    )
    return {"blocks.0.hook_resid_post": x}, rows


def test_firing_rates_are_those_of_unseen_rows_recomputed(quick):
    acts, rows = lies()
    sweep = vd.fit_probes(
        acts, target="lied", rows=rows, where=("instructed_to_lie=True", "known=True"), **quick
    )
    found = sweep.firing_frame().set_index("rows_of")
    assert found.loc["lied", "fires_balanced"] > 0.9
    assert found.loc["refused_to_lie", "fires_balanced"] < 0.1
    assert found.loc["refused_to_lie", "fires_fpr1"] <= 0.05
    assert 0.2 < found.loc["confused, told to lie", "fires_balanced"] < 0.8
    assert found.loc["confused, not told to lie", "fires_balanced"] < 0.2
    assert found.loc["known, not told to lie", "fires_balanced"] < 0.2
    # Confused rows take no part in the fit, so all of them are judged.
    confused = rows["confused"] & rows["instructed_to_lie"]
    assert found.loc["confused, told to lie", "rows"] == confused.sum()
    scores = sweep.best().decision_function(acts["blocks.0.hook_resid_post"][confused])
    threshold = found.loc["confused, told to lie", "threshold_balanced"]
    assert found.loc["confused, told to lie", "fires_balanced"] == pytest.approx((scores > threshold).mean())
    assert "fires_fpr1 (confused, told to lie)" in sweep.metrics
    assert len(sweep.report_section().tables) == 2


def test_confused_rows_that_were_fitted_on_are_not_judged(quick):
    acts, rows = lies()
    sweep = vd.fit_probes(acts, target="lied", rows=rows, where="instructed_to_lie=True", **quick)
    found = sweep.firing_frame().set_index("rows_of")
    total = (rows["confused"] & rows["instructed_to_lie"]).sum()
    assert 0 < found.loc["confused, told to lie", "rows"] < 0.5 * total


def test_no_firing_table_without_its_columns(planted, quick):
    assert fit(planted(), quick).firing_frame().empty


# What comes back


def test_the_result_shows_itself(planted, quick):
    data = planted()
    x = data.acts
    data.acts = {"blocks.0.hook_resid_post": x["noise"], "blocks.1.hook_resid_post": x["signal"]}
    sweep = fit(data, quick)
    assert "\n" not in repr(sweep)
    assert "best blocks.1.hook_resid_post AUROC" in repr(sweep)
    assert "<table" in sweep._repr_html_()
    section = sweep.report_section()
    assert isinstance(sweep, Reportable)
    assert section.headline[0][0].startswith("target = 1")
    assert len(section.figures) == 1
    assert "150 pairs" not in section.text
    assert "105 pairs" in section.text
    figure = sweep.figure()
    names = {trace.name for trace in figure.data}
    assert {"resid_post", "shuffled labels", "chosen on folds"} <= names
    line = next(t for t in figure.data if t.name == "resid_post" and t.mode == "lines+markers")
    assert list(line.x) == [0, 1]
    np.testing.assert_allclose(list(line.y), sweep.to_frame()["auroc"])
    assert "AUROC" in repr(sweep.best())


def test_names_from_the_data_are_escaped(planted, quick):
    data = planted()
    evil = "<script>alert(1)</script>"
    sweep = vd.fit_probes({evil: data.acts["signal"]}, target=data.labels, groups=data.pairs, **quick)
    assert "<script>" not in sweep._repr_html_()
    assert "<script>" not in str(sweep.figure().to_json())


def test_sites_of_several_kinds_are_lines_of_their_own(planted, quick):
    data = planted()
    names = [
        "blocks.0.attn.hook_z",
        "blocks.0.hook_resid_post",
        "blocks.1.attn.hook_z",
        "blocks.1.hook_resid_post",
    ]
    data.acts = dict.fromkeys(names, data.acts["noise"])
    assert {"z", "resid_post"} <= {trace.name for trace in fit(data, quick).figure().data}


def test_controls_can_be_switched_off(planted, quick):
    sweep = fit(planted(), quick, shuffles=0)
    assert np.isnan(sweep.to_frame()["shuffled_auroc"]).all()
    sweep.figure()
    assert any("switched off" in said for said in sweep.findings())


# Bad input


def test_bad_data_is_refused_in_one_line(planted, quick):
    data = planted(pairs=40)
    acts, labels, pairs = data.acts, data.labels, data.pairs
    broken = {"noise": acts["noise"], "signal": acts["signal"].copy()}
    broken["signal"][7, 3] = np.inf
    both_sides = np.where(np.arange(80) % 2, "test", "train")
    rows = table(data, split=both_sides)
    bad = [
        (DataError, "one class only", {"target": np.ones(80)}),
        (DataError, "3 classes", {"target": np.arange(80) % 3}),
        (DataError, "has shape", {"target": np.ones(79)}),
        (DataError, "has shape", {"groups": np.ones(3)}),
        (DataError, "folds", {"folds": 60}),
        (DataError, "strengths", {"strengths": (0.0,)}),
        (DataError, "test_fraction", {"test_fraction": 1.5}),
        (DataError, "folds is 1", {"folds": 1}),
        (UnknownNameError, "lied", {"target": "lid", "rows": table(data, lied=labels)}),
        (UnknownNameError, "form", {"where": "from=open", "rows": table(data, form="open")}),
        (UnknownNameError, "nearest: strengths", {"strenghts": (1.0,)}),
        (DataError, "not understood", {"where": "form"}),
        (DataError, "no row is left", {"where": "form=opn", "rows": table(data, form="open")}),
        (DataError, "in the test split and outside", {"target": "label", "groups": None, "rows": rows}),
    ]
    for kind, said, options in bad:
        given = {"target": labels, "groups": pairs, **quick, **options}
        with pytest.raises(kind, match=said) as caught:
            vd.fit_probes(acts, **given)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, InputError)
    with pytest.raises(NonFiniteError, match=r"site signal .* vector 7 \(row 7, pair 3\)"):
        vd.fit_probes(broken, target=labels, groups=pairs, **quick)
    for empty in ({}, {"a": np.zeros((0, 3))}, {"a": acts["noise"], "b": acts["noise"][:5]}, {"a": labels}):
        with pytest.raises(DataError):
            vd.fit_probes(empty, target=labels, groups=pairs, **quick)
    with pytest.raises(UnknownNameError, match="nearest: signal"):
        fit(data, quick)["sgnal"]


def test_too_few_pairs(planted, quick):
    data = planted(pairs=4)
    with pytest.raises(DataError, match="pairs are left for 5 folds"):
        fit(data, quick)


def test_one_class_in_the_held_out_part(planted, quick):
    data = planted(pairs=40)
    data.labels = (data.pairs < 20).astype(int)
    rows = table(data, split=np.where(data.pairs < 30, "train", "test"))
    rows["label"] = data.labels
    with pytest.raises(DataError, match="the test hold one class only"):
        vd.fit_probes(data.acts, rows=rows, **quick)
