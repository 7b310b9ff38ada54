"""A circuit that was found, and what exact runs say of it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.interventions.graph import Graph
from veridical.probes.card import interval, number
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section


RANKED = {
    "edges_ig": "edge attribution with integrated gradients",
    "edges": "edge attribution",
    "exact": "exact patches of each edge alone",
}


@dataclass(frozen=True, repr=False)
class Circuit(Saved):
    """Edges of a model that make a metric differ between clean and corrupt rows.

    Attributes:
        edges: Names, the strongest first; all lie on a way from the embedding to the logits.
        scores: `[edges]`, what the ranking says that each adds to the metric, on average over choosing rows.
        ranks: `[edges]`, place of each among all edges by size of score, from 0.
        curve: Growing circuits along the ranking, from no edge to all: `edges` (the strongest so many),
            `kept` (those on a way from the embedding to the logits), `faithfulness` on the choosing rows,
            `held_out` with its 95 % interval, and where they were drawn the mean, smallest and largest
            faithfulness of random circuits.
        checks: `what` ("the circuit", "the model without it", random circuits of as many edges),
            `faithfulness` and `held_out` with its interval: each one's share of the clean-corrupt difference.
        clean, corrupt: `[rows]`, the metric of the two plain runs.
        choosing, held_out: Numbers of the rows that chose the edges, and of those that had no part in it.
        facts: Model, metric, method, dimensions and fingerprints.
    """

    edges: tuple[str, ...]
    scores: np.ndarray
    ranks: np.ndarray
    curve: pd.DataFrame
    checks: pd.DataFrame
    clean: np.ndarray
    corrupt: np.ndarray
    choosing: np.ndarray
    held_out: np.ndarray
    facts: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.edges)

    @cached_property
    def graph(self) -> Graph:
        """All nodes and edges of the model."""
        return Graph(**self.facts["graph"])

    @property
    def held_out_rows(self) -> int:
        """How many rows had no part in the choice."""
        return len(self.held_out)

    @property
    def faithfulness(self) -> float:
        """Share of the clean-corrupt difference that the circuit alone makes: on held-out rows if any."""
        return self._share(0)

    @property
    def without(self) -> float:
        """The same of the model without the circuit: 0 if the circuit is complete."""
        return self._share(1)

    @property
    def random(self) -> np.ndarray:
        """The same of random circuits of as many edges, `[controls]`."""
        return np.array([self._share(i) for i in range(2, len(self.checks))])

    def _share(self, line: int) -> float:
        return float(self.checks["held_out" if self.held_out_rows else "faithfulness"].iloc[line])

    def to_frame(self) -> pd.DataFrame:
        """One line per edge, the strongest first: `edge`, `sender`, `receiver`, `score`, `rank`."""
        ends = [self.graph.edge(name) for name in self.edges]
        return pd.DataFrame(
            {
                "edge": list(self.edges),
                "sender": [edge.sender.name for edge in ends],
                "receiver": [edge.receiver.name for edge in ends],
                "score": self.scores,
                "rank": self.ranks,
            }
        )

    def findings(self) -> list[str]:
        """What the checks say, in sentences."""
        facts = self.facts
        if not self.edges:
            return ["No edge was kept: the circuit is empty."]
        line = self.checks.iloc[0]
        on = f"on {self.held_out_rows} held-out rows" if self.held_out_rows else "on the rows that chose it"
        shown = number(self.faithfulness)
        if self.held_out_rows:
            shown = interval(line["held_out"], line["held_out_low"], line["held_out_high"])
        said = [
            f"{len(self.edges)} of {facts['all_edges']} edges ({len(self.edges) / facts['all_edges']:.1%}) "
            f"make {shown} of the difference in {facts['metric']} between clean ({self.clean.mean():.3f}) "
            f"and corrupt ({self.corrupt.mean():.3f}), {on}.",
            f"Without them the rest of the model makes {number(self.without)} of it.",
        ]
        if len(self.random):
            mean, low, high = (number(float(f(self.random))) for f in (np.mean, np.min, np.max))
            said.append(
                f"{len(self.random)} random circuits of as many edges make {mean} of it ({low} to {high})."
            )
            if self.faithfulness <= self.random.max():
                said.append("The circuit does no better than the best random one: it explains nothing.")
        if self.held_out_rows and line["faithfulness"] - self.faithfulness > 0.2:
            said.append(
                f"On the rows that chose it, it is {number(float(line['faithfulness']))}: it fits them more "
                "than others."
            )
        if not self.held_out_rows:
            said.append(
                "There were too few rows to hold some out, so its faithfulness elsewhere is not known."
            )
        return said

    def figure(self) -> go.Figure:
        """The circuit as a graph: nodes by layer, edges by size and sign of score."""
        from veridical.interventions.circuit_figures import graph_figure
        from veridical.reporting import figures

        scores = {self.graph.edge(name): float(score) for name, score in zip(self.edges, self.scores)}
        title = f"A circuit of {len(self.edges)} edges for {figures.plain(self.facts['metric'], 40)}"
        return graph_figure(self.graph, scores, title)

    def curve_figure(self) -> go.Figure:
        """Faithfulness by number of edges, beside random circuits."""
        from veridical.interventions.circuit_figures import curve_figure

        return curve_figure(self)

    def report_section(self) -> Section:
        """Findings, graph, curve and tables."""
        from veridical.reporting.section import Section

        ranked = RANKED[self.facts["method"]]
        how = (
            f"Edges of {self.facts['model']} ranked by {ranked} on {len(self.choosing)} rows"
            + (f", then dropped where that moves the faithfulness by less than {self.facts['prune']:g}"
               if self.facts["prune"] else "")
            + ". Every edge outside a circuit carries the corrupt run, in exact runs."
        )  # fmt: skip
        return Section(
            title=f"Circuit for {self.facts['metric']}",
            text="\n\n".join([*self.findings(), how]),
            figures=(self.figure(), self.curve_figure()),
            tables=(
                ("Its edges", self.to_frame().round(4).head(100)),
                ("Growing circuits", self.curve.round(3)),
            ),
            headline=((f"faithfulness of {len(self.edges)} edges", number(self.faithfulness)),),
        )

    def __repr__(self) -> str:
        return f"Circuit({len(self.edges)} edges of {self.facts['model']}: {self.findings()[0]})"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.to_frame().round(4).to_html(index=False, border=0, max_rows=40))
