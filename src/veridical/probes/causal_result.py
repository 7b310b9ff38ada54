"""What a causal check found: effects by strength, beside those of random directions."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.probes import evaluate
from veridical.probes.card import interval, number
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

SURE = 0.05
LOW_COVERAGE = 0.5


@dataclass(frozen=True)
class Edited:
    """One run over all rows.

    Attributes:
        strength: In standard deviations; NaN for an ablation, 0 for the unedited run.
        which: 0 for the direction, from 1 on the random ones, -1 for the unedited run.
        log_odds: `[rows]`, in nats.
        coverage: `[rows]`, probability of all answers that were compared.
    """

    strength: float
    which: int
    log_odds: np.ndarray
    coverage: np.ndarray


@dataclass(frozen=True, repr=False)
class CausalCheck(Saved):
    """Effects of adding and ablating a direction, and of the same edits along random directions.

    Attributes:
        edited: Every run; the first is the unedited one.
        kinds: Rows by what they are called, `[rows]` bool each; "all" is the first.
        groups: `[rows]`, pair of each row.
        weights: `[resamples, rows]`, how often each row counts.
        facts: Model, data, site, tokens, the unit of strength, and the mean norm of the edited activations.
    """

    edited: tuple[Edited, ...]
    kinds: Mapping[str, np.ndarray]
    groups: np.ndarray
    weights: np.ndarray
    facts: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """One line per edit and kind of rows.

        Columns: `rows_of`, `rows`, `pairs`, `edit` (add or ablate), `strength` (standard deviations; NaN for
        an ablation), `clean` and `log_odds` (means), `effect` (their difference, with its 95 % interval by
        pair), `random` (mean effect over the random directions; `random_low` and `random_high` are the
        smallest and largest of them), `difference` (effect less the random mean, row by row, with its
        interval), `p` (share of directions, this one among them, whose effect is as far from the mean of
        all their effects),
        `first_rate` (rows on which the first set of answers, such as the wrong ones, is likelier than the
        second) beside `first_rate_clean` and `first_rate_random`, and `coverage`.
        """
        return pd.DataFrame(self._lines)

    def effects(self, strength: float | None) -> np.ndarray:
        """Effect of the direction by row, `[rows]`, at a strength; None for its ablation."""
        return self._effects(np.nan if strength is None else strength)[0]

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        strengths = dict.fromkeys(run.strength for run in self.edited[1:] if not np.isnan(run.strength))
        return [
            self._line(kind, rows, strength)
            for kind, rows in self.kinds.items()
            for strength in (*strengths, np.nan)
        ]

    @property
    def _added(self) -> list[dict[str, Any]]:
        """Lines of the additions on all rows, weakest strength first."""
        lines = [line for line in self._lines if line["rows_of"] == "all" and line["edit"] == "add"]
        return sorted(lines, key=lambda line: line["strength"])

    def _runs(self, strength: float) -> list[Edited]:
        ablated = np.isnan(strength)
        return [
            run
            for run in self.edited[1:]
            if (np.isnan(run.strength) if ablated else run.strength == strength)
        ]

    def _effects(self, strength: float) -> np.ndarray:
        """`[1 + random, rows]`, the direction first."""
        return np.stack([run.log_odds for run in self._runs(strength)]) - self.edited[0].log_odds

    def _line(self, kind: str, rows: np.ndarray, strength: float) -> dict[str, Any]:
        clean, runs, effects = self.edited[0], self._runs(strength), self._effects(strength)[:, rows]
        weights = self.weights[:, rows]
        effect = evaluate.share(effects[0], weights)
        apart = evaluate.share(effects[0] - effects[1:].mean(0), weights)
        means = effects[1:].mean(1)
        # Any edit this long does something, often the same for all directions; what counts is standing out.
        distance = np.abs(effects.mean(1) - effects.mean())
        first = np.stack([run.log_odds[rows] > 0 for run in runs])
        rate = evaluate.share(first[0], weights)
        return {
            "rows_of": kind,
            "rows": int(rows.sum()),
            "pairs": len(np.unique(self.groups[rows])),
            "edit": "ablate" if np.isnan(strength) else "add",
            "strength": strength,
            "clean": float(clean.log_odds[rows].mean()),
            "log_odds": float(runs[0].log_odds[rows].mean()),
            "effect": effect.value,
            "effect_low": effect.low,
            "effect_high": effect.high,
            "random": float(means.mean()),
            "random_low": float(means.min()),
            "random_high": float(means.max()),
            "difference": apart.value,
            "difference_low": apart.low,
            "difference_high": apart.high,
            "p": float((distance >= distance[0]).mean()),
            "first_rate_clean": float((clean.log_odds[rows] > 0).mean()),
            "first_rate": rate.value,
            "first_rate_low": rate.low,
            "first_rate_high": rate.high,
            "first_rate_random": float(first[1:].mean()),
            "coverage_clean": float(clean.coverage[rows].mean()),
            "coverage": float(runs[0].coverage[rows].mean()),
        }

    def findings(self) -> list[str]:
        """What the table says, in sentences, the most important first."""
        added = self._added
        said = [self._verdict(added)]
        said += [self._sentence(line) for line in (added[-1], added[0])[: len(added)]]
        said += [self._sentence(line) for line in self._lines if line["edit"] == "ablate"]
        return said + self._cautions(added)

    def _verdict(self, added: list[dict[str, Any]]) -> str:
        what = f"{self.facts['direction']} at {self.facts['site']} ({self.facts['at']})"
        sure = [line for line in added if line["strength"] != 0 and _sure(line)]
        right = [line for line in sure if np.sign(line["difference"]) == np.sign(line["strength"])]
        if not sure:
            return (
                f"No causal effect was found for {what}: what adding it does can't be told from what random "
                "directions of equal length do."
            )
        if len(right) == len(sure):
            return (
                f"The model acts on {what}: adding it moves the answers ({self.facts['effect_on']}) the way "
                f"it points, beyond random directions of equal length, at {len(sure)} of {len(added)} "
                "strengths."
            )
        if not right:
            return (
                f"Adding {what} moves the answers ({self.facts['effect_on']}) against the way it points, "
                f"beyond random directions of equal length, at {len(sure)} of {len(added)} strengths."
            )
        return (
            f"Adding {what} moves the answers beyond random directions at {len(sure)} of {len(added)} "
            f"strengths, but the way it points at {len(right)} of these only: it disturbs more than it "
            "steers."
        )

    def _sentence(self, line: dict[str, Any]) -> str:
        act = "Ablating it" if line["edit"] == "ablate" else f"Adding {line['strength']:+g} of it"
        rows = "" if line["rows_of"] == "all" else f" on rows with {line['rows_of']}"
        return (
            f"{act}{rows} moves the log-odds of {self.facts['effect_on']} by "
            f"{interval(line['effect'], line['effect_low'], line['effect_high'])} nats, random directions "
            f"by {number(line['random'])} ({number(line['random_low'])} to {number(line['random_high'])}); "
            f"difference {interval(line['difference'], line['difference_low'], line['difference_high'])}, "
            f"p = {line['p']:.2f}. Answers of the first kind: {line['first_rate_clean']:.1%} before, "
            f"{line['first_rate']:.1%} after, {line['first_rate_random']:.1%} with random directions."
        )

    def _cautions(self, added: list[dict[str, Any]]) -> list[str]:
        said = []
        unit, norm = self.facts["unit"], self.facts["mean_norm"]
        if max(abs(line["strength"]) for line in added) * unit > norm:
            said.append(
                "The strongest edit is longer than the activations themselves: it shows what breaks the "
                "model as well as what it uses."
            )
        low = min(added, key=lambda line: line["coverage"])
        if low["coverage"] < LOW_COVERAGE:
            said.append(
                f"The answers hold {low['coverage_clean']:.0%} of the probability unedited and "
                f"{low['coverage']:.0%} at strength {low['strength']:+g}: where that is low, the model would "
                "rather say something else."
            )
        if 1 / (1 + self.facts["random"]) > SURE:
            said.append(
                f"With {self.facts['random']} random directions p can't fall below {SURE}; take at least 19."
            )
        return said

    def figure(self) -> go.Figure:
        """Effect against strength, with the band over pairs, and the range of the random directions."""
        from veridical.reporting import figures

        lines = self._added
        if not any(line["strength"] == 0 for line in lines):
            zero = dict.fromkeys(lines[0], 0.0)
            lines = sorted([*lines, zero], key=lambda line: line["strength"])
        y = {name: [line[name] for line in lines] for name in lines[0]}
        figure, x = figures.figure(), y["strength"]
        figures.line_with_band(
            figure,
            x,
            y["random"],
            y["random_low"],
            y["random_high"],
            name="random directions",
            colour=figures.GREY,
            dash="dot",
            band=f"{self.facts['random']} directions, smallest to largest",
        )
        figures.line_with_band(
            figure,
            x,
            y["effect"],
            y["effect_low"],
            y["effect_high"],
            name=str(self.facts["direction"]),
        )
        return figures.style(
            figure,
            f"What adding {figures.plain(self.facts['direction'], 40)} does to the answers "
            f"({figures.plain(self.facts['effect_on'], 60)})",
            "strength, in standard deviations along the direction",
            "change in log-odds (nats)",
        )

    def report_section(self) -> Section:
        """Findings, dose-response figure and table."""
        from veridical.reporting.section import Section

        shown = self.to_frame().round(3)
        facts = self.facts
        how = (
            f"Edited at {facts['site']}, tokens: {facts['at']}, on {len(self.groups)} rows in "
            f"{len(np.unique(self.groups))} pairs. Strength 1 is one standard deviation of the activations "
            f"along the direction ({facts['unit']:.3g}; their mean norm is {facts['mean_norm']:.3g}). "
            "Ablation projects to the mean along the direction."
        )
        line = self._added[-1]
        return Section(
            title=f"Does the model use {facts['direction']}?",
            text="\n\n".join([*self.findings(), how]),
            figures=(self.figure(),),
            tables=(("Effects by edit, in nats, with 95 % intervals by pair", shown),),
            headline=(
                (f"change in log-odds at strength {line['strength']:+g}", f"{line['effect']:+.2f} nats"),
            ),
        )

    def __repr__(self) -> str:
        return (
            f"CausalCheck({self.facts['direction']} at {self.facts['site']}, {len(self.groups)} rows, "
            f"{len(self.edited) - 1} edits: {self.findings()[0]})"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.findings())
        return said + str(self.to_frame().round(3).to_html(index=False, border=0))


def _sure(line: Mapping[str, Any]) -> bool:
    """Apart from random directions: by the interval over pairs, and by rank among the directions."""
    apart = line["difference_low"] > 0 or line["difference_high"] < 0
    return bool(apart and line["p"] <= SURE)
