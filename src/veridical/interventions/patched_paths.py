"""What edge or path patching found: the metric of every patched edge or path, example by example."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.interventions.graph import Edge
from veridical.probes import evaluate
from veridical.probes.card import interval, number
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.interventions.between import Between
    from veridical.reporting.section import Section

BARS = 40
"""Most edges or paths that are drawn as bars; beyond that edges are drawn as a grid."""


@dataclass(frozen=True, repr=False)
class PatchedPaths(Saved):
    """The metric with each edge or path patched.

    Attributes:
        what: "edges" or "paths".
        names: Each edge or path; a set's are joined by " + ".
        senders, receivers: The two ends of each, "" where a set has several.
        values: `[items, rows]`, the metric with it patched.
        clean, corrupt: `[rows]`, the metric of the two plain runs.
        direction: "denoising" or "noising".
        weights: `[resamples, rows]`, how often each row counts; no resamples for a single group of rows.
        facts: Model, metric, unit, positions and fingerprints.
    """

    what: str
    names: tuple[str, ...]
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    values: np.ndarray
    clean: np.ndarray
    corrupt: np.ndarray
    direction: str
    weights: np.ndarray
    facts: Mapping[str, Any]

    @classmethod
    def made(
        cls,
        between: Between,
        what: str,
        items: Sequence[Sequence[Any]],
        values: np.ndarray,
        clean: np.ndarray,
        corrupt: np.ndarray,
        bootstrap: int,
        seed: int,
    ) -> PatchedPaths:
        """The result for `items`, each a set of edges or of paths."""
        ends = [
            {(part.sender if isinstance(part, Edge) else part.nodes[0]).name for part in item}
            for item in items
        ]
        last = [{part.receiver.name for part in item} for item in items]
        return cls(
            what=what,
            names=tuple(" + ".join(part.name for part in item) for item in items),
            senders=tuple(found.pop() if len(found) == 1 else "" for found in ends),
            receivers=tuple(found.pop() if len(found) == 1 else "" for found in last),
            values=values,
            clean=clean,
            corrupt=corrupt,
            direction=between.direction,
            weights=between.weights(bootstrap, seed),
            facts=between.facts(seed),
        )

    @property
    def base(self) -> np.ndarray:
        """`[rows]`, the metric of the run that is patched."""
        return self.corrupt if self.direction == "denoising" else self.clean

    @property
    def effects(self) -> np.ndarray:
        """`[items, rows]`, what each patch changes."""
        return self.values - self.base

    @cached_property
    def total(self) -> float:
        """What patching everything changes, on average over rows."""
        other = self.clean if self.direction == "denoising" else self.corrupt
        return float((other - self.base).mean())

    def to_frame(self) -> pd.DataFrame:
        """One line per edge or path, in the order given.

        Columns: `edge` or `path`, `sender`, `receiver`, `metric` (mean over rows), `effect` (less the base
        run's) and `share` (effect over what patching everything changes; 1 is all of it), with the ends of
        their 95 % intervals over rows.
        """
        return pd.DataFrame(self._lines).drop(columns=[] if self.what == "edges" else ["sender", "receiver"])

    def strongest(self, most: int) -> pd.DataFrame:
        """The lines of at most so many edges or paths, the largest effect of either sign first."""
        order = np.argsort(-np.abs(self.effects.mean(1)), kind="stable")[:most]
        return self.to_frame().iloc[order].reset_index(drop=True)

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        other = self.clean if self.direction == "denoising" else self.corrupt
        weights = self.weights.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            counts = weights.sum(1)
            resampled = weights @ self.effects.T / counts[:, None]
            totals = weights @ (other - self.base) / counts
            shares = resampled / totals[:, None]
        lines = []
        for i, name in enumerate(self.names):
            effect = float(self.effects[i].mean())
            share = effect / self.total if self.total else float("nan")
            lines.append(
                {
                    self.what.removesuffix("s"): name,
                    "sender": self.senders[i],
                    "receiver": self.receivers[i],
                    "metric": float(self.values[i].mean()),
                    **evaluate.estimate(effect, resampled[:, i]).columns("effect"),
                    **evaluate.estimate(share, shares[:, i]).columns("share"),
                }
            )
        return lines

    def findings(self) -> list[str]:
        """What the table says, in sentences."""
        facts, rows = self.facts, len(self.clean)
        said = [
            f"{facts['metric']} is {number(float(self.clean.mean()))} on the clean rows and "
            f"{number(float(self.corrupt.mean()))} on the corrupt ones."
        ]
        for line in sorted(self._lines, key=lambda line: -abs(line["effect"]))[:3]:
            name = line[self.what.removesuffix("s")]
            shown = (
                interval(line["share"], line["share_low"], line["share_high"]) if len(self.weights) else ""
            )
            said.append(
                f"Patching {_cut(name)} changes it by {line['effect']:+.3f}, "
                f"{shown or number(line['share'])} of all."
            )
        if not len(self.weights):
            said.append(f"There is one {'row' if rows == 1 else 'group of rows'}, so there are no intervals.")
        return said

    def figure(self) -> go.Figure:
        """Share of the whole effect: bars with intervals, or for many edges a grid, senders by receivers."""
        from veridical.interventions.circuit_figures import bars, grid

        alone = all(self.senders) and all(self.receivers)
        return grid(self) if self.what == "edges" and alone and len(self.names) > BARS else bars(self)

    def report_section(self) -> Section:
        """Findings, figure and table."""
        from veridical.reporting.section import Section

        into = "clean into corrupt" if self.direction == "denoising" else "corrupt into clean"
        how = (
            f"{len(self.names)} {self.what} patched one by one, {into} ({self.direction}), on "
            f"{len(self.clean)} rows of {self.facts['model']}; positions: {self.facts['positions']}."
        )
        top = self.strongest(100).round(4)
        strongest = max(self._lines, key=lambda line: abs(line["effect"]))
        return Section(
            title=f"{self.what.capitalize()} patched: {self.facts['metric']}",
            text="\n\n".join([*self.findings(), how]),
            figures=(self.figure(),),
            tables=((f"The {len(top)} strongest of {len(self.names)} {self.what}", top),),
            headline=((f"share of the effect of {_cut(self.names[self._lines.index(strongest)])}",
                       number(strongest["share"])),),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"PatchedPaths({len(self.names)} {self.what}, {len(self.clean)} rows, {self.direction}: " + (
            f"{' '.join(self.findings()[1:2])})"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.to_frame().round(4).to_html(index=False, border=0, max_rows=60))


def _cut(name: str, limit: int = 80) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
