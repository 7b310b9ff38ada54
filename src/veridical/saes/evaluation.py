"""The figures of one SAE on held-out rows, and how they are shown."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.probes.card import interval, number
from veridical.probes.evaluate import Estimate

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

SILENT = -7.0
"""Where a latent that never fired stands on the logarithmic axis of frequencies, at most."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What an SAE is worth on held-out rows.

    Attributes:
        name: The SAE's label.
        metrics: `fvu`, `explained_variance`, `l0` and `norm_ratio`, with 95 % intervals over texts.
        dead: Share of latents that exceeded 1e-3 on no row.
        dense: Share of latents that exceeded it on more than a tenth of the rows.
        frequency: `[F]`, share of the rows on which each latent exceeded 1e-3.
        largest: `[F]`, largest activation of each latent.
        baselines: FVU of PCA and of a random dictionary of the same L0; empty where not asked for.
        lead: FVU of each of these less the SAE's own, over the same resamples.
        loss: Cross-entropy of the model as it is and with the reconstruction spliced in; None without one.
        counts: Rows, texts, latents and width.
        facts: Site, architecture, model and data.
        notes: What a reader should know.
    """

    name: str
    metrics: Mapping[str, Estimate]
    dead: float
    dense: float
    frequency: np.ndarray
    largest: np.ndarray
    baselines: Mapping[str, Estimate] = field(default_factory=dict)
    lead: Mapping[str, Estimate] = field(default_factory=dict)
    loss: Mapping[str, Estimate] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One line for the SAE, then one for each dictionary that it is compared with (their FVU alone)."""
        line: dict[str, Any] = {"who": self.name}
        for name, value in {**self.metrics, **(self.loss or {})}.items():
            line |= value.columns(name)
        line |= {"dead": self.dead, "dense": self.dense, **self.counts}
        lines = [line]
        for name, value in self.baselines.items():
            explained = Estimate(1 - value.value, 1 - value.high, 1 - value.low)
            lines.append({"who": name, **value.columns("fvu"), **explained.columns("explained_variance")})
        return pd.DataFrame(lines)

    def to_dict(self) -> dict[str, float | None]:
        """Every figure by name with the ends of its interval, as a card and `metrics.json` keep it."""
        figures: dict[str, float | None] = {}
        for name, value in {**self.metrics, **(self.loss or {})}.items():
            figures |= {key: _finite(one) for key, one in value.columns(name).items()}
        for name, value in self.baselines.items():
            figures |= {key: _finite(one) for key, one in value.columns(f"fvu of {name}").items()}
        return {**figures, "dead": self.dead, "dense": self.dense, **self.counts}

    def figure(self) -> go.Figure:
        """How often the latents fire, on a logarithmic axis; silent ones stand at the left."""
        import plotly.graph_objects as go

        from veridical.reporting.figures import BLUE, GREY, figure, style

        drawn, fires = figure(), self.frequency > 0
        floor = max(SILENT, np.log10(1 / max(self.counts.get("rows", 1), 1)) - 0.5)
        bins = {"start": floor - 0.2, "end": 0.0001, "size": 0.2}
        drawn.add_trace(
            go.Histogram(x=np.log10(self.frequency[fires]), xbins=bins, name="firing", marker_color=BLUE)
        )
        silent = np.full(int((~fires).sum()), floor)
        drawn.add_trace(go.Histogram(x=silent, xbins=bins, name="dead", marker_color=GREY))
        drawn.update_layout(barmode="stack", bargap=0.03)
        title = f"How often latents fire: {number(self.dead)} dead, {number(self.dense)} dense"
        return style(drawn, title, "share of the rows, log10", "latents")

    def findings(self) -> list[str]:
        """What the figures say, in sentences."""
        said = [
            f"Explains {_said(self.metrics['explained_variance'])} of the variance with "
            f"{_said(self.metrics['l0'])} latents a row; {number(self.dead)} of the latents are dead."
        ]
        for name, lead in self.lead.items():
            better = (
                "better than" if lead.low > 0 else "worse than" if lead.high < 0 else "not surely better than"
            )
            said.append(f"FVU {better} {name} ({_said(self.baselines[name])}); difference {_said(lead)}.")
        if self.loss is not None and np.isfinite(self.loss["recovered"].value):
            said.append(
                f"Spliced in, it recovers {_said(self.loss['recovered'])} of the cross-entropy that zeroing "
                f"the site costs, and {_said(self.loss['recovered_mean'])} of what its mean costs."
            )
        return [*said, *self.notes]

    def report_section(self) -> Section:
        """The figures as a section of a report."""
        from veridical.reporting.section import Section

        headline = [("explained variance", _said(self.metrics["explained_variance"]))]
        headline.append(("active latents a row", _said(self.metrics["l0"])))
        if self.loss is not None:
            headline.append(("cross-entropy recovered", _said(self.loss["recovered"])))
        return Section(
            title=f"SAE {self.name} at {self.facts.get('site') or 'the given rows'}",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),),
            tables=(("Figures on held-out rows, 95 % intervals over texts", self._shown()),),
            headline=tuple(headline),
        )

    def _shown(self) -> pd.DataFrame:
        figures = {**self.metrics, **(self.loss or {})}
        lines = [{"figure": name.replace("_", " "), "value": _said(value)} for name, value in figures.items()]
        lines += [
            {"figure": f"fvu of {name}", "value": _said(value)} for name, value in self.baselines.items()
        ]
        lines += [{"figure": name, "value": number(getattr(self, name))} for name in ("dead", "dense")]
        return pd.DataFrame(lines)

    def __repr__(self) -> str:
        recovered = "" if self.loss is None else f", CE recovered {_said(self.loss['recovered'])}"
        return (
            f"Evaluation({self.name}: FVU {_said(self.metrics['fvu'])}, L0 {_said(self.metrics['l0'])}, "
            f"{number(self.dead)} dead{recovered}; {self.counts.get('texts')} texts)"
        )

    def _repr_html_(self) -> str:
        table = self._shown().to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{table}"


def frontier(evaluations: Mapping[str, Evaluation] | Sequence[Evaluation], *, title: str = "") -> go.Figure:
    """L0 against FVU for several SAEs, a colour for each family, with PCA's and the random dictionary's FVU.

    Args:
        evaluations: Results, by family name (SAEs of one family are joined: give lists) or in a row.
        title: What is compared.
    """
    from veridical.reporting.figures import COLOURS, GREY, figure, line_with_band, style

    drawn = figure()
    for colour, (family, members) in zip(COLOURS * 8, _families(evaluations).items()):
        ordered = sorted(members, key=lambda one: one.metrics["l0"].value)
        fvu = [one.metrics["fvu"] for one in ordered]
        line_with_band(
            drawn, [one.metrics["l0"].value for one in ordered], [one.value for one in fvu],
            [one.low for one in fvu], [one.high for one in fvu], name=family, colour=colour,
            hover=[_hover(one) for one in ordered],
        )  # fmt: skip
    every = [one for members in _families(evaluations).values() for one in members]
    for dash, kind in (("dot", "PCA"), ("dash", "random")):
        points = sorted(
            (one.metrics["l0"].value, value.value)
            for one in every
            for name, value in one.baselines.items()
            if kind in name
        )
        if points:
            xs, ys = zip(*points)
            label = "PCA of as many components" if kind == "PCA" else "random vectors, as many a row"
            line_with_band(drawn, xs, ys, name=label, colour=GREY, dash=dash)
    drawn.update_layout(hovermode="closest")
    drawn.update_xaxes(type="log")
    return style(
        drawn, title or "Sparsity and reconstruction", "L0, active latents a row", "FVU, held-out rows"
    )


def _families(
    evaluations: Mapping[str, Any] | Sequence[Evaluation],
) -> dict[str, list[Evaluation]]:
    if isinstance(evaluations, Mapping):
        return {
            name: [found] if isinstance(found, Evaluation) else list(found)
            for name, found in evaluations.items()
        }
    families: dict[str, list[Evaluation]] = {}
    for one in evaluations:
        families.setdefault(f"{one.facts.get('architecture')}, {one.counts.get('latents'):,}", []).append(one)
    return families


def _hover(one: Evaluation) -> str:
    from veridical.reporting.figures import plain

    return plain(f"{one.name}: {number(one.dead)} dead")


def _said(value: Estimate) -> str:
    return interval(value.value, value.low, value.high)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
