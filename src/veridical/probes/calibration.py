"""Whether a probe's probabilities mean what they say, and two ways to mend them.

Platt scaling (Platt 1999, "Probabilistic outputs for support vector machines") fits a logistic curve to the
decision values, with the targets that he smooths by the class counts, so that separable scores stay finite.
Isotonic regression (Zadrozny and Elkan 2002) fits any rising step function. Both are fitted on out-of-fold
scores of the fitted pairs and judged on the held-out pairs: by the expected calibration error over bins of
equal mass (Naeini, Cooper and Hauskrecht 2015; Nixon et al. 2019, arXiv:1904.01685) and by the Brier score.
The scores come from the folds' probes, which saw fewer pairs than the probe that is kept and are a little
less sure of themselves. The calibration error of a small set is above 0 even for perfect probabilities, since
each bin's share is itself uncertain; its interval, from resamples of such a set, lies too high for the same
reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import expit

from veridical.errors import DataError
from veridical.probes.card import interval
from veridical.probes.evaluate import Estimate, estimate, resample_weights
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.probes.base import LinearProbe
    from veridical.probes.result import ProbeSweep
    from veridical.reporting.section import Section

METHODS = ("as given", "Platt", "isotonic")


@dataclass(frozen=True, repr=False)
class Calibration(Saved):
    """Probabilities of one probe on held-out pairs, before and after calibration.

    Attributes:
        name: The label and site.
        platt: Slope and intercept of Platt's curve on the decision values.
        errors: By method of `METHODS`, then `ece` and `brier`, with intervals over resamples of pairs.
        bins: One line per method and bin: `method`, `probability` (mean), `share` (of positives), `low` and
            `high` (its interval), `rows`.
        rows: Held-out vectors and pairs, and the vectors that the curves were fitted on.
        labelled: What has a label each: vectors, or sequences.
        facts: Seed, tokens, model and fingerprints.
    """

    name: str
    platt: Mapping[str, float]
    errors: Mapping[str, Mapping[str, Estimate]]
    bins: pd.DataFrame
    rows: Mapping[str, int]
    labelled: str = "vectors"
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One line per method: `ece` and `brier`, each with the ends of its 95 % interval."""
        lines = []
        for method, figures in self.errors.items():
            line: dict[str, Any] = {"method": method}
            for name, value in figures.items():
                line |= value.columns(name)
            lines.append(line)
        return pd.DataFrame(lines)

    def findings(self) -> list[str]:
        """What the figures say, in sentences."""
        before, after = self.errors["as given"]["ece"], self.errors["Platt"]["ece"]
        said = [
            f"As given, probabilities are off by {_said(before)} on average (expected calibration error); "
            f"after Platt scaling by {_said(after)}, after isotonic regression by "
            f"{_said(self.errors['isotonic']['ece'])}."
        ]
        if after.value > before.value:
            said.append("Platt scaling did not help here: use the probabilities as they are.")
        if self.rows["test_vectors"] < 200:
            said.append(
                f"With {self.rows['test_vectors']} held-out rows each bin is small: a calibration error of a "
                "few hundredths is what chance alone gives."
            )
        return said

    def figure(self) -> go.Figure:
        """Reliability: share of positives against the probability, by bins of equal mass, with intervals."""
        from veridical.probes.figure import reliability

        return reliability(self)

    def report_section(self) -> Section:
        """The calibration as a section of a report."""
        from veridical.reporting.section import Section

        text = (
            f"Fitted on out-of-fold scores of {self.rows['fit_vectors']} {self.labelled}; judged on "
            f"{self.rows['test_vectors']} {self.labelled} of {self.rows['test_pairs']} other pairs. Bins "
            "hold equal numbers of rows."
        )
        before, after = self.errors["as given"]["ece"], self.errors["Platt"]["ece"]
        return Section(
            title=f"Calibration of the probe for {self.name}",
            text="\n\n".join([text, *self.findings()]),
            figures=(self.figure(),),
            tables=(("Calibration error and Brier score on held-out pairs", self.to_frame().round(3)),),
            headline=(
                ("calibration error, as given and by Platt", f"{before.value:.3f}, {after.value:.3f}"),
            ),
        )

    def __repr__(self) -> str:
        said = ", ".join(f"{method} {_said(found['ece'])}" for method, found in self.errors.items())
        return f"Calibration({self.name}: calibration error {said}; {self.rows['test_pairs']} test pairs)"

    def _repr_html_(self) -> str:
        import html

        table = self.to_frame().round(3).to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{table}"


def calibrate(sweep: ProbeSweep, site: str | None = None, bins: int = 10) -> Calibration:
    """Fits both curves on the sweep's out-of-fold scores at `site` (the chosen one) and judges them."""
    result = sweep[site or sweep.best_site]
    labels = sweep.labels
    if labels is None or not len(result.out_of_fold):
        raise DataError(
            f"the sweep holds no out-of-fold scores at {result.site}: it was made before they were kept; fit "
            "it again"
        )
    if not 2 <= bins <= len(labels.test):
        raise DataError(f"bins is {bins}; expected 2 to {len(labels.test)}, the number of held-out rows")
    curve = fit_platt(result.out_of_fold, labels.fit)
    given = {
        "as given": expit(result.test_scores),
        "Platt": platt(result.test_scores, curve),
        "isotonic": _isotonic(result.out_of_fold, labels.fit, result.test_scores),
    }
    weights = resample_weights(labels.test_pairs, sweep.config.bootstrap, sweep.config.seed)
    judged = {name: _judge(values, labels.test, weights, bins) for name, values in given.items()}
    rows = {
        "fit_vectors": len(labels.fit),
        "test_vectors": len(labels.test),
        "test_pairs": len(np.unique(labels.test_pairs)),
    }
    return Calibration(
        name=f"{sweep.config.target} = {sweep.classes[1]} at {result.site}",
        platt=curve,
        errors={name: errors for name, (errors, _) in judged.items()},
        bins=pd.concat([table.assign(method=name) for name, (_, table) in judged.items()], ignore_index=True),
        rows=rows,
        labelled=result.probe.labelled,
        facts={**sweep.facts, "seed": sweep.config.seed},
    )


def calibrated_proba(probe: LinearProbe, x: Any) -> np.ndarray:
    """Platt-scaled probabilities of the positive class, `[rows]`, by the curve that a sweep kept in it."""
    curve = probe.origin_.calibration
    if not curve:
        raise DataError(
            "the probe carries no calibration; take it from a sweep (`sweep.best()`), which fits one"
        )
    return platt(probe.decision_function(x), curve)


def fit_platt(scores: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Slope and intercept of Platt's curve for scores `[n]` and labels `[n]`, both classes present."""
    from sklearn.linear_model import LogisticRegression

    count = int(positive.sum())
    others = len(positive) - count
    hopes = np.where(positive, (count + 1) / (count + 2), 1 / (others + 2))
    # Every row stands twice, once for each class, weighted by its smoothed target.
    centre, scale = float(scores.mean()), float(scores.std()) or 1.0
    x = np.tile((scores - centre) / scale, 2)[:, None]
    y, weights = np.repeat([1, 0], len(scores)), np.concatenate([hopes, 1 - hopes])
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(x, y, sample_weight=weights)
    slope = float(model.coef_[0, 0]) / scale
    return {"slope": slope, "intercept": float(model.intercept_[0]) - slope * centre}


def platt(scores: np.ndarray, curve: Mapping[str, float]) -> np.ndarray:
    """Probabilities of the positive class for decision values."""
    return expit(curve["slope"] * scores + curve["intercept"])


def bin_numbers(probabilities: np.ndarray, bins: int) -> np.ndarray:
    """Bin of each row, `[n]`, from 0: equal mass, except that equal probabilities share a bin."""
    edges = np.quantile(probabilities, np.arange(1, bins) / bins, method="inverted_cdf")
    return np.unique(np.searchsorted(edges, probabilities, side="left"), return_inverse=True)[1]


def _isotonic(scores: np.ndarray, positive: np.ndarray, test: np.ndarray) -> np.ndarray:
    from sklearn.isotonic import IsotonicRegression

    return IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, positive).predict(test)


def _judge(
    probabilities: np.ndarray, positive: np.ndarray, weights: np.ndarray, bins: int
) -> tuple[dict[str, Estimate], pd.DataFrame]:
    number = bin_numbers(probabilities, bins)
    inside = np.eye(number.max() + 1)[number]  # [n, bins]
    gap, square = probabilities - positive, (probabilities - positive) ** 2
    every = np.ones((1, len(positive)))

    def ece(w: np.ndarray) -> np.ndarray:
        return np.abs(w @ (inside * gap[:, None])).sum(1) / w.sum(1)

    def brier(w: np.ndarray) -> np.ndarray:
        return (w @ square) / w.sum(1)

    def share(w: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (w @ (inside * positive[:, None])) / (w @ inside)

    errors = {
        "ece": estimate(float(ece(every)[0]), ece(weights)),
        "brier": estimate(float(brier(every)[0]), brier(weights)),
    }
    resampled, shares = share(weights), share(every)[0]
    lines = []
    for at in range(inside.shape[1]):
        found = estimate(shares[at], resampled[:, at])
        rows = number == at
        lines.append(
            {
                "method": "",
                "probability": float(probabilities[rows].mean()),
                "share": found.value,
                "low": found.low,
                "high": found.high,
                "rows": int(rows.sum()),
            }
        )
    return errors, pd.DataFrame(lines)


def _said(value: Estimate) -> str:
    return interval(value.value, value.low, value.high)
