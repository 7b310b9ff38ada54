"""What a comparison found: tables of every measure, and the findings that the report begins with."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from veridical.comparison.findings import Finding, find
from veridical.errors import unknown
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

SITE_TABLES = {
    "cka": ("cka", "CKA"),
    "procrustes": ("distance", "Procrustes distance"),
    "logit-lens divergence": ("kl", "logit-lens KL"),
    "directions": ("cosine", "cosine of directions"),
}
"""Tables with a line per site, their column that goes into `to_frame`, and what it is called there."""
DISTANCES = (
    "How far apart the two are, and where. Two models that are not equal differ in these, whatever the "
    "training was for, so they are no sign by themselves that something was trained in:"
)
LEFT_OUT = {"probes left out": "probe", "SAEs left out": "sae"}
"""Tables of what was given and could not be read, with the column of its name."""


@dataclass(frozen=True, repr=False)
class Comparison(Saved):
    """A policy compared with its reference.

    Attributes:
        tables: By name, one table for each measure; what each holds is said where it is made
            (`veridical.comparison.outputs`, `drift`, `cka`, `procrustes`, `lens`, `directions`, `weights`,
            `behaviour`). Measures of outputs carry "fixed text" or "policy samples" in their name.
        facts: The models and their fingerprints, the data, the options, `notes` and `not_applicable`.
    """

    tables: Mapping[str, pd.DataFrame]
    facts: Mapping[str, Any]

    def table(self, name: str) -> pd.DataFrame:
        """One of `tables`.

        Raises:
            UnknownNameError: Not there; says why if it does not apply to these models.
        """
        if name not in self.tables:
            why = self.facts["not_applicable"].get(name)
            raise unknown("table", name, self.tables, f"Not applicable: {why}." if why else "")
        return self.tables[name]

    def to_frame(self) -> pd.DataFrame:
        """Every measure in one table.

        Columns: `part` ("outputs on fixed text", "drift", ...), `place` (region, site or layer), `measure`,
        `value`, `low`, `high` (95 % interval; NaN where there is none).
        """
        parts = []
        for name, table in self.tables.items():
            if name.startswith("outputs on") or name == "drift":
                parts.append(table.rename(columns={"region": "place", "site": "place"}).assign(part=name))
            elif name in SITE_TABLES:
                column, measure = SITE_TABLES[name]
                parts.append(
                    table.rename(columns={"site": "place", column: "value"}).assign(
                        part=name, measure=measure
                    )
                )
            elif name == "weights by layer":
                place = [f"layer {layer}" if layer >= 0 else "outside the layers" for layer in table["layer"]]
                part = table.assign(place=place, value=table["relative"], measure="relative change")
                parts.append(part.assign(part="weights"))
            elif name == "probes":
                place = table["probe"] + ": " + table["reading"]
                parts.append(table.assign(place=place, value=table["auroc"], measure="auroc", part=name))
            elif name == "SAE error":
                place = table["sae"] + ", " + table["of"]
                parts.append(table.assign(place=place, part=name))
            elif name == "behaviour":
                parts.append(table.rename(columns={"rows": "place", "change": "value"}).assign(part=name))
        columns = ["part", "place", "measure", "value", "low", "high"]
        whole = [part.reindex(columns=columns) for part in parts if len(part)]
        return pd.concat(whole, ignore_index=True) if whole else pd.DataFrame(columns=columns)

    @property
    def found(self) -> list[Finding]:
        """Findings with their figures: what changed, the most important first, then what did not."""
        return find(self.tables)

    def findings(self) -> list[str]:
        """The same as sentences, and what could not be compared."""
        return [f"{finding}." for finding in self.found] + self._missing()

    def _missing(self) -> list[str]:
        missing: dict[str, list[str]] = {}
        for measure, why in self.facts["not_applicable"].items():
            missing.setdefault(why, []).append(measure)
        said = [f"Not applicable, as {why}: {', '.join(measures)}." for why, measures in missing.items()]
        for name, column in LEFT_OUT.items():
            table = self.tables.get(name)
            lines = [] if table is None else table[[column, "why"]].itertuples(index=False)
            said += [f"Left out: {which}, as {why}." for which, why in lines]
        return said

    def figure(self, what: str | None = None) -> go.Figure:
        """A figure.

        Args:
            what: "behaviour", "probes" (each reading), "features" (firing in both), "position" or "answer"
                (KL by position of the text or around an answer's beginning), "sites"
                (all measures along the depth), "where", "where parts", "where heads" (cross-model patching),
                "weights", "shift" (tokens), "texts" (token by token). The first that there is when not given.

        Raises:
            UnknownNameError: Another name.
            InputError: Nothing to draw for these models.
        """
        from veridical.comparison.figures import draw, drawable

        return draw(self, what if what is not None else next(iter(drawable(self)), "sites"))

    def report_section(self) -> Section:
        """Findings first, then notes, figures and tables."""
        from veridical.comparison.figures import drawable
        from veridical.reporting.section import Section

        facts, found = self.facts, self.found
        changes, distances = (
            [each for each in found if each.found and each.kind == kind] for kind in ("change", "distance")
        )
        text = [] if changes or distances else ["Nothing changed."]
        if changes:
            text += ["What changed, the most important first:", *(f"{each}." for each in changes)]
        elif distances:
            text += ["Nothing that was looked for changed in what the policy does or what is read from it."]
        if distances:
            text += [DISTANCES, *(f"{each}." for each in distances)]
        if absent := [f"{each.text}." for each in found if not each.found]:
            text += [" ".join(["Looked for and not found (intervals and controls in the table):", *absent])]
        text += [*self._missing(), *facts["notes"], str(facts["said"])]
        columns = ["text", "kind", "found", "value", "low", "high", "control"]
        lines = pd.DataFrame([{name: getattr(each, name) for name in columns} for each in found])
        tables = tuple(
            (f"{name[0].upper()}{name[1:]}", table.head(24).round(4))
            for name, table in self.tables.items()
            if not table.empty and not name.startswith(("outputs by", "drift by", "texts", "weight spectra"))
        )
        kl = self._kl()
        return Section(
            title=f"{facts['policy']} against {facts['reference']}",
            text="\n\n".join(text),
            figures=tuple(self.figure(name) for name in drawable(self)),
            tables=(("Findings", lines.rename(columns={"text": "finding"})), *tables),
            headline=kl,
        )

    def _kl(self) -> tuple[tuple[str, str], ...]:
        said = []
        for source, region in (("fixed text", "all"), ("policy samples", "answer")):
            table = self.tables.get(f"outputs on {source}")
            if table is not None:
                line = table[(table["region"] == region) & (table["measure"] == "kl")]
                said += [(f"KL a token, {source}", f"{v:.3g} nats") for v in line["value"]]
        return tuple(said)

    def made_by(self) -> dict[str, Any]:
        names = ("policy", "policy_fingerprint", "reference", "reference_fingerprint", "data_fingerprint")
        return {"seed": self.facts["seed"], **{name: self.facts[name] for name in names}}

    def with_tables(self, tables: Mapping[str, pd.DataFrame]) -> Comparison:
        """A copy with further tables, such as those of a measure that is run separately."""
        return replace(self, tables={**self.tables, **tables})

    def __repr__(self) -> str:
        return (
            f"Comparison({self.facts['policy']} against {self.facts['reference']}: {', '.join(self.tables)})"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return f"<p><b>{html.escape(repr(self))}</b></p>{said}"
