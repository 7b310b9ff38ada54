"""How alike two models are, inside and outside, each with an interval and with what chance would give.

Inside: CKA of what changed. For texts i the change is the policy's stream at the text's last token less its
reference's; CKA of two policies' changes (unbiased, see `cka`) asks whether training moved the same texts
apart in the same way, whatever the basis. CKA of the streams themselves is near 1 for policies of one
reference and says little. Outside: the correlation of implicit rewards, log p of an option under the policy
less that under its reference (Rafailov et al. 2023, arXiv:2305.18290), less the mean over the question's
options; and the share of questions on which both do the same.

The null of either swaps whole pairs of texts between the two models at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCKS = 20
SWAPS = 200


@dataclass(frozen=True)
class Alike:
    """A similarity.

    Attributes:
        value: The figure.
        low, high: Its 95 % interval.
        null: 95 % of the swapped ones lie below.
        chance: Their mean.
    """

    value: float
    low: float
    high: float
    null: float
    chance: float


def of_changes(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray, seed: int) -> Alike:
    """Unbiased linear CKA of two sets of changes `[texts, d]` and `[texts, d']`; the interval is a jackknife
    over blocks of pairs. NaN where one of them does not vary.

    Args:
        ours, theirs: Changes of the same texts.
        groups: `[texts]`, pair of each text.
        seed: Of the blocks and swaps.
    """
    kernels = [_kernel(each) for each in (ours, theirs)]
    value = _cka(*kernels)
    if not np.isfinite(value):
        return Alike(value, *[float("nan")] * 4)
    codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
    count = int(codes.max()) + 1
    random = np.random.default_rng([seed, 11])
    blocks = random.permutation(count) % min(BLOCKS, count)
    low = high = float("nan")
    if count > 3:
        left = []
        for block in range(int(blocks.max()) + 1):
            kept = np.flatnonzero(blocks[codes] != block)
            left.append(_cka(*(kernel[np.ix_(kept, kept)] for kernel in kernels)))
        n = len(left)
        error = float(np.sqrt((n - 1) / n * np.nansum((np.array(left) - np.nanmean(left)) ** 2)))
        low, high = value - 1.96 * error, value + 1.96 * error
    own = np.sqrt(_hsic(kernels[0], kernels[0]) * _hsic(kernels[1], kernels[1]))
    swapped = [
        _hsic(kernels[0], kernels[1][np.ix_(order, order)]) / own
        for order in (_swap(codes, random) for _ in range(SWAPS))
    ]
    return Alike(value, low, high, float(np.quantile(swapped, 0.95)), float(np.mean(swapped)))


def of_rewards(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray, bootstrap: int, seed: int) -> Alike:
    """Correlation of two models' implicit rewards `[options]`; NaN where one of them does not vary."""
    from veridical.probes.evaluate import resample_weights

    nan = float("nan")
    if min(float(np.std(each)) for each in (ours, theirs)) < 1e-9 or len(ours) < 3:
        return Alike(nan, nan, nan, nan, nan)
    codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
    weights = np.concatenate(
        [np.ones((1, len(ours))), resample_weights(groups, bootstrap, seed).astype(float)]
    )
    found = _correlations(weights, ours, theirs)
    low, high = np.nanpercentile(found[1:], [2.5, 97.5]) if codes.max() > 0 else (nan, nan)
    random = np.random.default_rng([seed, 12])
    swapped = [float(np.corrcoef(ours, theirs[_swap(codes, random)])[0, 1]) for _ in range(SWAPS)]
    return Alike(
        float(found[0]), float(low), float(high), float(np.quantile(swapped, 0.95)), float(np.mean(swapped))
    )


def of_behaviour(
    ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray, bootstrap: int, seed: int
) -> Alike:
    """Share of questions on which two models do the same, `[questions]` bool each."""
    from veridical.probes.evaluate import resample_weights

    same = (ours == theirs).astype(float)
    codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
    weights = resample_weights(groups, bootstrap, seed).astype(float)
    low, high = (float("nan"),) * 2
    if codes.max() > 0:
        low, high = np.percentile((weights @ same) / weights.sum(1), [2.5, 97.5])
    random = np.random.default_rng([seed, 13])
    swapped = [float((ours == theirs[_swap(codes, random)]).mean()) for _ in range(SWAPS)]
    return Alike(
        float(same.mean()),
        float(low),
        float(high),
        float(np.quantile(swapped, 0.95)),
        float(np.mean(swapped)),
    )


def _swap(codes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rows in the order in which whole pairs were swapped; rows of a pair stay together, in their order."""
    rows = [np.flatnonzero(codes == code) for code in random.permutation(int(codes.max()) + 1)]
    return np.concatenate(rows)


def _correlations(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    total = weights.sum(1)

    def mean(values: np.ndarray) -> np.ndarray:
        return (weights @ values) / total

    cross = mean(x * y) - mean(x) * mean(y)
    spread = (mean(x * x) - mean(x) ** 2) * (mean(y * y) - mean(y) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, cross / np.sqrt(np.maximum(spread, 0)), np.nan)


def _kernel(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    kernel = rows @ rows.T
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimator of `cka.Products.hsic`, from `[n, n]` kernels without their diagonals."""
    n = len(k)
    if n < 4:
        return float("nan")
    rows = k.sum(0), m.sum(0)
    both = rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2))
    return float((k * m).sum() + both - 2 / (n - 2) * (rows[0] @ rows[1]))


def _cka(k: np.ndarray, m: np.ndarray) -> float:
    own = _hsic(k, k) * _hsic(m, m)
    return _hsic(k, m) / own**0.5 if own > 0 else float("nan")
