"""What a score is worth on held-out rows: figures, intervals that resample whole pairs, labels permuted over
pairs.

AUROC is the Mann-Whitney statistic with ties counted half. Intervals are percentile intervals of the cluster
bootstrap (Davison and Hinkley 1997, section 3.8): pairs are drawn with replacement and bring all their rows,
since rows of one pair are not independent. All resamples are computed at once, from weights on rows sorted
once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

METRICS = ("auroc", "accuracy", "recall_at_1pct_fpr")
FALSE_POSITIVES = 0.01
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; NaN where it cannot be had."""

    value: float
    low: float
    high: float

    def columns(self, name: str) -> dict[str, float]:
        """The figure and the ends of its interval as columns of a table."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def auroc(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """AUROC of each column of `scores` `[n, k]` for labels `[n]` or `[n, k]`; NaN with one class."""
    positive = np.broadcast_to(positive if positive.ndim == 2 else positive[:, None], scores.shape)
    count = positive.sum(0)
    others = len(scores) - count
    sums = np.empty(scores.shape[1])
    step = max(1, CHUNK_ELEMENTS // max(1, len(scores)))
    for first in range(0, scores.shape[1], step):
        columns = slice(first, first + step)
        sums[columns] = (rankdata(scores[:, columns], axis=0) * positive[:, columns]).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums - count * (count + 1) / 2) / (count * others)


def settled(scores: np.ndarray) -> np.ndarray:
    """Scores `[n, k]` with differences that only rounding made taken out (1e-10 of each column's spread).

    Equal activations, such as those of a first token that all rows share, must tie in a ranking; matrix
    products may give them last digits of their own.
    """
    # The largest distance from the mean, without a copy of all distances.
    mean = scores.mean(0)
    spread = np.maximum(scores.max(0) - mean, mean - scores.min(0))
    step = 10.0 ** (np.floor(np.log10(np.where(spread > 0, spread, 1))) - 10)
    return np.round(scores / step) * step


def weighted_metrics(
    scores: np.ndarray, positive: np.ndarray, weights: np.ndarray, wanted: tuple[str, ...] = METRICS
) -> dict[str, np.ndarray]:
    """The figures of `METRICS` that are wanted, for each row of weights.

    Args:
        scores: `[n]`, decision values; above 0 is called positive.
        positive: `[n]` bool.
        weights: `[r, n]`, how often each row counts in each resample.
        wanted: Names of figures.

    Returns:
        Arrays `[r]`; NaN where a resample holds one class only.
    """
    order = np.argsort(-scores, kind="stable")
    ordered, labels = scores[order], positive[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    right = (scores > 0) == positive
    out = {name: np.empty(len(weights)) for name in wanted}
    step = max(1, CHUNK_ELEMENTS // max(1, len(scores)))
    for first in range(0, len(weights), step):
        part = weights[first : first + step].astype(np.float64)
        # Cumulative counts at the end of each run of equal scores, so that ties are never split.
        hits = np.cumsum(part[:, order] * labels, 1)[:, ends]
        alarms = np.cumsum(part[:, order] * ~labels, 1)[:, ends]
        with np.errstate(invalid="ignore", divide="ignore"):
            recall, false = hits / hits[:, -1:], alarms / alarms[:, -1:]
            found = {"auroc": _area(false, recall)}
            if "accuracy" in wanted:
                found["accuracy"] = (part * right).sum(1) / part.sum(1)
            if "recall_at_1pct_fpr" in wanted:
                found["recall_at_1pct_fpr"] = np.where(false <= FALSE_POSITIVES + 1e-12, recall, 0).max(1)
        single = (hits[:, -1] == 0) | (alarms[:, -1] == 0)
        for name in wanted:
            out[name][first : first + step] = np.where(single, np.nan, found[name])
    return out


def _area(false: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Area under each curve by trapezoids, so that ties count half."""
    before = np.concatenate([np.zeros((len(recall), 1)), recall[:, :-1]], 1)
    return (np.diff(false, axis=1, prepend=0) * (recall + before) / 2).sum(1)


def resample_weights(groups: np.ndarray, n: int, seed: int) -> np.ndarray:
    """How often each row counts in `n` resamples of whole pairs, `[n, rows]`, in the least unsigned type."""
    _, codes = np.unique(groups, return_inverse=True)
    count = int(codes.max()) + 1
    random = np.random.default_rng([seed, 1])
    step = max(1, CHUNK_ELEMENTS // count)
    parts = [
        random.multinomial(count, np.full(count, 1 / count), size=min(step, n - first))
        for first in range(0, n, step)
    ]
    kind = np.min_scalar_type(max(int(part.max()) for part in parts))
    return np.concatenate([part.astype(kind)[:, codes] for part in parts])


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    """A figure with the middle 95 % of its resampled values."""
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return Estimate(float(value), float("nan"), float("nan"))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def measure(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> dict[str, Estimate]:
    """Every figure of `METRICS` with its interval, from the resamples `weights` `[r, n]`."""
    whole = weighted_metrics(scores, positive, np.ones((1, len(scores))))
    resampled = weighted_metrics(scores, positive, weights)
    return {name: estimate(whole[name][0], resampled[name]) for name in METRICS}


def difference(scores: np.ndarray, others: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> Estimate:
    """AUROC of `scores` minus that of `others` on the same rows; both see the same resamples."""
    both = np.stack([scores, others], 1)
    whole = auroc(both, positive)
    first, second = (weighted_metrics(column, positive, weights)["auroc"] for column in both.T)
    return estimate(whole[0] - whole[1], first - second)


def selectivity(
    scores: np.ndarray, positive: np.ndarray, controls: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> Estimate | None:
    """AUROC of the task minus the mean AUROC of its control tasks; all see the same resamples.

    After Hewitt and Liang (2019, arXiv:1909.03368), who take accuracies and draw control labels at random for
    each word type; here the control labels are the task's, permuted over pairs, and AUROC needs no threshold.

    Args:
        scores: `[n]`, decision values for the task.
        positive: `[n]` bool.
        controls: `[n, s]`, decision values of the same probe for each control task.
        labels: `[n, s]` bool, the control tasks.
        weights: `[r, n]`, resamples.

    Returns:
        None without control tasks.
    """
    if not controls.shape[1]:
        return None
    chance = [weighted_auroc(controls[:, s], labels[:, s], weights) for s in range(controls.shape[1])]
    task = auroc(scores[:, None], positive)[0]
    return estimate(
        task - float(np.nanmean(auroc(controls, labels))),
        weighted_auroc(scores, positive, weights) - _mean_of(np.stack(chance)),
    )


def weighted_auroc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC for each row of weights `[r, n]`, `[r]`; NaN where a resample holds one class only."""
    return weighted_metrics(scores, positive, weights, ("auroc",))["auroc"]


def auroc_within(
    scores: np.ndarray, positive: np.ndarray, strata: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Share of pairs of a positive and a negative of one stratum that are in order, `[r]`; ties count half.

    Scores of cross-fitted folds come from different probes: pooled, the offset of each fold would count, and
    pull a probe that knows nothing below 0.5 (Parker, Gunter and Bedo 2007, "Stratification bias in low
    signal microarray studies"). With one stratum this is the AUROC.

    Args:
        scores: `[n]`.
        positive: `[n]` bool.
        strata: `[n]`, such as the fold of each row.
        weights: `[r, n]`, resamples.
    """
    ordered, total = np.zeros(len(weights)), np.zeros(len(weights))
    for stratum in np.unique(strata):
        rows = strata == stratum
        part = weights[:, rows].astype(np.float64)
        count = (part @ positive[rows]) * (part @ ~positive[rows])
        found = weighted_auroc(scores[rows], positive[rows], weights[:, rows])
        ordered += np.where(count > 0, found, 0) * count
        total += count
    with np.errstate(invalid="ignore", divide="ignore"):
        return ordered / total


def _mean_of(values: np.ndarray) -> np.ndarray:
    """Means over the first axis without NaN; NaN where there is nothing else."""
    counted = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counted, values, 0).sum(0) / counted.sum(0)


def share(flags: np.ndarray, weights: np.ndarray) -> Estimate:
    """Share of rows with a flag, with its interval."""
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = (weights * flags).sum(1) / weights.sum(1)
    return estimate(float(flags.mean()), resampled)


def permute_over_pairs(
    positive: np.ndarray, groups: np.ndarray, units: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Labels that keep how pairs are labelled, and say nothing of the rows.

    Each pair takes over the labels of another pair of as many rows (drawn at random), in a random order. A
    label that is constant within pairs stays so; a pair with one row of each class keeps one of each.

    Args:
        positive: `[n]` bool.
        groups: `[n]`, pair of each row.
        units: `[n]`, data row of each vector; the vectors of one data row keep one label.
        random: Source of the draws.
    """
    _, first, unit_of = np.unique(units, return_index=True, return_inverse=True)
    labels = positive[first]
    _, pair_of = np.unique(groups[first], return_inverse=True)
    rows = np.argsort(pair_of, kind="stable")
    members = np.split(rows, np.cumsum(np.bincount(pair_of))[:-1])
    sizes = np.array([len(member) for member in members])
    permuted = labels.copy()
    odd = [size for size in np.unique(sizes) if (sizes == size).sum() == 1]
    for size in np.setdiff1d(np.unique(sizes), odd):
        alike = np.flatnonzero(sizes == size)
        for taker, giver in zip(alike, random.permutation(alike)):
            permuted[members[taker]] = random.permutation(labels[members[giver]])
    if odd:
        # Pairs whose size occurs once pass their labels on as one run.
        takers = [members[i] for i in np.flatnonzero(np.isin(sizes, odd))]
        givers = [members[i] for i in random.permutation(np.flatnonzero(np.isin(sizes, odd)))]
        permuted[np.concatenate(takers)] = np.concatenate(
            [random.permutation(labels[giver]) for giver in givers]
        )
    return permuted[unit_of.reshape(-1)]
