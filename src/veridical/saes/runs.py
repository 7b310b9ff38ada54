"""What `train_saes` returns: the SAEs in order, their held-out figures, and how they came about."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from veridical.errors import DataError, InputError, unknown
from veridical.saes.base import SAE
from veridical.saes.config import SAEConfig
from veridical.saes.measure import Figures

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section


@dataclass(frozen=True, eq=False)
class Run:
    """One member of a training.

    Attributes:
        name: Its name in the run.
        config: Its config.
        sae: The trained SAE in raw units, scales folded in; None where it was cancelled.
        figures: Its figures on held-out vectors; None where it was cancelled.
        tokens: Tokens that it was trained on.
        history: Training figures now and then: tokens, loss and its parts.
        cancelled: Why it was cancelled; None where it was not.
    """

    name: str
    config: SAEConfig
    sae: SAE | None
    figures: Figures | None
    tokens: int
    history: tuple[dict[str, float], ...]
    cancelled: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class SAERuns:
    """The SAEs of one training, by position or name.

    Attributes:
        runs: The members in the order of their configs.
        facts: Versions, fingerprint of the data, seconds of training.
    """

    runs: tuple[Run, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __getitem__(self, which: int | str) -> SAE:
        """The SAE of that position or name.

        Raises:
            UnknownNameError: No member has that name.
            InputError: The member was cancelled; says why.
        """
        if isinstance(which, str):
            names = [run.name for run in self.runs]
            if which not in names:
                raise unknown("SAE", which, names)
            which = names.index(which)
        run = self.runs[which]
        if run.sae is None:
            raise InputError(f"{run.name} was cancelled: {run.cancelled}")
        return run.sae

    def best(self, l0: float | None = None) -> SAE:
        """The SAE that explains most of the held-out variance.

        Args:
            l0: Look only among those with at most this many active latents a token: what is explained can
                be compared at matched L0 alone.

        Raises:
            DataError: No SAE is left to choose from.
        """
        found = [(figures.fvu, sae) for _, sae, figures in self._finished() if l0 is None or figures.l0 <= l0]
        if not found:
            limit = "" if l0 is None else f" with L0 of at most {l0:g}"
            raise DataError(f"none of {len(self.runs)} SAEs was trained to the end{limit}")
        return min(found, key=lambda one: one[0])[1]

    def to_frame(self) -> pd.DataFrame:
        """One line per member: its config in short, its held-out figures, and whether it was cancelled."""
        return pd.DataFrame([_line(run) for run in self.runs])

    def history(self) -> pd.DataFrame:
        """Training figures of every member: name, tokens, loss and its parts."""
        lines = [{"name": run.name, **figures} for run in self.runs for figures in run.history]
        return pd.DataFrame(lines)

    def figure(self) -> go.Figure:
        """Active latents against what is left unexplained, held-out vectors: lower left is better."""
        import plotly.graph_objects as go

        from veridical.reporting.figures import COLOURS, figure, plain, style

        drawn = figure()
        families: dict[str, list[tuple[Run, Figures]]] = {}
        for run, sae, figures in self._finished():
            families.setdefault(f"{run.config.architecture}, {sae.width:,} latents", []).append(
                (run, figures)
            )
        colours = COLOURS * (1 + len(families) // len(COLOURS))
        for (family, some), colour in zip(families.items(), colours):
            drawn.add_trace(
                go.Scatter(
                    x=[figures.l0 for _, figures in some],
                    y=[figures.fvu for _, figures in some],
                    text=[plain(f"{run.name}: {figures.dead:.1%} dead") for run, figures in some],
                    hovertemplate="%{text}<br>L0 %{x:.3g}, FVU %{y:.3g}<extra></extra>",
                    mode="markers",
                    marker={"color": colour, "size": 9},
                    name=plain(family),
                )
            )
        return style(
            drawn, "Sparsity and what is left unexplained", "active latents a token (L0)", "FVU, held out"
        )

    def report_section(self) -> Section:
        """The table and the figure as a section of a report."""
        from veridical.reporting.section import Section

        done = self._finished()
        gone = [f"{run.name} was cancelled: {run.cancelled}." for run in self.runs if run.cancelled]
        text = (
            f"{len(self.runs)} sparse autoencoders over one stream of activations. Figures are on vectors "
            "that none was trained on. What is explained compares only between SAEs of about equal L0."
        )
        headline = []
        if done:
            run, _, figures = min(done, key=lambda one: one[2].fvu)
            headline.append(("least FVU", f"{figures.fvu:.3g} ({run.name}, L0 {figures.l0:.3g})"))
        return Section(
            title="Sparse autoencoders",
            text="\n\n".join([text, *gone]),
            figures=(self.figure(),) if done else (),
            tables=(("Held-out figures of each SAE", self.to_frame()),),
            headline=tuple(headline),
        )

    def _finished(self) -> list[tuple[Run, SAE, Figures]]:
        """Members that were trained to the end, with their SAE and figures."""
        return [
            (run, run.sae, run.figures)
            for run in self.runs
            if run.sae is not None and run.figures is not None
        ]

    def __repr__(self) -> str:
        fvus = sorted(figures.fvu for _, _, figures in self._finished())
        gone = f", {len(self.runs) - len(fvus)} cancelled" if len(fvus) < len(self.runs) else ""
        span = f", FVU {fvus[0]:.3g}" if fvus else ""
        span += f" to {fvus[-1]:.3g}" if len(fvus) > 1 else ""
        return f"SAERuns({len(self.runs)} SAEs{span}{gone})"

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{table}"


def _line(run: Run) -> dict[str, Any]:
    config, figures = run.config, run.figures
    sites = ", ".join(config.reads)
    d_in = run.sae.d_in if run.sae is not None else None
    return {
        "name": run.name,
        "architecture": config.architecture,
        "site": sites or None,
        "width": run.sae.width if run.sae is not None else config.width,
        "sparsity": run.sae.describe() if run.sae is not None else None,
        "lr": config.lr if d_in is None else config.learning_rate(d_in),
        "tokens": run.tokens,
        "fvu": figures.fvu if figures else None,
        "explained_variance": figures.explained_variance if figures else None,
        "l0": figures.l0 if figures else None,
        "dead": figures.dead if figures else None,
        "dense": figures.dense if figures else None,
        "cancelled": run.cancelled,
    }
