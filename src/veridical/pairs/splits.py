"""Folds, splits and resamples that keep every pair together.

Rows of one pair on both sides of a split invert a text baseline (on capital-city statements TF-IDF scores an
AUROC near 0.1 with random folds), so there is no function here that splits rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from veridical.errors import DataError

Fold = tuple[np.ndarray, np.ndarray]


def folds(
    groups: Sequence | np.ndarray, n: int, seed: int = 0, strata: np.ndarray | None = None
) -> list[Fold]:
    """`n` folds in which every pair is held out once.

    Args:
        groups: Pair id of each row.
        n: Number of folds, at least 2.
        seed: Order in which pairs are dealt out.
        strata: Label of each row; each fold gets about the same share of each label.

    Returns:
        (train rows, held-out rows) per fold, sorted row numbers.

    Raises:
        DataError: Fewer pairs than folds.
    """
    if n < 2:
        raise DataError(f"{n} folds asked for; expected at least 2")
    codes, order = _dealt(groups, seed, strata)
    if len(order) < n:
        raise DataError(
            f"{n} folds need at least {n} pairs; there are {len(order)}: use fewer folds or more pairs"
        )
    fold_of_pair = np.empty(len(order), dtype=int)
    fold_of_pair[order] = np.arange(len(order)) % n
    fold_of_row = fold_of_pair[codes]
    return [(np.flatnonzero(fold_of_row != fold), np.flatnonzero(fold_of_row == fold)) for fold in range(n)]


def assign(
    groups: Sequence | np.ndarray,
    shares: Mapping[str, float],
    seed: int = 0,
    strata: np.ndarray | None = None,
) -> np.ndarray:
    """The name of the split of each row; all rows of a pair get the same.

    Args:
        groups: Pair id of each row.
        shares: Share of the pairs for each split name; they must add up to 1.
        seed: Order in which pairs are dealt out.
        strata: Label of each row, spread evenly as in `folds`.

    Raises:
        DataError: Shares that do not add up to 1, or a split that would stay empty.
    """
    if any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"the shares of a split must be above 0 and add up to 1; {dict(shares)} arrived")
    codes, order = _dealt(groups, seed, strata)
    names, wanted = list(shares), np.array(list(shares.values()))
    given = np.zeros(len(names))
    split_of_pair = np.empty(len(order), dtype=int)
    for count, pair in enumerate(order, start=1):
        # The split furthest behind its share is next, so that every stratum is shared out alike.
        behind = wanted * count - given
        choice = int(np.argmax(behind))
        split_of_pair[pair] = choice
        given[choice] += 1
    if (given == 0).any():
        empty = names[int(np.argmin(given))]
        raise DataError(
            f"{len(order)} pairs are too few for the split {dict(shares)}: {empty!r} would be empty"
        )
    return np.array(names, dtype=object)[split_of_pair[codes]]


def bootstrap(groups: Sequence | np.ndarray, n: int, seed: int = 0) -> Iterator[np.ndarray]:
    """`n` resamples of whole pairs with replacement, as row numbers (as many as the drawn pairs have)."""
    codes, pairs = pd.factorize(np.asarray(groups, dtype=object))
    if not len(pairs):
        raise DataError("there are no pairs to resample")
    rows = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(pairs)))
    members = np.split(rows, ends[:-1])
    random = np.random.default_rng(seed)
    for _ in range(n):
        drawn = random.integers(len(pairs), size=len(pairs))
        yield np.concatenate([members[pair] for pair in drawn])


def oversampled(
    groups: Sequence | np.ndarray,
    positive: np.ndarray,
    ratio: float = 1.0,
    seed: int = 0,
    within: np.ndarray | None = None,
) -> np.ndarray:
    """Row numbers in which rows of the rare side of a label are repeated within their pair and split.

    A repeated row keeps its pair id, so that grouped folds still hold all its copies out together. The rare
    side is repeated round by round in a random order of pairs, until it has `ratio` times the rows of the
    other side or would have more.

    Args:
        groups: Pair id of each row.
        positive: Whether the label of each row is 1.
        ratio: Rows of the rare side over rows of the other side that are aimed at, in (0, 1].
        seed: Order of the pairs.
        within: Split of each row; each split is balanced by itself.

    Raises:
        DataError: One side has no rows at all, or the ratio is outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise DataError(f"ratio {ratio} is outside (0, 1]")
    positive = np.asarray(positive, dtype=bool)
    if not positive.any() or positive.all():
        raise DataError(f"nothing to balance: all {len(positive)} rows have the label {int(positive.any())}")
    groups = np.asarray(groups, dtype=object)
    parts = (
        np.zeros(len(positive), dtype=int) if within is None else pd.factorize(np.asarray(within, object))[0]
    )
    random = np.random.default_rng(seed)
    taken = [np.arange(len(positive))]
    for part in np.unique(parts):
        ones = np.flatnonzero((parts == part) & positive)
        zeros = np.flatnonzero((parts == part) & ~positive)
        rare, common = (ones, zeros) if len(ones) <= len(zeros) else (zeros, ones)
        missing = int(np.floor(ratio * len(common))) - len(rare)
        if not len(rare) or missing <= 0:
            continue
        codes, pairs = pd.factorize(groups[rare])
        rank = random.permutation(len(pairs))
        queue = rare[np.argsort(rank[codes], kind="stable")]
        taken.append(np.resize(queue, missing))
    return np.concatenate(taken)


def _dealt(
    groups: Sequence | np.ndarray, seed: int, strata: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pair number of each row, and the pair numbers shuffled within strata, one stratum after another.

    The stratum of a pair is how many rows of each label it has, so that dealing pairs out in this order in
    turn gives every part the same mixture.
    """
    codes, pairs = pd.factorize(np.asarray(groups, dtype=object))
    if not len(pairs):
        raise DataError("there are no rows to split")
    shuffled = np.random.default_rng(seed).permutation(len(pairs))
    if strata is None:
        return codes, shuffled
    labels, values = pd.factorize(np.asarray(strata, dtype=object))
    counts = np.zeros((len(pairs), len(values) + 1), dtype=int)
    np.add.at(counts, (codes, labels), 1)
    kinds = np.unique(counts, axis=0, return_inverse=True)[1].reshape(-1)
    return codes, shuffled[np.argsort(kinds[shuffled], kind="stable")]
