"""Several policies compared: a table of the models, of all pairs, maps, and whether they are alike inside."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.errors import InputError, unknown
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

MAPS = {
    "inside": "cka",
    "predictions": "divergence",
    "behaviour": "same behaviour",
    "reward": "reward correlation",
}
"""What a map can be drawn by, and the measure that its distances come from."""
FIGURES = ("alike", "map")


@dataclass(frozen=True, repr=False)
class Policies(Saved):
    """What `compare_many` found.

    Attributes:
        models: One line per model, references first: `model`, `reference` ("" for a reference), `trained_on`,
            `kl` to its reference (nats a token), its behaviour by measure, `implicit reward` (of the right
            option less the others, nats) and `reward` (of its answers, by a reward model); what there is.
        pairs: One line per pair of models, measure and place: `a`, `b`, `same_reference`, `measure`, `place`,
            `value`, `low`, `high`, `null` (95 % of swapped texts lie below) and `chance` (their mean). The
            measures are "cka" (streams, all tokens), "cka of changes" (what training changed at last tokens),
            "divergence" (Jensen-Shannon, nats a token), "same behaviour" (share of questions) and "reward
            correlation" (of implicit rewards).
        facts: References, fingerprints, data, notes, options.
    """

    models: pd.DataFrame
    pairs: pd.DataFrame
    facts: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """`pairs`."""
        return self.pairs.copy()

    def matrix(self, measure: str, place: str | None = None) -> pd.DataFrame:
        """A measure of all pairs as a symmetric table, models by models; the mean over places if not given.

        Raises:
            UnknownNameError: No such measure or place.
        """
        pairs: Any = self.pairs
        known = dict.fromkeys(pairs["measure"])
        if measure not in known:
            raise unknown("measure", measure, known)
        part = pairs[pairs["measure"] == measure]
        if place is not None:
            if place not in set(part["place"]):
                raise unknown("place", place, dict.fromkeys(part["place"]))
            part = part[part["place"] == place]
        grouped: Any = part.groupby(["a", "b"])
        found = {(a, b): float(rows["value"].mean()) for (a, b), rows in grouped}
        named = {name for pair in found for name in pair}
        names = [str(name) for name in self.models["model"] if name in named]
        own = 0.0 if measure == "divergence" else 1.0
        table = pd.DataFrame(np.nan, index=names, columns=names)
        for a in names:
            for b in names:
                table.loc[a, b] = own if a == b else found.get((a, b), found.get((b, a), np.nan))
        return table

    def map(self, by: str = "inside", seed: int = 0) -> tuple[pd.DataFrame, float]:
        """Places of the models in a plane, by multidimensional scaling (metric MDS, SMACOF), and its stress.

        Args:
            by: "inside" (1 - CKA, mean over depths), "predictions" (root of the divergence), "behaviour"
                (share of questions on which two differ) or "reward" (1 - correlation).
            seed: Of the starts.

        Returns:
            `model`, `x`, `y`; and Kruskal's stress-1: 0 where the plane shows all distances as they are,
            above about 0.2 it does not show them.

        Raises:
            UnknownNameError: Another name.
            InputError: A measure that these models lack, or fewer than three models with it.
        """
        from sklearn.manifold import smacof

        if by not in MAPS:
            raise unknown("map", by, MAPS)
        if MAPS[by] not in set(self.pairs["measure"]):
            raise InputError(f"there is no {MAPS[by]} of these models, so no map by {by}")
        table = self.matrix(MAPS[by])
        values = table.to_numpy(dtype=float)
        apart = np.maximum(np.sqrt(values) if by == "predictions" else 1 - values, 0)
        if len(apart) < 3 or not np.isfinite(apart).all():
            raise InputError(f"a map by {by} needs three models or more with {MAPS[by]} of every two")
        if not apart.any():
            return pd.DataFrame({"model": table.index, "x": 0.0, "y": 0.0}), 0.0
        options: Any = {"n_components": 2, "n_init": 8, "normalized_stress": True, "random_state": seed}
        found: Any = smacof(apart / apart.max(), **options)
        x, y = found[0].T * apart.max()
        return pd.DataFrame({"model": table.index, "x": x, "y": y}), float(found[1])

    def findings(self) -> list[str]:
        """Who is farthest from its reference, and which policies are alike inside or only outside."""
        said = []
        trained: Any = self.models[self.models["reference"] != ""]
        if "kl" in trained and trained["kl"].notna().all():
            order = trained.sort_values("kl", ascending=False)
            listed = ", ".join(f"{name} {kl:.3g}" for name, kl in zip(order["model"], order["kl"]))
            said.append(f"KL from the own reference, nats a token on the given text: {listed}.")
        table = self.alike()
        for line in table.to_dict("records"):
            inside = _said(line, "inside", "CKA of what training changed")
            outside = _said(line, "outside", line["outside_is"])
            if line["outside_alike"] and line["inside_alike"]:
                verdict = "are alike outside and inside"
            elif line["outside_alike"]:
                verdict = "are alike outside only"
            elif line["inside_alike"]:
                verdict = "are alike inside only"
            else:
                verdict = "are alike neither outside nor inside"
            said.append(f"{line['a']} and {line['b']} {verdict}: {outside}; {inside}.")
        return [*said, *self._by_training(table)]

    def alike(self) -> pd.DataFrame:
        """One line per pair of policies, for "alike inside, or only outside?".

        Inside is the CKA of changes at the last place but one: at the last one it is close to the
        predictions themselves. Outside is the correlation of implicit rewards, or the share of questions
        with the same outcome where nothing has options. A pair counts as alike where its interval lies above
        the null of swapped texts.
        """
        policies = set(self.models.loc[self.models["reference"] != "", "model"])
        belongs = dict(zip(self.models["model"], self.models["trained_on"])) if self._labelled else {}
        lines = []
        grouped: Any = self.pairs.groupby(["a", "b"], sort=False)
        for (a, b), rows in grouped:
            if not {a, b} <= policies:
                continue
            changes = rows[(rows["measure"] == "cka of changes") & rows["value"].notna()]
            outside = rows[rows["measure"] == "reward correlation"]
            if outside.empty or outside["value"].isna().all():
                outside = rows[rows["measure"] == "same behaviour"]
            if changes.empty or outside.empty:
                continue
            ours, theirs = changes.iloc[max(0, len(changes) - 2)], outside.iloc[0]
            line = {"a": a, "b": b, "same_reference": bool(ours["same_reference"]), "place": ours["place"]}
            line["same_training"] = bool(belongs) and belongs[a] == belongs[b]
            line["outside_is"] = str(theirs["measure"])
            for name, row in (("inside", ours), ("outside", theirs)):
                line |= {name: row["value"], **{f"{name}_{end}": row[end] for end in ("low", "high", "null")}}
                line[f"{name}_alike"] = bool(row["low"] > row["null"])
            lines.append(line)
        return pd.DataFrame(lines)

    @property
    def _labelled(self) -> bool:
        return "trained_on" in self.models.columns and any(self.models["trained_on"].tolist())

    def _by_training(self, table: pd.DataFrame) -> list[str]:
        """Whether pairs that were trained on the same are more alike than others, by permuted labels."""
        if not self._labelled or table.empty or len(set(table["same_training"])) < 2:
            return []
        policies: Any = self.models[self.models["reference"] != ""]
        names, labels = policies["model"].tolist(), policies["trained_on"].tolist()
        said = []
        for name in ("outside", "inside"):
            gap = _gap(table, name, dict(zip(names, labels)))
            # All orders of the labels where they are few.
            orders = list(permutations(labels)) if len(labels) <= 7 else _drawn(labels)
            null = [_gap(table, name, dict(zip(names, order))) for order in orders]
            share = float(np.mean(np.array(null) >= gap - 1e-12))
            said.append(
                f"{name.capitalize()}, policies trained on the same are {gap:+.3f} more alike than others; "
                f"of permuted labels {share:.0%} reach that."
            )
        return said

    def figure(self, what: str = "alike") -> go.Figure:
        """A figure.

        Args:
            what: "alike" (each pair of policies, inside against outside, with the null) or "map".

        Raises:
            UnknownNameError: Another name.
            InputError: Nothing to draw.
        """
        from veridical.comparison.policies_figures import draw_alike, draw_maps

        if what not in FIGURES:
            raise unknown("figure", what, FIGURES)
        return draw_alike(self) if what == "alike" else draw_maps(self)

    def report_section(self) -> Section:
        """Findings, figures and both tables."""
        from veridical.comparison.policies_figures import drawable
        from veridical.reporting.section import Section

        policies = self.models[self.models["reference"] != ""]
        return Section(
            title=f"{len(policies)} policies against {', '.join(self.facts['references'])}",
            text="\n\n".join([*self.findings(), *self.facts["notes"], self.facts["said"]]),
            figures=tuple(self.figure(name) for name in drawable(self)),
            tables=(("Models", self.models.round(4)), ("Pairs", self.pairs.round(4))),
        )

    def made_by(self) -> dict[str, Any]:
        kept = ("references", "fingerprints", "data_fingerprint")
        return {"seed": self.facts["seed"], **{name: self.facts[name] for name in kept}}

    def __repr__(self) -> str:
        return f"Policies({', '.join(self.models['model'])})"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return f"<p><b>{html.escape(repr(self))}</b></p>{said}"


def _said(line: Mapping[Any, Any], name: str, measure: str) -> str:
    spread = ""
    if np.isfinite(line[f"{name}_low"]):
        spread = f", 95 % interval {line[f'{name}_low']:.3f} to {line[f'{name}_high']:.3f}"
    at = f" at {line['place']}" if name == "inside" else ""
    return f"{measure}{at} {line[name]:.3f} (swapped texts stay below {line[f'{name}_null']:.3f}{spread})"


def _gap(table: pd.DataFrame, name: str, labels: dict[str, str]) -> float:
    same = np.array([labels[a] == labels[b] for a, b in zip(table["a"], table["b"])])
    values = table[name].to_numpy(dtype=float)
    return float(values[same].mean() - values[~same].mean()) if same.any() and (~same).any() else 0.0


def _drawn(labels: list[str], count: int = 2000) -> list[list[str]]:
    random = np.random.default_rng(0)
    return [[labels[at] for at in random.permutation(len(labels))] for _ in range(count)]
