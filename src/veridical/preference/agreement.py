"""How far labellers agree beyond chance on which of two completions is better.

Of two labellers Cohen's kappa (1960), of more Fleiss' kappa (1971) over the pairs that all of them judged;
beside it Krippendorff's alpha (2011, nominal), which takes in every pair that at least two judged. 1 is full
agreement, 0 what chance gives. Intervals resample whole prompts, as the pairs of one prompt share its
completions.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.errors import DataError
from veridical.preference.guidelines import Ranking
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

RESAMPLES = 500
Statistic = Callable[[np.ndarray], float]


@dataclass(frozen=True, repr=False)
class Agreement(Saved):
    """How far labellers agree on pairs of completions.

    Attributes:
        table: One line per criterion: `statistic` ("Cohen" for two labellers, "Fleiss" for more), `kappa`
            with its 95 % interval (`low`, `high`), `alpha` with its own (`alpha_low`, `alpha_high`), `agreed`
            (share of equal verdicts of two labellers), `pairs` that all judged, `shared` that at least two
            did, and `labellers`. Kappa is NaN where no pair was judged by all.
        pairwise: One line per criterion and two labellers: `one`, `other`, `kappa` (Cohen), `agreed` and
            `pairs`.
        facts: Seed and labellers.
    """

    table: pd.DataFrame
    pairwise: pd.DataFrame
    facts: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def findings(self) -> list[str]:
        """Each criterion in a sentence."""
        said = []
        for line in self.table.to_dict("records"):
            kappa = (
                f"{line['statistic']}'s kappa {line['kappa']:.2f} ({line['low']:.2f} to {line['high']:.2f}) "
                f"over {line['pairs']} pairs"
                if np.isfinite(line["kappa"])
                else "no pair was judged by all"
            )
            said.append(
                f"{line['criterion'] or 'No criterion named'}: {line['labellers']} labellers agree in "
                f"{line['agreed']:.1%} of their verdicts; {kappa}, Krippendorff's alpha {line['alpha']:.2f} "
                f"({line['alpha_low']:.2f} to {line['alpha_high']:.2f}) over {line['shared']}."
            )
        return said

    def figure(self) -> go.Figure:
        """Alpha of each criterion with its interval."""
        from veridical.reporting import figures

        drawn, table = figures.figure(), self.table
        drawn.add_scatter(
            x=[figures.plain(name or "all") for name in table["criterion"]], y=table["alpha"].tolist(),
            mode="markers", name="alpha",
            error_y={
                "type": "data", "symmetric": False, "array": (table["alpha_high"] - table["alpha"]).tolist(),
                "arrayminus": (table["alpha"] - table["alpha_low"]).tolist(),
            },
        )  # fmt: skip
        return figures.style(
            drawn, title="Agreement between labellers", x="criterion", y="Krippendorff's alpha", legend=False
        )

    def report_section(self) -> Section:
        """Findings, figure, and the table of every two labellers."""
        from veridical.reporting.section import Section

        return Section(
            title="Agreement between labellers",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),),
            tables=(
                ("By criterion", self.table.round(4)),
                ("Every two labellers", self.pairwise.round(4)),
            ),
        )

    def __repr__(self) -> str:
        names = [name or "all" for name in self.table["criterion"]]
        said = ", ".join(f"{name} {alpha:.2f}" for name, alpha in zip(names, self.table["alpha"]))
        return f"Agreement(alpha: {said})"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.table.round(4).to_html(index=False, border=0))


def agreement(rankings: Iterable[Ranking], seed: int = 0, resamples: int = RESAMPLES) -> Agreement:
    """Agreement between labellers beyond chance, for every criterion, on better, tie or worse.

    Args:
        rankings: Rankings by at least two labellers.
        seed: Of the intervals.
        resamples: Draws of whole prompts for them.

    Raises:
        DataError: Only one labeller, no pair that two have judged, a pair that one judged twice.
    """
    by_criterion: dict[str, dict[tuple[str, str, str], dict[str, int]]] = {}
    for ranking in rankings:
        for (one, other), verdict in ranking.verdicts().items():
            judged = by_criterion.setdefault(ranking.criterion, {}).setdefault((ranking.key, one, other), {})
            if ranking.labeller in judged:
                raise DataError(f"labeller {ranking.labeller!r} judged one pair twice: {one!r}, {other!r}")
            judged[ranking.labeller] = verdict
    if not by_criterion:
        raise DataError("there are no rankings")
    lines, pairwise = [], []
    for name, judged in by_criterion.items():
        names, verdicts, prompts = _grid(name, judged)
        lines.append({"criterion": name, **_agreed(verdicts, prompts, seed, resamples)})
        pairwise += [{"criterion": name, **line} for line in _two_by_two(names, verdicts)]
    columns = ["criterion", "one", "other", "kappa", "agreed", "pairs"]
    return Agreement(
        pd.DataFrame(lines), pd.DataFrame(pairwise, columns=columns), {"seed": seed, "resamples": resamples}
    )


def cohen(verdicts: np.ndarray) -> float:
    """Cohen's kappa of two labellers, from verdicts [pairs, 2]; 1 where both only ever say one thing."""
    values = np.unique(verdicts)
    agreed = float((verdicts[:, 0] == verdicts[:, 1]).mean())
    chance = float(sum(np.prod((verdicts == value).mean(axis=0)) for value in values))
    return 1.0 if chance == 1 else (agreed - chance) / (1 - chance)


def fleiss(verdicts: np.ndarray) -> float:
    """Fleiss' kappa of any number of labellers, from verdicts [pairs, labellers]."""
    counts = _counts(verdicts)
    raters = verdicts.shape[1]
    within = ((counts**2).sum(1) - raters) / (raters * (raters - 1))
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return 1.0 if chance == 1 else float((within.mean() - chance) / (1 - chance))


def krippendorff(verdicts: np.ndarray) -> float:
    """Krippendorff's alpha for nominal verdicts [pairs, labellers]; NaN where a labeller gave none.

    A pair with fewer than two verdicts says nothing; NaN where no pair has two.
    """
    counts = _counts(verdicts)
    counts = counts[counts.sum(1) > 1]
    if not len(counts):
        return float("nan")
    given = counts.sum(1, keepdims=True)
    observed = float(((counts * (given - counts)) / (given - 1)).sum())
    totals, every = counts.sum(0), counts.sum()
    expected = float((totals * (every - totals)).sum() / (every - 1))
    return 1.0 if expected == 0 else 1 - observed / expected


def _counts(verdicts: np.ndarray) -> np.ndarray:
    """How many labellers gave each verdict [pairs, values]."""
    values = np.unique(verdicts[~np.isnan(verdicts.astype(np.float64))])
    return np.stack([(verdicts == value).sum(1) for value in values], axis=1).astype(np.float64)


def _grid(
    criterion: str, judged: Mapping[Any, Mapping[str, int]]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Labellers, verdicts [pairs, labellers] with NaN where one gave none, and the prompt of each pair."""
    names = sorted({name for said in judged.values() for name in said})
    if len(names) < 2:
        raise DataError(f"{criterion or 'the rankings'}: only {names[0]!r} has labelled; agreement needs two")
    verdicts = np.array(
        [[said.get(name, np.nan) for name in names] for said in judged.values()], dtype=np.float64
    )
    if not ((~np.isnan(verdicts)).sum(1) > 1).any():
        raise DataError(f"{criterion or 'the rankings'}: no pair was judged by two of {', '.join(names)}")
    _, prompts = np.unique([key for key, _, _ in judged], return_inverse=True)
    return names, verdicts, prompts


def _agreed(verdicts: np.ndarray, prompts: np.ndarray, seed: int, resamples: int) -> dict[str, Any]:
    two = verdicts.shape[1] == 2
    statistic: Statistic = cohen if two else fleiss
    whole = ~np.isnan(verdicts).any(axis=1)
    shared = (~np.isnan(verdicts)).sum(1) > 1
    found: dict[str, Any] = {"statistic": "Cohen" if two else "Fleiss", "kappa": float("nan")}
    found |= {"low": float("nan"), "high": float("nan")}
    if whole.any():
        low, high = _interval(statistic, verdicts[whole], prompts[whole], seed, resamples)
        found |= {"kappa": statistic(verdicts[whole]), "low": low, "high": high}
    low, high = _interval(krippendorff, verdicts[shared], prompts[shared], seed, resamples)
    found |= {"alpha": krippendorff(verdicts), "alpha_low": low, "alpha_high": high}
    equal, of = 0, 0
    for one, other in itertools.combinations(range(verdicts.shape[1]), 2):
        both = ~np.isnan(verdicts[:, [one, other]]).any(axis=1)
        equal, of = equal + int((verdicts[both, one] == verdicts[both, other]).sum()), of + int(both.sum())
    return {
        **found, "agreed": equal / of, "pairs": int(whole.sum()), "shared": int(shared.sum()),
        "labellers": verdicts.shape[1],
    }  # fmt: skip


def _two_by_two(names: list[str], verdicts: np.ndarray) -> list[dict[str, Any]]:
    lines = []
    for one, other in itertools.combinations(range(len(names)), 2):
        both = verdicts[~np.isnan(verdicts[:, [one, other]]).any(axis=1)][:, [one, other]]
        if len(both):
            agreed = float((both[:, 0] == both[:, 1]).mean())
            held = {"kappa": cohen(both), "agreed": agreed, "pairs": len(both)}
            lines.append({"one": names[one], "other": names[other], **held})
    return lines


def _interval(
    statistic: Statistic, verdicts: np.ndarray, prompts: np.ndarray, seed: int, resamples: int
) -> tuple[float, float]:
    """95 % interval over resampled prompts, each with all of its pairs."""
    different = np.unique(prompts)
    rows = {prompt: np.flatnonzero(prompts == prompt) for prompt in different}
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        kept = np.concatenate([rows[prompt] for prompt in random.choice(different, len(different))])
        drawn.append(statistic(verdicts[kept]))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)
