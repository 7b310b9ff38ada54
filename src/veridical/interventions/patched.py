"""What a sweep of patches found: each item's metric for each example, effects with intervals, heat maps."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.probes import evaluate
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

TOP = 12


@dataclass(frozen=True, repr=False)
class Patched(Saved):
    """The metric of every patched run.

    Attributes:
        table: One line per item: `site`, `kind`, `layer` (-1 for none), `head` (-1 for the whole site),
            `position` and `token` (where all examples have the same).
        values: `[items, examples]`, the metric of the patched runs; NaN where an example has no such
            position.
        base_values: `[examples]`, of the run that was patched.
        source_values: `[examples]`, of the run whose activations were put in; NaN where it has none.
        groups: `[examples]`, pair of each example.
        tokens: Texts of the clean rows' positions, "" where they are padded.
        facts: Model, metric and its unit, direction, seed and number of resamples.
    """

    table: pd.DataFrame
    values: np.ndarray
    base_values: np.ndarray
    source_values: np.ndarray
    groups: np.ndarray
    tokens: tuple[tuple[str, ...], ...]
    facts: Mapping[str, Any]

    @property
    def effects(self) -> np.ndarray:
        """`[items, examples]`: the metric of the patched run less the base's."""
        return self.values - self.base_values

    @property
    def recovered(self) -> np.ndarray:
        """`[items]`: mean effect over the mean difference of source and base, on the same examples."""
        return self._estimates["recovered"][0]

    def to_frame(self) -> pd.DataFrame:
        """One line per item.

        Columns: those of `table`; `examples` (with such a position), `value` (mean metric of the patched
        runs), `effect` (mean of patched less base) and `recovered` (mean effect over the mean difference of
        source and base: 0 is the base, 1 the source), each of the two with the ends of its 95 % interval,
        NaN with a single pair of examples.
        """
        frame = self.table.copy()
        frame["examples"] = np.isfinite(self.values).sum(1)
        frame["value"] = _means(self.values)
        for name, (value, low, high) in self._estimates.items():
            frame[name], frame[f"{name}_low"], frame[f"{name}_high"] = value, low, high
        return frame

    @cached_property
    def _estimates(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        present = np.isfinite(self.values)
        effects = np.where(present, self.effects, 0.0)
        gaps = np.where(present, self.source_values - self.base_values, 0.0)
        ones = np.ones((1, len(self.base_values)))
        found = {"effect": _ratio(ones, effects, present.astype(float))[0]}
        found["recovered"] = _ratio(ones, effects, gaps)[0]
        bounds: dict[str, Any] = {name: (np.full(len(effects), np.nan),) * 2 for name in found}
        if len(np.unique(self.groups)) > 1:
            weights = evaluate.resample_weights(self.groups, self.facts["bootstrap"], self.facts["seed"])
            bounds = {
                "effect": _interval(_ratio(weights, effects, present.astype(float))),
                "recovered": _interval(_ratio(weights, effects, gaps)),
            }
        return {name: (found[name], *bounds[name]) for name in found}

    def findings(self) -> list[str]:
        """What the figures say, in sentences."""
        base, end = _mean(self.base_values), _mean(self.source_values)
        unit = f" ({self.facts['unit']})" if self.facts["unit"] else ""
        into = "clean into corrupt" if self.facts["direction"] == "denoising" else "corrupt into clean"
        if self.facts["source"]:
            into += f", from {self.facts['source']}"
        said = [
            f"{self.facts['metric']}{unit} is {base:.3g} in the run that is patched and {end:.3g} in the run "
            f"that activations come from ({into}; {len(self.base_values)} "
            f"example{'s' if len(self.base_values) > 1 else ''})."
        ]
        effects = np.abs(self._estimates["effect"][0])
        if np.isfinite(effects).any() and np.nanmax(effects) > 0:
            best = int(np.nanargmax(effects))
            share = self.recovered[best]
            of_all = f", {share:.0%} of the difference" if np.isfinite(share) else ""
            said.append(
                f"The largest effect is {self._estimates['effect'][0][best]:+.3g} at {self.label(best)}"
                f"{of_all}."
            )
        else:
            said.append("No patch changed the metric.")
        if len(np.unique(self.groups)) == 1:
            said.append("With one example there is no interval: the effect on other texts is not known.")
        return said

    def _largest(self) -> list[int]:
        """Numbers of the items of the largest effects, the largest first; absent ones last."""
        return np.argsort(-np.abs(self._estimates["effect"][0]), kind="stable")[:TOP].tolist()

    def label(self, item: int) -> str:
        """An item in words, such as "z.3, head 2, position 4 (' Rome')"."""
        line = self.table.iloc[item]
        name = str(line["site"]) if line["layer"] < 0 else f"{line['kind']}.{line['layer']}"
        head = "" if line["head"] < 0 else f", head {line['head']}"
        where = "" if line["position"] == "all" else f", position {line['position']}"
        token = f" ({line['token']!r})" if line["token"] and where else ""
        return f"{name}{head}{where}{token}"

    def figure(self, what: str = "effect") -> go.Figure:
        """Heat maps, one for each kind of site: layer by position, or layer by head.

        Args:
            what: "effect" or "recovered".

        Raises:
            UnknownNameError: Another quantity.
        """
        from veridical.interventions.heat_maps import heat_maps

        return heat_maps(self, what)

    def report_section(self) -> Section:
        """Findings, heat maps and the largest effects."""
        from veridical.reporting.section import Section

        frame = self.to_frame()
        order = self._largest()
        shown = with_intervals(frame.loc[order].drop(columns=["site", "value"]), ("effect", "recovered"))
        heads = shown["head"].tolist()
        shown["head"] = [None if head < 0 else head for head in heads]
        shown = shown if any(head >= 0 for head in heads) else shown.drop(columns=["head"])
        best = frame.loc[order[0]]
        text = [
            *self.findings(),
            "Intervals are 95 %, over resamples of whole pairs of examples. The recovered fraction is the "
            "mean effect over the mean difference of the two runs.",
        ]
        return Section(
            title=f"Activation patching: {self.facts['metric']}, {self.facts['direction']}",
            text="\n\n".join(text),
            figures=(self.figure(),),
            tables=((f"The {len(shown)} largest effects", shown),),
            headline=((f"largest effect, {self.label(int(order[0]))}", f"{best['effect']:+.3g}"),),
        )

    def __repr__(self) -> str:
        return (
            f"Patched({self.facts['metric']}, {self.facts['direction']}: {len(self.table)} patches, "
            f"{len(self.base_values)} examples)"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        frame = self.to_frame()
        order = self._largest()
        table = frame.loc[order].round(4).to_html(index=False, border=0, escape=True)
        return f"<p><b>{html.escape(repr(self))}</b></p>{said}{table}"


def with_intervals(
    frame: pd.DataFrame, names: Sequence[str], low: str = "{}_low", high: str = "{}_high"
) -> pd.DataFrame:
    """A table to read: the ends of each quantity's 95 % interval in one column behind it."""
    made = frame.reset_index(drop=True).copy()
    for name in names:
        ends = [made.pop(end.format(name)) for end in (low, high)]
        said = [f"{a:.3g} to {b:.3g}" if np.isfinite([a, b]).all() else None for a, b in zip(*ends)]
        behind = list(made.columns).index(name) + 1
        if any(said):
            made.insert(behind, "95 % interval" if len(names) == 1 else f"{name}, 95 %", said)
    return made.round(4)


def _ratio(weights: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """`[resamples, items]`: weighted sums of `upper` over those of `lower`, `[items, examples]` each."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (weights.astype(np.float64) @ upper.T) / (weights.astype(np.float64) @ lower.T)
    return np.where(np.isfinite(found), found, np.nan)


def _interval(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.full(resampled.shape[1], np.nan), np.full(resampled.shape[1], np.nan)
    some = np.isfinite(resampled).any(0)
    if some.any():
        low[some], high[some] = np.nanpercentile(resampled[:, some], [2.5, 97.5], axis=0)
    return low, high


def _means(values: np.ndarray) -> np.ndarray:
    count = np.isfinite(values).sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, np.nansum(values, 1) / count, np.nan)


def _mean(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")
