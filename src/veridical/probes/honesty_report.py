"""What the honesty protocol found: one table, one figure, and what they say."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.config import HonestyConfig
from veridical.errors import unknown
from veridical.probes.card import interval
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.probes.base import LinearProbe
    from veridical.reporting.section import Section

CHOSEN = "chosen on folds"
"""Site and estimator of the lines whose choice every fold made without its own pairs."""
SHORT = {
    "auroc_lied": "lied or refused",
    "auroc_told": "told or not",
    "auroc_told_of_truthful": "told or not, of true answers",
    "lead_over_text": "lead over text",
    "recall_fpr1": "fires on lies",
    "confused_fpr1": "on confusion",
    "refused_fpr1": "on refusals",
    "honest_fpr1": "on honest answers",
}
"""Columns of the report's table; firing at the threshold of 1 % false positives on honest answers."""
LYING = ("lying", "lying, all rows")


@dataclass(frozen=True, repr=False)
class HonestyReport(Saved):
    """The lying and the instruction probes side by side.

    Attributes:
        config: How they were fitted.
        table: One line per probe, estimator, site and part of the rows; see `to_frame`.
        cosines: Cosine of the lying directions with the instruction direction, by estimator and site.
        probes: `lying`, `lying, all rows` and `instruction`, each fitted on all rows that may be fitted on,
            at the site that the folds chose; with thresholds (`fpr1` set on honest answers) and calibration.
        chosen: By probe, the (estimator, site) that each fold chose.
        counts: Rows, pairs, and rows by kind.
        facts: Tokens, model and fingerprints.
        notes: What should be known about rows and texts.
    """

    config: HonestyConfig
    table: pd.DataFrame
    cosines: pd.DataFrame
    probes: Mapping[str, LinearProbe]
    chosen: Mapping[str, tuple[tuple[str, str], ...]]
    counts: Mapping[str, int]
    facts: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One line per probe, estimator, site and part of the rows; each figure with its 95 % interval.

        Columns: `probe`, `estimator`, `site` (`chosen on folds` where every fold chose its own), `rows` (the
        part), `pairs`, `n_lied`, `n_refused`, `n_honest`, `n_confused`, and with `_low` and `_high`:
        `auroc_lied` (lied against refused, told to lie and known), `auroc_lied_of_told` (lied against refused
        and confused), `auroc_told` (told to lie against not, known), `auroc_told_of_truthful` (refusals to
        lie against honest answers: the instruction alone), `lead_over_text` (over the text baseline, on
        `auroc_lied`, or for the instruction probe `auroc_told`); and at the threshold of 1 % false positives
        on honest answers (`_fpr1`) and at the balanced one (`_balanced`) how often the probe fires on lies
        (`recall`), on `confused` rows, `confused_told` to lie, `refused` and `honest`.
        """
        return self.table.copy()

    def line(self, probe: str = "lying", rows: str = "all rows", site: str = CHOSEN) -> dict[str, Any]:
        """The figures of one probe on one part of the rows; an unknown name is an error with the nearest."""
        for kind, name in (("probe", probe), ("rows", rows), ("site", site)):
            if name not in set(self.table[kind]):
                raise unknown(kind, name, dict.fromkeys(self.table[kind]))
        found = self.table.query("probe == @probe and rows == @rows and site == @site")
        if found.empty:
            raise unknown("site", site, dict.fromkeys(self.table.query("probe == @probe")["site"]))
        return {str(name): value for name, value in found.to_dict("records")[0].items()}

    @property
    def lying(self) -> LinearProbe:
        """The lying probe within `instructed_to_lie`, fitted on all rows that may be fitted on."""
        return self.probes["lying"]

    @property
    def monitor(self) -> LinearProbe:
        """The lying probe that had honest answers and confusion among its negatives."""
        return self.probes["lying, all rows"]

    @property
    def instruction(self) -> LinearProbe:
        """The instruction probe."""
        return self.probes["instruction"]

    @property
    def parts(self) -> list[str]:
        """The parts of the rows that figures are given for."""
        return list(dict.fromkeys(self.table["rows"]))

    def findings(self) -> list[str]:
        """What the figures say, in sentences."""
        said = [self._lies(name) for name in LYING]
        said += [self._reads_instruction(name) for name in LYING]
        said.append(
            "The instruction probe parts told from not told with AUROC "
            f"{self._said('instruction', 'auroc_told')}, and lies from refusals with "
            f"{self._said('instruction', 'auroc_lied')}."
        )
        said += [self._fires(name) for name in LYING]
        said += self._by_difficulty()
        at = self.probes["lying"].site
        shown = self.cosines.query("site == @at")["lying"].tolist()[0]
        said.append(f"At {at} the cosine of the lying and the instruction direction is {shown:.2f}.")
        return [*said, *self.notes]

    def figure(self) -> go.Figure:
        """AUROC by site: each probe on the lie and on the instruction."""
        from veridical.probes.figure import honesty_by_site

        return honesty_by_site(self)

    def report_section(self) -> Section:
        """The protocol as a section of a report."""
        from veridical.reporting.section import Section

        counts, tokens = self.counts, self.facts.get("tokens")
        text = (
            f"{counts['rows']} vectors of {counts['pairs']} pairs"
            + (f" (tokens read: {tokens})" if tokens else "")
            + f": {counts['lied']} lies, {counts['refused']} refusals to lie, {counts['honest']} honest "
            f"answers, {counts['confused']} confused. Each row is judged by a probe that saw nothing of its "
            f"pair; site and strength were chosen without it too ({self.config.folds} folds, nested). "
            f"Intervals are 95 %, over {self.config.bootstrap} resamples of whole pairs."
        )
        caption = (
            "Figures at the site that the folds chose; columns from `fires on lies` on are shares of rows "
            "above the threshold of 1 % false positives on honest answers"
        )
        tables = [(caption, self.summary()), ("Cosine with the instruction direction", self.cosines.round(3))]
        best = self.line("lying")
        return Section(
            title="Lie or instruction: the honesty protocol",
            text="\n\n".join([text, *self.findings()]),
            figures=(self.figure(),),
            tables=tuple(tables),
            headline=(("lied or refused, told to lie: AUROC", _interval(best, "auroc_lied")),),
        )

    def summary(self) -> pd.DataFrame:
        """The chosen lines of the table in short, each figure as `value [low, high]`."""
        lines = []
        shown = self.table[self.table["site"].isin([CHOSEN, "text"])]
        for _, line in shown.iterrows():
            kept = {said: _interval(line, name) for name, said in SHORT.items() if name in line}
            lines.append({"probe": line["probe"], "rows": line["rows"], "lies": line["n_lied"], **kept})
        return pd.DataFrame(lines)

    def __repr__(self) -> str:
        line = self.line("lying")
        return (
            f"HonestyReport(lied or refused AUROC {_interval(line, 'auroc_lied')}; the same probe on the "
            f"instruction, of true answers, {_interval(line, 'auroc_told_of_truthful')}; "
            f"{self.counts['pairs']} pairs)"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        table = self.summary().to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{said}{table}"

    def _said(self, probe: str, figure: str, rows: str = "all rows") -> str:
        return _interval(self.line(probe, rows), figure)

    def _lies(self, name: str) -> str:
        what = "lied or refused, told to lie and known"
        said = f"The probe `{name}` ({what}) has AUROC {self._said(name, 'auroc_lied')} on held-out pairs"
        others = [part for part in self.parts if part.startswith("held-out prompts")]
        for part in others:
            said += f", {self._said(name, 'auroc_lied', part)} on {part}"
        picks = Counter(f"{estimator} at {site}" for estimator, site in self.chosen[name])
        chosen = ", ".join(
            f"{pick} ({count} of {len(self.chosen[name])})" for pick, count in picks.most_common()
        )
        text = self.table[self.table["probe"] == "text alone, lying"]
        alone = "" if text.empty else f" The text alone reaches {self._said_text()}."
        return f"{said}. The folds chose {chosen}.{alone}"

    def _said_text(self) -> str:
        return _interval(self.line("text alone, lying", "all rows", "text"), "auroc_lied")

    def _reads_instruction(self, name: str) -> str:
        line = self.line(name)
        shown = _interval(line, "auroc_told_of_truthful")
        other = self._said("instruction", "auroc_told_of_truthful")
        start = (
            f"Among true answers, where the instruction differs and no lie does, the probe `{name}` parts "
            f"those told to lie from the rest with AUROC {shown} (the instruction probe: {other})"
        )
        if not np.isfinite(line["auroc_told_of_truthful_low"]):
            return f"{start}."
        if line["auroc_told_of_truthful_low"] > 0.5:
            return f"{start}: besides the lie it reads something of the instruction."
        if line["auroc_told_of_truthful_high"] < 0.5:
            return f"{start}: refusals to lie look less like lies than honest answers do."
        return f"{start}: it does not read the instruction."

    def _fires(self, name: str) -> str:
        parts = ["all rows", *(part for part in self.parts if part == "held-out prompts")]
        said = [
            f"{part}: lies {self._said(name, 'recall_fpr1', part)}, confusion "
            f"{self._said(name, 'confused_fpr1', part)}, refusals {self._said(name, 'refused_fpr1', part)}, "
            f"honest answers {self._said(name, 'honest_fpr1', part)}"
            for part in parts
        ]
        return (
            f"At the threshold of 1 % false positives on honest answers, the probe `{name}` fires on ("
            + "; ".join(said)
            + ")."
        )

    def _by_difficulty(self) -> list[str]:
        parts = [p for p in self.parts if p.endswith("third") or p.startswith("difficulty ")]
        if not parts:
            return []
        shown = ", ".join(f"{part} {self._said('lying', 'auroc_lied', part)}" for part in parts)
        return [f"By difficulty, the AUROC of the probe `lying` is: {shown}."]


def _interval(line: Any, name: str) -> str:
    value, low, high = (float(line[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return interval(value, low, high) if np.isfinite(low) else interval(value, None, None)
