"""What cross-model patching found, in sentences."""

from __future__ import annotations

from typing import Any

import numpy as np

from veridical.comparison.findings import Finding, Tables
from veridical.comparison.where import (
    ANYWHERE,
    BEFORE_LAST,
    BETWEEN,
    CHANGE,
    FOUND,
    HEADS,
    INTO_POLICY,
    INTO_REFERENCE,
    LEAST,
    PARTS,
    located,
)

NAMES = {"logit_diff": "the logit difference", "kl": "the divergence of the next token"}
SMALL = 0.01
"""Share of the change below which a part is not named."""


def where_findings(tables: Tables) -> list[Finding]:
    """The parts, the place and the head that carry the change; or that there is none to locate."""
    change: Any = tables.get(CHANGE)
    if change is None or change.empty:
        return []
    line = change.iloc[0]
    value, low, high = float(line["change"]), float(line["low"]), float(line["high"])
    rows, name = f"{int(line['pairs'])} pairs ({line['rows']})", NAMES[str(line["metric"])]
    if not located(line):
        text = f"On {rows} {name} did not change by more than chance or {LEAST:.0%}, so there is nothing to "
        text += "locate by patching"
        return [Finding(text, False, value, low, high, "0 for equal models", 25.0)]
    said = [_by_part(tables[PARTS], rows, name, line), *_by_place(tables.get(FOUND)), *_by_head(tables)]
    return said


def _by_part(table: Any, rows: str, name: str, change: Any) -> Finding:
    both = table.groupby("layer", sort=False)[["share", "low", "high"]].mean()
    parts = table.drop_duplicates("layer").set_index("layer")["part"]
    order = both["share"].sort_values(ascending=False).index
    named = [
        f"{_the(parts[at])} makes {both['share'][at]:.0%}" for at in order[:3] if both["share"][at] > SMALL
    ]
    last = both.index[-1]
    if not any(parts[last] in each for each in named):
        named.append(f"{_the(parts[last])} makes {max(both['share'][last], 0):.0%}")
    listed = ", ".join(named[:-1]) + f" and {named[-1]}" if len(named) > 1 else named[0]
    went = f"from {change['reference']:.3g} to {change['policy']:.3g}"
    text = f"On {rows} {name} went {went}; by cross-model patching {listed} of this change"
    best = order[0]
    control = f"share of {_the(parts[best])}; all parts add up to 100 %, evenly {1 / len(both):.0%} each"
    share, low, high = (float(both[column][best]) for column in ("share", "low", "high"))
    return Finding(text, True, share, low, high, control, 78.0)


def _the(part: str) -> str:
    return part if part.startswith("layer") else f"the {part}"


def _by_place(found: Any) -> list[Finding]:
    if found is None or found.empty:
        return []
    said = []
    for among, weight in ((ANYWHERE, 77.0), (BEFORE_LAST, 76.0)):
        lines = found[found["among"] == among].set_index("direction")
        if len(lines):
            said.append(_place(lines.loc[INTO_REFERENCE], lines.loc[INTO_POLICY], among, weight))
    same = len(set(zip(found["site"], found["position"]))) == 1
    return said[:1] if same else said


def _place(there: Any, back: Any, among: str, weight: float) -> Finding:
    where = f"position {there['position']} ({there['token']!r})"
    if there["position"] == BETWEEN:
        where = "the tokens that differ between the prompts"
    share, low, high = (float(there[column]) for column in ("share", "low", "high"))
    sure = low > 0
    verb = "restores" if sure else "does not restore beyond chance"
    first = "Patching" if among == ANYWHERE else "Before the last token, patching"
    text = f"{first} {there['site']} at {where} from the policy into the reference {verb} {share:.0%} of the "
    text += f"change, and from the reference into the policy {float(back['share']):.0%}"
    control = f"at random other places {float(there['random']):.1%}; on {int(there['pairs'])} pairs that the "
    control += "place was not chosen on"
    return Finding(text, sure, share, low, high, control, weight)


def _by_head(tables: Tables) -> list[Finding]:
    table: Any = tables.get(HEADS)
    if table is None or table.empty:
        return []
    mine = table[table["direction"] == INTO_REFERENCE].reset_index(drop=True)
    best = mine.loc[mine["share"].idxmax()]
    share, low, high = (float(best[column]) for column in ("share", "low", "high"))
    if not low > 0:
        text = "No single head's output carries the change beyond chance"
        return [Finding(text, False, share, low, high, f"the largest of {len(mine)} heads", 12.0)]
    text = f"Of single heads, head {int(best['head'])} of layer {int(best['layer'])} carries most of the "
    text += f"change: its output from the policy restores {share:.0%}"
    median = float(np.median(mine["share"]))
    return [Finding(text, True, share, low, high, f"the median head {median:.1%}", 36.0)]
