"""Data that would give a plausible and wrong figure: refused, joined or said."""

import numpy as np
import pandas as pd
import pytest

import veridical as vd
from veridical.errors import DataError
from veridical.probes import LogisticProbe
from veridical.probes.duplicates import copies, without_copies
from veridical.probes.kinds import KINDS, kind
from veridical.probes.sequence import SequenceProbe


def repeated(copies_of=40, pairs=80, width=60, seed=0):
    """Vectors of their own and random labels; the last `copies_of` pairs repeat the first ones' rows."""
    random = np.random.default_rng(seed)
    x, labels = random.normal(size=(pairs, width)), random.random(pairs) < 0.5
    x[-copies_of:], labels[-copies_of:] = x[:copies_of], labels[:copies_of]
    texts = [f"statement {i % (pairs - copies_of)}" for i in range(pairs)]
    return x, pd.DataFrame({"pair": np.arange(pairs), "label": labels, "text": texts})


@pytest.mark.parametrize("with_text", [True, False])
def test_copies_on_both_sides_of_a_split_are_named_and_refused(quick, with_text):
    x, rows = repeated()
    rows["split"] = np.where(rows["pair"] < 50, "train", "test")
    rows = rows if with_text else rows.drop(columns="text")
    with pytest.raises(
        DataError, match=r"row 50 \(pair 50\) of the test split repeats row 10 \(pair 10\)"
    ) as error:
        vd.fit_probes({"site": x}, rows=rows, **quick)
    assert "30 such rows" in str(error.value)
    assert ("'statement 10'" in str(error.value)) == with_text
    assert "\n" not in str(error.value)
    # What it would have said: a perfect probe of random labels.
    allowed = vd.fit_probes({"site": x}, rows=rows, allow_duplicates=True, **quick)
    assert allowed["site"].metrics["auroc"].value > 0.8
    assert any("left so (allow_duplicates)" in note for note in allowed.notes)


@pytest.mark.parametrize("with_text", [True, False])
def test_pairs_that_share_a_row_are_one_pair_to_folds_and_split(quick, with_text):
    x, rows = repeated(copies_of=100, pairs=200)
    rows = rows if with_text else rows.drop(columns="text")
    sweep = vd.fit_probes({"site": x}, rows=rows, **quick)
    assert sweep.counts["fit_pairs"] + sweep.counts["test_pairs"] == 100
    assert any("200 pairs were joined into 100" in note for note in sweep.notes)
    assert abs(sweep["site"].fold_auroc - 0.5) < 0.2
    leaky = vd.fit_probes({"site": x}, rows=rows, allow_duplicates=True, **quick)
    assert leaky["site"].fold_auroc > sweep["site"].fold_auroc + 0.1


def test_chains_of_copies_are_joined_and_pairs_keep_their_name():
    texts = np.array(["a", "b", "b", "c", "c", "d", "e"], dtype=object)
    groups = np.array(["p", "p", "q", "q", "r", "s", "s"])
    source = LogisticProbe().source({"x": np.arange(14.0).reshape(7, 2)}, None, groups, list(texts), None)
    assert without_copies(source).groups.tolist() == ["p"] * 5 + ["s"] * 2
    kept, common = copies(source)
    assert common == 0
    assert (kept >= 0).tolist() == [False, True, True, True, True, False, False]


def test_a_text_that_many_pairs_share_is_no_copied_row(planted, quick):
    data = planted(pairs=100)
    texts = ["Say something."] * 200
    sweep = vd.fit_probes(data.acts, target=data.labels, groups=data.pairs, texts=texts, **quick)
    assert sweep.counts["fit_pairs"] + sweep.counts["test_pairs"] == 100
    assert any("1 texts stand under more than 10 % of the pairs" in note for note in sweep.notes)


def test_copies_within_one_pair_are_left_as_they_are(planted, quick):
    data = planted(pairs=60)
    texts = [f"fact {pair}" for pair in data.pairs]
    sweep = vd.fit_probes(data.acts, target=data.labels, groups=data.pairs, texts=texts, **quick)
    assert not any("several pairs" in note for note in sweep.notes)
    assert sweep.counts["fit_pairs"] + sweep.counts["test_pairs"] == 60


@pytest.mark.parametrize("name", ["lat", "ccs"])
def test_a_probe_of_differences_needs_both_classes_in_a_pair(planted, quick, name):
    data = planted(pairs=60)
    labels = (data.pairs % 2 == 0).astype(int)
    with pytest.raises(DataError, match="the label is constant within every pair") as error:
        vd.fit_probes(data.acts, target=labels, groups=data.pairs, probe=name, **quick)
    assert "\n" not in str(error.value)
    assert vd.fit_probes(data.acts, target=data.labels, groups=data.pairs, probe=name, **quick).best_site


def test_fewer_pairs_than_folds(planted, quick):
    data = planted(pairs=6)
    with pytest.raises(DataError, match="4 pairs are left for 5 folds"):
        vd.fit_probes(data.acts, target=data.labels, groups=data.pairs, **quick)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("stacked", "ttpd")])
def test_separable_data_give_finite_figures_everywhere(quick, name):
    random = np.random.default_rng(0)
    labels, pairs = np.tile([0, 1], 40), np.repeat(np.arange(40), 2)
    x = 1e-3 * random.normal(size=(80, 6)) + labels[:, None] * 100.0
    acts = {"site": [row[None] for row in x]} if issubclass(kind(name), SequenceProbe) else {"site": x}
    options = {**quick, "strengths": (1.0, 1e6)}
    sweep = vd.fit_probes(acts, target=labels, groups=pairs, probe=name, **options)
    assert sweep["site"].metrics["auroc"].value == 1
    assert np.isfinite(sweep.best().direction_).all()
    assert np.isfinite(sweep.best().predict_proba(acts["site"])).all()
    assert np.isfinite(sweep.calibration().to_frame()[["ece", "brier"]].to_numpy()).all()
    assert np.isfinite(list(sweep.best().origin_.thresholds.values())).all()
