"""The table of an evaluation of interventions, its figure and its page."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from veridical.errors import unknown
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

SCORES = ("harmonic mean", "concept", "instruct", "fluency")
KL = "KL on neutral text, nats a token"


@dataclass(frozen=True, repr=False)
class Evaluation(Saved):
    """What interventions do, at every seed.

    Attributes:
        table: `intervention`, `seed`, `measure`, `value`, `low`, `high` (95 % over pairs within a seed), `n`.
        curve: `intervention`, `strength`, `kl`, `behaviour`, `kept`, at the first seed.
        facts: Model, data, behaviour, seeds.
    """

    table: pd.DataFrame
    curve: pd.DataFrame
    facts: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """One line per intervention and measure: `mean` over seeds, their standard deviation `spread` (NaN
        with one seed), `least` and `most`, `seeds`.
        """
        groups = self.table.groupby(["intervention", "measure"], sort=False)["value"]
        frame = groups.agg(mean="mean", spread="std", least="min", most="max", seeds="count")
        return frame.reset_index()

    def wide(self) -> pd.DataFrame:
        """One line per intervention, one column per measure (means over seeds), best harmonic mean first."""
        frame = self.to_frame()
        wide: Any = frame.pivot(index="intervention", columns="measure", values="mean")
        order = list(dict.fromkeys(frame["measure"]))
        first = [name for name in (*SCORES, str(self.facts["behaviour"]), KL) if name in order]
        wide = wide[[*first, *(name for name in order if name not in first)]]
        return wide.sort_values("harmonic mean", ascending=False, kind="stable")

    def value(self, intervention: str, measure: str) -> float:
        """Mean over seeds of one measure.

        Raises:
            UnknownNameError: No such intervention or measure.
        """
        frame = self.to_frame()
        for column, name in (("intervention", intervention), ("measure", measure)):
            if name not in set(frame[column]):
                raise unknown(column, name, dict.fromkeys(frame[column]))
        found: Any = frame[(frame["intervention"] == intervention) & (frame["measure"] == measure)]
        return float(found["mean"].iloc[0])

    def findings(self) -> list[str]:
        """What the table says, in sentences, the best by harmonic mean first."""
        frame, said = self.to_frame(), []
        behaviour = str(self.facts["behaviour"])
        for name in self.wide().index:
            mine = frame[frame["intervention"] == name].set_index("measure")
            spread = mine.loc["harmonic mean", "spread"]
            over = f" (spread {spread:.2f} over {len(self.facts['seeds'])} seeds)" if spread == spread else ""
            said.append(
                f"{name}: harmonic mean {mine.loc['harmonic mean', 'mean']:.2f} of 2{over}; {behaviour} "
                f"{mine.loc[behaviour, 'mean']:.1%}, {mine.loc[KL, 'mean']:.4f} nats a token on neutral text."
            )
        said.append(
            "The scores are measured, not judged by a model: concept is the share of rows as wanted, "
            "instruct how much else is still done, fluency the likelihood of answers under the plain model."
        )
        return said

    def figure(self) -> go.Figure:
        """The behaviour against the KL on neutral text, over strengths."""
        from veridical.reporting import figures

        drawn = figures.figure()
        for number, name in enumerate(dict.fromkeys(self.curve["intervention"])):
            mine: Any = self.curve[self.curve["intervention"] == name]
            mine = mine.sort_values("strength")
            drawn.add_scatter(
                x=mine["kl"].tolist(), y=mine["behaviour"].tolist(), mode="lines+markers",
                name=figures.plain(name, 40),
                line={"color": figures.COLOURS[number % len(figures.COLOURS)]},
                text=[f"strength {value:g}" for value in mine["strength"]],
            )  # fmt: skip
        return figures.style(
            drawn,
            f"What {figures.plain(self.facts['behaviour'], 60)} costs on neutral text",
            "KL on neutral text, nats a token",
            figures.plain(self.facts["behaviour"], 60),
            y_range=(-0.02, 1.02),
        )

    def bars(self) -> go.Figure:
        """The harmonic mean of every intervention with its spread over seeds."""
        from veridical.reporting import figures

        frame = self.to_frame()
        mine: Any = frame[frame["measure"] == "harmonic mean"]
        mine = mine.sort_values("mean", kind="stable")
        drawn = figures.figure()
        drawn.add_bar(
            x=mine["mean"].tolist(), y=[figures.plain(name, 40) for name in mine["intervention"]],
            orientation="h", error_x={"type": "data", "array": mine["spread"].fillna(0).tolist()},
            marker={"color": figures.BLUE}, name="harmonic mean",
        )  # fmt: skip
        return figures.style(
            drawn, "Harmonic mean of concept, instruct and fluency", "score, 0 to 2", "", legend=False
        )

    def report_section(self) -> Section:
        """Findings, figures and tables."""
        from veridical.reporting.section import Section

        wide = self.wide()
        best = str(wide.index[0])
        return Section(
            title=f"Steering: {self.facts['behaviour']}",
            text="\n\n".join(self.findings()),
            figures=(self.bars(), self.figure()) if len(self.curve) else (self.bars(),),
            tables=(
                ("Means over seeds", wide.round(4).reset_index()),
                ("Every measure, with its spread over seeds", self.to_frame().round(4)),
            ),
            headline=((f"harmonic mean of the best, {best}", f"{wide['harmonic mean'].iloc[0]:.2f} of 2"),),
        )

    def __repr__(self) -> str:
        wide = self.wide()
        best = f"{wide.index[0]} {wide['harmonic mean'].iloc[0]:.2f}"
        return f"Evaluation({len(wide)} interventions, {len(self.facts['seeds'])} seeds; best: {best} of 2)"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.wide().round(3).to_html(border=0))
