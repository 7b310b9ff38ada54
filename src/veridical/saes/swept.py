"""What `sweep_saes` returns: the SAEs that were trained to the end, and every judgement with its reason."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

from veridical.saes.base import SAE
from veridical.saes.halving import Judgement
from veridical.saes.runs import Run, SAERuns

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section


@dataclass(frozen=True, eq=False, repr=False)
class SAESweep:
    """A sweep that is over.

    Attributes:
        runs: The members in the order of the list; the cancelled ones without an SAE.
        judgements: What was found and decided at each rung, in order of time.
        planned: Tokens that each member would have been trained on, by name.
        control: Name of the member that only NaN could cancel.
    """

    runs: SAERuns
    judgements: tuple[Judgement, ...]
    planned: Mapping[str, int] = field(default_factory=dict)
    control: str | None = None

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, which: int | str) -> SAE:
        """The SAE of that position or name.

        Raises:
            UnknownNameError: No member has that name.
            InputError: The member was cancelled; says why.
        """
        return self.runs[which]

    @property
    def spent(self) -> int:
        """Tokens that were trained on, summed over members."""
        return sum(run.tokens for run in self.runs)

    @property
    def share(self) -> float:
        """`spent` over the tokens of training every member to the end."""
        return self.spent / max(sum(self.planned.values()), 1)

    def best(self, l0: float | None = None) -> SAE:
        """The SAE that explains most of the held-out variance, of those trained to the end.

        Args:
            l0: Look only among those with at most this many active latents a token: what is explained can
                be compared at matched L0 alone.

        Raises:
            DataError: No SAE is left to choose from.
        """
        return self.runs.best(l0)

    def to_frame(self) -> pd.DataFrame:
        """One line per member: config in short, last figures on held-out vectors (final ones, or those at the
        rung where it was cancelled), tokens seen, its rank at its last rung, why it was cancelled."""
        frame = self.runs.to_frame()
        last = {one.name: one for one in self.judgements}
        for line, run in enumerate(self.runs):
            found = last.get(run.name)
            if run.figures is None and found is not None:
                frame.loc[line, "explained_variance"] = found.explained_variance
                frame.loc[line, "fvu"] = 1 - found.explained_variance
                frame.loc[line, "l0"], frame.loc[line, "dead"] = found.l0, found.dead
        place = list(frame.columns).index("tokens")
        names = [run.name for run in self.runs]
        frame.insert(place + 1, "planned", [self.planned[name] for name in names])
        judged = [one.name for one in self.judgements]
        frame.insert(place + 2, "rungs", [judged.count(name) for name in names])
        ranks = [f"{last[name].rank} of {last[name].of}" if name in last else None for name in names]
        frame.insert(place + 3, "last_rank", ranks)
        frame.insert(place + 4, "control", [name == self.control for name in names])
        return frame

    def rungs(self) -> pd.DataFrame:
        """One line per member and rung: figures, rank among its peers, whether it went on, and why."""
        return pd.DataFrame([asdict(one) for one in self.judgements])

    def figure(self) -> go.Figure:
        """What each member explains at its rungs and at its end; a cross where it was cancelled."""
        import plotly.graph_objects as go

        from veridical.reporting.figures import COLOURS, figure, plain, style

        drawn = figure()
        groups = list(dict.fromkeys(one.peers for one in self.judgements))
        shown = set()
        for run in self.runs:
            points = self._course(run)
            if not points:
                continue
            peers = next((one.peers for one in self.judgements if one.name == run.name), "without peers")
            colour = COLOURS[groups.index(peers) % len(COLOURS)] if peers in groups else COLOURS[-1]
            symbols = ["circle"] * len(points)
            if run.cancelled:
                symbols[-1] = "x"
            drawn.add_trace(
                go.Scatter(
                    x=[tokens for tokens, _ in points],
                    y=[explained for _, explained in points],
                    mode="lines+markers",
                    line={"color": colour, "dash": "dash" if run.name == self.control else "solid"},
                    marker={"symbol": symbols, "size": 8},
                    name=plain(peers),
                    legendgroup=peers,
                    showlegend=peers not in shown,
                    hovertemplate=plain(run.name) + "<br>%{x:,} tokens, explained %{y:.3f}<extra></extra>",
                )
            )
            shown.add(peers)
        return style(drawn, "The sweep, rung by rung", "tokens seen", "explained variance, held out")

    def report_section(self) -> Section:
        """Figures of the rungs and of the frontier, and both tables, as a section of a report."""
        from veridical.reporting.section import Section

        done = [(run.name, run.figures) for run in self.runs if run.figures is not None]
        text = (
            f"{len(self)} sparse autoencoders, of which {len(done)} were trained to the end. At each rung, "
            "members are compared on held-out vectors with peers of like architecture, width and k (or "
            "penalty, and then with the frontier of explained variance against L0), and those "
            f"behind are cancelled. {self.share:.1%} of the tokens of training all were spent. A slow member "
            "that would have won in the end is lost by this; the control, which was never cancelled, is one "
            "sample of what was thrown away."
        )
        headline = [("tokens spent", f"{self.share:.1%} of training all {len(self)}")]
        if done:
            name, best = max(done, key=lambda one: one[1].explained_variance)
            said = f"{best.explained_variance:.3f} ({name}, L0 {best.l0:.3g})"
            headline.append(("most explained", said))
        tables = [("Members", self.to_frame())]
        if self.judgements:
            tables.append(("Judgements", self.rungs()))
        figures = (self.figure(), self.runs.figure()) if done and self.judgements else ()
        return Section(
            title="Sweep of sparse autoencoders",
            text=f"{text}\n\n{self.verdict()}",
            figures=figures,
            tables=tuple(tables),
            headline=tuple(headline),
        )

    def verdict(self) -> str:
        """What the control says about the rule, in a sentence or two."""
        run = next((run for run in self.runs if run.name == self.control), None)
        if run is None or run.figures is None:
            return f"The control, {self.control}, was not trained to the end."
        spared = next((one for one in self.judgements if one.name == run.name and one.spared), None)
        if spared is None:
            return f"The control, {run.name}, was kept on its own merit at every rung."
        peers = {one.name for one in self.judgements if one.peers == spared.peers}
        others = [
            other.figures.explained_variance
            for other in self.runs
            if other.figures is not None and other.name in peers and other.name != run.name
        ]
        said = (
            f"The control, {run.name}, would have been cancelled after {spared.tokens:,} tokens. Trained to "
            f"the end it explains {run.figures.explained_variance:.3f}"
        )
        if not others:
            return f"{said}; none of its peers was trained to the end."
        right = "rightly" if max(others) >= run.figures.explained_variance else "wrongly"
        return f"{said}, the best of its peers {max(others):.3f}: it would have been cancelled {right}."

    def __repr__(self) -> str:
        done = sum(run.figures is not None for run in self.runs)
        return f"SAESweep({len(self)} SAEs, {done} trained to the end, {self.share:.1%} of the tokens spent)"

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{table}"

    def _course(self, run: Run) -> list[tuple[int, float]]:
        """Tokens and explained variance of a member, rung by rung and at its end."""
        judged = [one for one in self.judgements if one.name == run.name]
        points = [(one.tokens, one.explained_variance) for one in judged]
        if run.figures is not None:
            points.append((run.tokens, run.figures.explained_variance))
        return points
