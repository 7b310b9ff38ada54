"""The frontier of reward and KL over checkpoints and runs, and the curve of over-optimisation through it.

Gao, Schulman and Hilton 2022 (arXiv 2210.10760) write the reward as a function of d = sqrt(KL), its gain over
the initial policy as

    best-of-n:               R(d) = d (a - b d)
    reinforcement learning:  R(d) = d (a - b log d)

with `a` the gain that optimisation begins with and `b` what over-optimisation takes. A proxy that the policy
is trained on keeps rising; the judge that it stands for has b > 0, a top, and falls after it. Both forms are
linear in a and b and are fitted by least squares.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from veridical.errors import DataError, unknown
from veridical.preference.runs import PreferenceRun
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

Form = Literal["rl", "bon"]
FORMS: tuple[Form, ...] = ("rl", "bon")
LEAST_POINTS = 4


@dataclass(frozen=True)
class Overoptimisation:
    """The fitted curve.

    Attributes:
        form: "rl" or "bon".
        a: Gain at small distance, reward per sqrt(nat).
        b: What over-optimisation takes.
        a_low, a_high, b_low, b_high: 95 % intervals over resampled points.
        r2: Share of the variance of the gain that the curve explains.
        peak: The distance d at which the curve is highest; infinite where it never falls.
    """

    form: Form
    a: float
    b: float
    a_low: float
    a_high: float
    b_low: float
    b_high: float
    r2: float
    peak: float

    def at(self, distance: np.ndarray | float) -> np.ndarray:
        """The gain at distances d = sqrt(KL) [n]."""
        return _basis(np.asarray(distance, dtype=np.float64), self.form) @ np.array([self.a, self.b])


@dataclass(frozen=True, repr=False)
class Frontier(Saved):
    """Reward against KL at every checkpoint of one or more runs, with the fitted curve.

    Attributes:
        table: `run`, `step`, `kl` (nats per answer, on policy), `distance` (its square root), `reward`,
            `gain` (over the reference), and `efficient`: no other checkpoint has as much reward at less KL.
        curve: What `Overoptimisation` has, by name.
        facts: Runs, column and seed.
    """

    table: pd.DataFrame
    curve: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def fit(self) -> Overoptimisation:
        """The fitted curve."""
        return Overoptimisation(**self.curve)

    def to_frame(self) -> pd.DataFrame:
        """One line per checkpoint."""
        return self.table

    def findings(self) -> list[str]:
        """The fit and what it means, in sentences."""
        fit, far = self.fit, float(np.max(self.table["distance"].to_numpy()))
        said = [
            f"The gain in {self.facts['column']} over {len(self.table)} checkpoints follows d (a - b "
            f"{'log d' if fit.form == 'rl' else 'd'}) with d = sqrt(KL), a = {fit.a:.3f} ({fit.a_low:.3f} to "
            f"{fit.a_high:.3f}), b = {fit.b:.3f} ({fit.b_low:.3f} to {fit.b_high:.3f}), R2 {fit.r2:.3f}."
        ]
        if fit.a_high < 0:
            said.append("It falls from the start: at no distance is anything gained.")
        elif fit.b_low > 0 and fit.peak < far:
            said.append(
                f"Over-optimised: the curve is highest at d = {fit.peak:.2f} ({fit.peak**2:.2f} nats) and "
                f"the furthest checkpoint is at {far:.2f} ({far**2:.2f} nats)."
            )
        elif fit.b_low > 0:
            said.append(
                f"The gain flattens; the curve's top, d = {fit.peak:.2f}, lies beyond all checkpoints."
            )
        else:
            said.append("No over-optimisation is seen: the interval of b holds zero or lies below it.")
        return said

    def figure(self) -> go.Figure:
        """Gain against distance, by run, with the fitted curve."""
        from veridical.reporting import figures

        drawn = figures.figure()
        for name, rows in self.table.groupby("run", sort=False):
            drawn.add_scatter(
                x=rows["distance"].tolist(), y=rows["gain"].tolist(), mode="markers",
                name=figures.plain(name), hovertext=[f"step {step}" for step in rows["step"]],
            )  # fmt: skip
        grid = np.linspace(0, max(1e-6, float(np.max(self.table["distance"].to_numpy()))), 101)[1:]
        figures.line_with_band(drawn, grid.tolist(), self.fit.at(grid).tolist(), name="fit", markers=False)
        column = self.facts["column"]
        return figures.style(
            drawn,
            title=f"{column} against distance from the reference",
            x="sqrt(KL), nats",
            y=f"gain in {column}",
        )

    def report_section(self) -> Section:
        """Findings, figure and table."""
        from veridical.reporting.section import Section

        return Section(
            title="Reward against KL",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),),
            tables=(("Every checkpoint", self.table.round(4)),),
        )

    def __repr__(self) -> str:
        fit = self.fit
        said = f"a {fit.a:.3g}, b {fit.b:.3g}, peak {fit.peak:.3g}"
        return f"Frontier({len(self.table)} checkpoints, {fit.form}: {said})"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.table.round(4).to_html(index=False, border=0))


def frontier(
    runs: Mapping[str, PreferenceRun] | Sequence[PreferenceRun],
    *,
    column: str = "reward",
    form: Form = "rl",
    seed: int = 0,
) -> Frontier:
    """The frontier of runs that share a reference.

    Args:
        runs: Runs by name, or in a list.
        column: Column of their tables that is the reward.
        form: "rl" or "bon".
        seed: Of the intervals.

    Raises:
        DataError: Runs without that column, or of different references, or too few checkpoints.
    """
    named = dict(runs) if isinstance(runs, Mapping) else {f"run {at}": run for at, run in enumerate(runs)}
    if not named:
        raise DataError("there are no runs")
    references = {run.facts["model_fingerprint"] for run in named.values()}
    if len(references) > 1:
        raise DataError("the runs have different references, so their KL cannot be compared")
    parts = []
    for name, run in named.items():
        for needed in ("kl", column):
            if needed not in run.table:
                raise unknown(f"column of {name}", needed, run.table.columns)
        start = float(run.table[column].iloc[0])
        reward = run.table[column]
        part = {"run": name, "step": run.table["step"], "kl": run.table["kl"], "reward": reward}
        parts.append(pd.DataFrame({**part, "gain": reward - start}))
    table = pd.concat(parts, ignore_index=True)
    table["distance"] = np.sqrt(np.maximum(table["kl"], 0))
    table["efficient"] = efficient(table["kl"].to_numpy(), table["reward"].to_numpy())
    fit = fit_overoptimisation(table["distance"], table["gain"], form, seed)
    return Frontier(table, dict(vars(fit)), {"runs": list(named), "column": column, "seed": seed})


def efficient(kl: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Which points no other beats: as much reward at less KL, or more at the same [n]."""
    at_least = (reward[None, :] >= reward[:, None]) & (kl[None, :] <= kl[:, None])
    better = at_least & ((reward[None, :] > reward[:, None]) | (kl[None, :] < kl[:, None]))
    return ~np.asarray(better.any(axis=1))


def fit_overoptimisation(
    distance: Any, gain: Any, form: Form = "rl", seed: int = 0, resamples: int = 1000
) -> Overoptimisation:
    """Least squares for a and b; points at distance 0 say nothing and are left out.

    Args:
        distance: d = sqrt(KL in nats) [n].
        gain: Reward less the reference's [n].
        form: "rl" or "bon".
        seed: Of the resamples for the intervals.
        resamples: How many.

    Raises:
        DataError: Fewer than four points away from the reference, all at one distance, or not finite.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    d, r = np.asarray(distance, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    if d.shape != r.shape or not (np.isfinite(d).all() and np.isfinite(r).all()):
        raise DataError("distances and gains must be finite and as many")
    if (d < 0).any():
        raise DataError(f"a distance of {d.min()}; sqrt(KL) is never negative")
    d, r = d[d > 0], r[d > 0]
    if len(np.unique(d)) < LEAST_POINTS:
        raise DataError(
            f"{len(np.unique(d))} different distances; a curve of two coefficients needs {LEAST_POINTS}"
        )
    basis = _basis(d, form)
    a, b = np.linalg.lstsq(basis, r, rcond=None)[0]
    random, drawn = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = random.integers(len(d), size=len(d))
        if len(np.unique(d[rows])) > 1:
            drawn.append(np.linalg.lstsq(basis[rows], r[rows], rcond=None)[0])
    low, high = np.percentile(np.array(drawn), [2.5, 97.5], axis=0)
    left = float(((r - basis @ [a, b]) ** 2).sum())
    total = float(((r - r.mean()) ** 2).sum())
    r2 = 1 - left / total if total else float("nan")
    return Overoptimisation(
        form, float(a), float(b), float(low[0]), float(high[0]), float(low[1]), float(high[1]), r2,
        _peak(float(a), float(b), form),
    )  # fmt: skip


def best_of_n_kl(n: int) -> float:
    """KL in nats of best-of-n to what it draws from, log n - (n - 1) / n (Stiennon et al. 2020)."""
    if n < 1:
        raise DataError(f"best of {n}: expected at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Any, judge: Any, n: int) -> float:
    """The judge's mean reward of the answer that the proxy likes best among n, over all draws of n.

    Args:
        proxy: Rewards of N answers to one prompt [N].
        judge: The judge's rewards of the same [N].
        n: How many are drawn, at most N. Exact, without sampling (Nakano et al. 2021, appendix I).
    """
    proxy, judge = np.asarray(proxy, dtype=np.float64), np.asarray(judge, dtype=np.float64)
    if proxy.shape != judge.shape or not 1 <= n <= len(proxy):
        raise DataError(f"best of {n} among {len(proxy)} answers and {len(judge)} judgements")
    order = np.argsort(proxy, kind="stable")
    draws = math.comb(len(proxy), n)
    share = np.array([math.comb(rank, n - 1) / draws for rank in range(len(proxy))])
    return float((judge[order] * share).sum())


def _basis(d: np.ndarray, form: Form) -> np.ndarray:
    """Columns of a and b [n, 2]."""
    safe = np.where(d > 0, d, 1.0)
    return np.stack([d, -d * (np.log(safe) if form == "rl" else d)], axis=-1)


def _peak(a: float, b: float, form: Form) -> float:
    """The distance where the derivative is zero, if the curve falls after it."""
    if b <= 0:
        return math.inf
    exponent = a / b - 1
    if form == "rl":
        return math.exp(exponent) if exponent < 700 else math.inf
    return max(0.0, a / (2 * b))
