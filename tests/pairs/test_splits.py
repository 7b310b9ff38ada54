"""Splits by pair: no pair on both sides, the same for the same seed, balanced; and why it matters."""

import numpy as np
import pytest

from veridical.errors import DataError
from veridical.pairs import Pairs, splits


def pairs_of(n, size=2):
    rows = [
        {"pair": f"p{number}", "prompt": f"{number} {side}", "label": side % 2}
        for number in range(n)
        for side in range(size)
    ]
    return Pairs.from_rows(rows)


def test_folds_hold_every_pair_out_once():
    pairs = pairs_of(23, size=3)
    seen = []
    for train, held in pairs.folds(5, seed=3):
        assert not set(pairs.groups[train]) & set(pairs.groups[held])
        assert sorted([*train, *held]) == list(range(len(pairs)))
        seen += held.tolist()
    assert sorted(seen) == list(range(len(pairs)))


def test_folds_follow_the_seed_and_not_the_hash():
    pairs = pairs_of(20)
    same = [np.array_equal(a[1], b[1]) for a, b in zip(pairs.folds(4, seed=1), pairs.folds(4, seed=1))]
    other = [np.array_equal(a[1], b[1]) for a, b in zip(pairs.folds(4, seed=1), pairs.folds(4, seed=2))]
    assert all(same)
    assert not all(other)


def test_folds_and_splits_are_stratified():
    # 8 rare positives among 80 rows that each stand alone: two for each of four folds.
    rows = [{"prompt": str(number), "label": int(number < 8)} for number in range(80)]
    pairs = Pairs.from_rows(rows)
    labels = pairs.labels()
    assert [labels[held].sum() for _, held in pairs.folds(4)] == [2, 2, 2, 2]
    drawn = pairs.split({"train": 0.5, "test": 0.5})
    assert drawn.filter(split="train")["label"].sum() == 4
    assert drawn.filter(split="test")["label"].sum() == 4


def test_split_keeps_pairs_whole_and_shares():
    drawn = pairs_of(50).split(seed=5)
    counts = {name: len(set(drawn.filter(split=name).groups)) for name in ("train", "val", "test")}
    assert counts == {"train": 30, "val": 10, "test": 10}
    frame = drawn.to_pandas()
    assert (frame.groupby("pair")["split"].nunique() == 1).all()
    assert drawn.fingerprint == pairs_of(50).split(seed=5).fingerprint
    assert drawn.fingerprint != pairs_of(50).split(seed=6).fingerprint


def test_too_few_pairs_are_refused():
    with pytest.raises(DataError, match="5 folds need at least 5 pairs; there are 3"):
        pairs_of(3).folds(5)
    with pytest.raises(DataError, match="at least 2"):
        pairs_of(3).folds(1)
    with pytest.raises(DataError, match="would be empty"):
        pairs_of(2).split()
    with pytest.raises(DataError, match="add up to 1"):
        pairs_of(9).split({"train": 0.5, "test": 0.2})


def test_bootstrap_draws_whole_pairs():
    pairs = pairs_of(30, size=3)
    drawn = list(pairs.bootstrap(40, seed=1))
    assert len(drawn) == 40
    for rows in drawn:
        assert len(rows) == 90
        counts = np.unique(pairs.groups[rows], return_counts=True)[1]
        assert (counts % 3 == 0).all()
    assert any(len(np.unique(pairs.groups[rows])) < 25 for rows in drawn)
    again = list(pairs.bootstrap(40, seed=1))
    assert all(np.array_equal(one, two) for one, two in zip(drawn, again))


def test_oversampling_stays_within_pair_and_split():
    rows = [
        {
            "pair": f"p{number}",
            "prompt": str(number),
            "lied": number % 10 == 0,
            "split": "train" if number < 60 else "test",
        }
        for number in range(100)
    ]
    pairs = Pairs.from_rows(rows)
    more = pairs.oversample("lied", ratio=0.5, seed=1)
    for split, others in (("train", 54), ("test", 36)):
        part = more.filter(split=split)
        assert int((~part["lied"]).sum()) == others
        assert int(part["lied"].sum()) == others // 2
    lies = more.filter(lied=True).to_pandas()
    assert (lies.groupby("pair")["split"].nunique() == 1).all()
    assert set(lies["pair"]) == {f"p{number}" for number in range(0, 100, 10)}
    for train, held in more.folds(5, stratify="lied"):
        assert not set(more.groups[train]) & set(more.groups[held])


def test_oversampling_refuses_what_it_cannot_do():
    pairs = Pairs.from_rows([{"prompt": "a", "lied": False}, {"prompt": "b", "lied": False}])
    with pytest.raises(DataError, match="every 'lied' is 0"):
        pairs.oversample("lied")
    with pytest.raises(DataError, match="ratio"):
        splits.oversampled([0, 1], np.array([True, False]), ratio=2.0)
    already = splits.oversampled([0, 1, 2], np.array([True, True, False]), ratio=0.5)
    assert already.tolist() == [0, 1, 2]


def test_random_folds_invert_a_text_baseline_and_grouped_ones_do_not(data):
    """On capitals a text classifier under random folds votes for the opposite of what is true."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline

    pairs = Pairs.load(data("azaria_mitchell_levinstein/capitals_true_false.csv"))
    texts, labels = np.array(pairs.texts), pairs.labels()

    def auroc(folds):
        scores = np.zeros(len(labels))
        for train, held in folds:
            fit = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, solver="liblinear")).fit(
                texts[train], labels[train]
            )
            scores[held] = fit.decision_function(texts[held])
        return roc_auc_score(labels, scores)

    random = auroc(splits.folds(np.arange(len(pairs)), 5, seed=0))
    grouped = auroc(pairs.folds(5, seed=0))
    assert random < 0.2
    assert grouped > random + 0.15
    # Where the statement says nothing but the subject's kind, grouping brings it to chance.
    kinds = pairs.filter(lambda row: " is a name of a " in row["prompt"])
    texts, labels = np.array(kinds.texts), kinds.labels()
    assert auroc(splits.folds(np.arange(len(kinds)), 5, seed=0)) < 0.2
    assert 0.4 < auroc(kinds.folds(5, seed=0)) < 0.6
