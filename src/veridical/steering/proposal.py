"""What to edit, and the evidence for it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section
    from veridical.steering.vectors import SteeringVector

VECTOR = "vector"


@dataclass(frozen=True, repr=False)
class Proposal(Saved):
    """A site, a method and tokens, with what speaks for them.

    Attributes:
        sites: By `site`: `auroc` of a probe on held-out folds, and what patches there carry ("carried by all
            tokens", "carried by the last token"; recovered fractions) where the pairs have options.
        tried: Vectors at equal KL: `method`, `site`, `positions`, `strength`, `kl`, `reached` (mean
            probability of what is wanted on validation rows; minus infinity where it costs more KL),
            `random` (the same for a random direction of equal length), `kept`.
        facts: Model, data, behaviour, the causal check, and `best`, the line of `tried` that is proposed.
        vector: That vector, calibrated.
    """

    sites: pd.DataFrame
    tried: pd.DataFrame
    facts: Mapping[str, Any]
    vector: SteeringVector | None = None

    @property
    def best(self) -> dict[str, Any]:
        """The line of `tried` that is proposed."""
        return {str(key): value for key, value in self.tried.iloc[int(self.facts["best"])].items()}

    def to_frame(self) -> pd.DataFrame:
        """`tried`, the best first."""
        return self.tried.sort_values("reached", ascending=False, kind="stable").reset_index(drop=True)

    def findings(self) -> list[str]:
        """What to edit and why, in sentences."""
        best, facts = self.best, self.facts
        kept = f", right answers to be kept at {best['kept']:.1%}" if best["kept"] == best["kept"] else ""
        said = [
            f"Edit {best['site']} by {best['method']} at tokens: {best['positions']}. At "
            f"{best['kl']:.3f} nats a token on neutral text it takes what is wanted ({facts['wanted']} "
            f"{facts['behaviour']}) from a probability of {facts['plain']:.1%} to {best['reached']:.1%} on "
            f"validation pairs{kept}; a random direction of the same length to {best['random']:.1%}."
        ]
        if best["reached"] == float("-inf"):
            return ["Nothing that was tried keeps to that KL on neutral text; allow more."]
        if best["reached"] - facts["plain"] < 0.1 or not best["reached"] > best["random"]:
            said.insert(
                0,
                "Nothing that was tried steers this behaviour by much at that KL, so the proposal is weak: "
                "allow more KL, give more pairs, or train an adapter.",
            )
        said += [self._read(best), *self._carried(best)]
        if facts["causal"]:
            said.append(f"Causal check at {facts['causal']['site']}: {facts['causal']['said']}")
        return said + self._others()

    def _read(self, best: Mapping[str, Any]) -> str:
        table = self.sites.set_index("site")
        top = str(table["auroc"].idxmax())
        there = float(table.loc[best["site"], "auroc"])
        if top == best["site"]:
            return f"The label is read best there too: AUROC {there:.3f} on held-out folds."
        return (
            f"The label is read there with AUROC {there:.3f} on held-out folds, best at {top} "
            f"({float(table.loc[top, 'auroc']):.3f}): where it is read best is not where it steers best."
        )

    def _carried(self, best: Mapping[str, Any]) -> list[str]:
        table = self.sites.set_index("site")
        columns = [name for name in table if str(name).startswith("carried")]
        if not columns:
            return []
        parts = [f"{float(table.loc[best['site'], name]):.2f} {name}" for name in columns]
        return [f"Patches there recover of the difference between the two sides: {', '.join(parts)}."]

    def _others(self) -> list[str]:
        best, frame = self.best, self.to_frame()
        other: Any = frame[np.isfinite(frame["reached"]) & (frame["method"] != best["method"])]
        other = other.drop_duplicates("method")
        if not len(other):
            return []
        parts = [f"{line['method']} {line['reached']:.1%}" for line in other.to_dict("records")]
        return [f"The best of the other methods, at the same KL: {', '.join(parts)}."]

    def figure(self) -> go.Figure:
        """Readability, what patches carry, and what vectors reach, by site."""
        from veridical.reporting import figures

        drawn, x = figures.figure(), self.sites["site"].tolist()
        columns = [str(name) for name in self.sites if name != "site"]
        for number, name in enumerate(columns):
            shown = "AUROC of a probe" if name == "auroc" else name
            figures.line_with_band(
                drawn, x, self.sites[name], name=shown, colour=figures.COLOURS[number], dash="dot"
            )
        kept: Any = self.to_frame()[lambda frame: np.isfinite(frame["reached"])]
        top = kept.drop_duplicates("site").set_index("site")["reached"].reindex(x)
        figures.line_with_band(
            drawn, x, top, name="steered: probability of what is wanted", colour=figures.COLOURS[len(columns)]
        )
        return figures.style(drawn, "Where the behaviour is read, carried and steered", "site", "share")

    def report_section(self) -> Section:
        """Findings, figure and tables."""
        from veridical.reporting.section import Section

        best = self.best
        return Section(
            title="What to edit",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),),
            tables=(
                ("Vectors at equal KL, on validation pairs", self.to_frame().round(4)),
                ("Sites", self.sites.round(4)),
            ),
            headline=((f"{best['method']} at {best['site']}", f"{best['reached']:.0%} as wanted"),),
        )

    def save(self, folder: str | Path) -> Path:
        """Saves the tables, the findings, and the vector in a folder below."""
        from dataclasses import replace

        if self.vector is not None:
            self.vector.save(Path(folder) / VECTOR)
        return Saved.save(replace(self, vector=None), folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Loads what `save` wrote."""
        from dataclasses import replace

        from veridical.steering.vectors import SteeringVector

        found = super().load(folder)
        place = Path(folder) / VECTOR
        return replace(found, vector=SteeringVector.load(place)) if place.is_dir() else found

    def __repr__(self) -> str:
        best = self.best
        return (
            f"Proposal({best['method']} at {best['site']}, tokens: {best['positions']}; "
            f"{self.facts['behaviour']}: {best['reached']:.1%} as wanted at {best['kl']:.3f} nats a token)"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.to_frame().round(3).to_html(index=False, border=0))
