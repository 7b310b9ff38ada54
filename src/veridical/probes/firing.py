"""How often a lie probe fires where nobody lies: on confusion, on refusals to lie, on honest answers.

A probe for lies that are instructed can read the instruction, or surprise, in place of the lie. Two
thresholds are set on the fitted pairs' out-of-fold scores, and the rates are taken on rows whose pair took
no part in the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from veridical.probes import evaluate

if TYPE_CHECKING:
    from veridical.config import ProbeConfig
    from veridical.probes.data import Source, Task

SIGNS = ("confused", "refused_to_lie")
"""Columns whose presence asks for this table."""


def firing_rates(
    source: Source,
    task: Task,
    config: ProbeConfig,
    fit_scores: np.ndarray,
    fit_positive: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
) -> pd.DataFrame | None:
    """Share of rows of each kind on which the probe fires, at two thresholds; None without the columns of
    `SIGNS`.

    Args:
        source: All rows, also those that the conditions of the sweep left out.
        task: Which rows were fitted on.
        config: For the number of resamples and the seed.
        fit_scores: Out-of-fold decision values on the fitted rows.
        fit_positive: Their labels.
        score: Decision values of the probe on rows by position.
    """
    if not any(name in source.columns for name in SIGNS):
        return None
    unseen = ~np.isin(source.groups, source.groups[task.fit])
    thresholds = {
        "balanced": balanced_threshold(fit_scores, fit_positive),
        "fpr1": false_positive_threshold(fit_scores[~fit_positive]),
    }
    kinds = {kind: flags & unseen for kind, flags in kinds_of_rows(source).items()}
    return shares_above(source, kinds, thresholds, score, config)


def shares_above(
    source: Source,
    kinds: Mapping[str, np.ndarray],
    thresholds: Mapping[str, float],
    score: Callable[[np.ndarray], np.ndarray],
    config: ProbeConfig,
) -> pd.DataFrame | None:
    """Share of each kind of row above each threshold, with intervals over pairs; None without any row.

    Args:
        source: The rows.
        kinds: Which rows are of each kind, `[n]` bool by name.
        thresholds: Decision values by name.
        score: Decision values of rows by position.
        config: For the number of resamples and the seed.
    """
    lines = []
    for kind, flags in kinds.items():
        rows = np.flatnonzero(flags)
        if not len(rows):
            continue
        scores = score(rows)
        weights = evaluate.resample_weights(source.groups[rows], config.bootstrap, config.seed)
        line: dict[str, object] = {
            "rows_of": kind,
            "rows": len(rows),
            "pairs": len(np.unique(source.groups[rows])),
        }
        for name, threshold in thresholds.items():
            rate = evaluate.share(scores > threshold, weights)
            line |= rate.columns(f"fires_{name}")
        lines.append({**line, **{f"threshold_{name}": value for name, value in thresholds.items()}})
    return pd.DataFrame(lines) if lines else None


def balanced_threshold(scores: np.ndarray, positive: np.ndarray) -> float:
    """The decision value above which recall plus specificity is largest, halfway to the next score below."""
    order = np.argsort(-scores, kind="stable")
    ordered, labels = scores[order], positive[order]
    gain = np.cumsum(labels) / labels.sum() - np.cumsum(~labels) / (~labels).sum()
    ends = np.append(ordered[1:] != ordered[:-1], True)
    at = int(np.argmax(np.where(ends, gain, -np.inf)))
    below = ordered[at + 1] if at + 1 < len(ordered) else ordered[at] - 1
    return float((ordered[at] + below) / 2)


def false_positive_threshold(negatives: np.ndarray, rate: float = evaluate.FALSE_POSITIVES) -> float:
    """The decision value that at most `rate` of the negatives exceed."""
    ordered = np.sort(negatives)[::-1]
    return float(ordered[min(len(ordered) - 1, int(np.floor(rate * len(ordered) + 1e-9)))])


def kinds_of_rows(source: Source) -> dict[str, np.ndarray]:
    """Rows by what the belief check says of them; `told` splits where the column is there."""
    kinds = {name: source.flag(name) for name in ("lied", "refused_to_lie")}
    told, confused, known = (source.flag(name) for name in ("instructed_to_lie", "confused", "known"))
    if told is None:
        kinds["confused"] = confused
    elif confused is not None:
        kinds["confused, told to lie"] = confused & told
        kinds["confused, not told to lie"] = confused & ~told
    if told is not None and known is not None:
        kinds["known, not told to lie"] = known & ~told
    return {name: flags for name, flags in kinds.items() if flags is not None and flags.any()}
