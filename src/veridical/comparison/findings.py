"""What a comparison says first: what changed, how far apart the two are, and what was looked for in vain.

A `change` answers a question that has a no: does the policy answer otherwise, can the reference's probe still
read it. It is found where exchanging the two models within pairs hardly ever gives as much (p below 0.05) and
it is large enough to matter; of 20 pairs of models that nothing was planted in, one such finding in twenty is
to be expected for each question. A `distance` says how much and where two models differ, and is above zero
for any two that are not equal: it is no sign that something was trained in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

# pandas' stubs take a row or a filtered table for a union of everything that it could be.
Tables = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One sentence.

    Attributes:
        text: What was found, or what was looked for.
        found: Whether it was there.
        value: The figure.
        low, high: Its 95 % interval; NaN where nothing was sampled.
        control: What the figure is compared with, in words.
        weight: Rank, higher first.
        kind: Whether this is a change or a distance.
    """

    text: str
    found: bool
    value: float
    low: float
    high: float
    control: str
    weight: float
    kind: Literal["change", "distance"] = "distance"

    def __str__(self) -> str:
        if np.isfinite(self.low):
            return f"{self.text} (95 % interval {self.low:.3g} to {self.high:.3g}; {self.control})"
        return f"{self.text} ({self.control})"


def find(tables: Tables) -> list[Finding]:
    """Findings of all parts that are there: changes, then distances, each the most important first, and last
    what was not found."""
    from veridical.comparison.found_changes import CHANGES
    from veridical.comparison.found_distances import DISTANCES

    said = [finding for part in (*CHANGES, *DISTANCES) for finding in part(tables)]
    return sorted(said, key=lambda each: (not each.found, each.kind != "change", -each.weight))


def line_of(tables: Tables, table: str, **where: object) -> Any:
    """The first line of a table where columns have these values; None without one."""
    frame: Any = tables.get(table)
    if frame is None or frame.empty:
        return None
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return None if frame.empty else frame.iloc[0]


def three(line: Any) -> tuple[float, float, float]:
    """Value and interval of a line."""
    return float(line["value"]), float(line["low"]), float(line["high"])
