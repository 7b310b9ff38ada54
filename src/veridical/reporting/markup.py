"""Figures, tables and text as the parts of a page, with nothing in them that a browser would act on."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MAX_ROWS = 500
TALL_ROWS = 24
LONG_CELL = 32
_KEPT_TAGS = re.compile(r"<(?!/?(?:br|b|i|em|strong|sub|sup|extra)\s*/?>)", re.IGNORECASE)
_ANY_TAG = re.compile(r"<[^<>]*>")


@dataclass(frozen=True)
class FigurePart:
    """A figure ready for the page: its JSON can stand inside a script element."""

    id: str
    title: str
    label: str
    height: int
    spec: Markup


@dataclass(frozen=True)
class Column:
    """A column's heading, and how its cells are set: "number", "text" (long) or "word" (short)."""

    name: str
    kind: str


@dataclass(frozen=True)
class TablePart:
    """A table as formatted text cells."""

    id: str
    caption: str
    columns: list[Column]
    rows: list[list[str]]
    tall: bool
    left_out: int


def figure_part(figure: go.Figure, id: str) -> FigurePart:
    """The figure with its title moved out into the page and its markup made inert."""
    spec = json.loads(str(figure.to_json()))
    layout = spec.get("layout", {})
    title = _words((layout.pop("title", None) or {}).get("text") or "")
    for name in ("width", "images", "updatemenus"):  # images could load from elsewhere
        layout.pop(name, None)
    if title:
        layout.setdefault("margin", {}).setdefault("t", 14)
    spec = {"data": inert(spec.get("data", [])), "layout": inert(layout)}
    axes = [
        _words((layout.get(axis, {}).get("title") or {}).get("text") or "") for axis in ("yaxis", "xaxis")
    ]
    label = title or "Figure"
    if all(axes):
        label += f" ({axes[0]} by {axes[1]})"
    return FigurePart(
        id=id, title=title, label=label, height=int(layout.get("height") or 400), spec=script_json(spec)
    )


def table_part(table: pd.DataFrame, caption: str, id: str) -> TablePart:
    """The table as text; the index is left out, as in a saved section.

    The values pass through JSON as they do when a section is saved, so that a live report and one assembled
    from saved folders show the same.
    """
    import pandas as pd

    saved = json.loads(str(table.head(MAX_ROWS).to_json(orient="split", index=False)))
    table_shown = pd.DataFrame(saved["data"], columns=saved["columns"])
    cells, columns = [], []
    for position, name in enumerate(saved["columns"]):
        values = table_shown.iloc[:, position].tolist()
        shown, numeric = _column(values)
        long = max(map(len, shown), default=0) > LONG_CELL
        cells.append(shown)
        columns.append(Column(str(name), "number" if numeric else "text" if long else "word"))
    rows = [list(row) for row in zip(*cells)]
    return TablePart(
        id=id,
        caption=caption,
        columns=columns,
        rows=rows,
        tall=len(rows) > TALL_ROWS,
        left_out=max(0, len(table) - MAX_ROWS),
    )


def number(value: float) -> str:
    """Three figures that matter: 0.996, 12.3, 4,210, 3.2e-05."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if value == 0:
        return "0"
    if size < 5e-4 or size >= 1e7:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def inert(value: Any) -> Any:
    """`value` (JSON) with every tag that is not mere typography turned into text.

    plotly draws a few tags in labels, and links among them. Labels that went through `figures.plain` stay as
    they are; this is the second line, for figures that were made elsewhere.
    """
    if isinstance(value, str):
        return _KEPT_TAGS.sub("&lt;", value)
    if isinstance(value, list):
        return [inert(item) for item in value]
    if isinstance(value, dict):
        return {inert(key): inert(item) for key, item in value.items()}
    return value


def script_json(value: Any) -> Markup:
    """JSON that can't end the script element in which it stands."""
    # Sorted, so that a figure that was saved and loaded reads the same; ASCII, so no stray line separators.
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def paragraphs(text: str) -> list[str]:
    """The paragraphs of `text`, which blank lines part."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def slug(title: str, taken: Iterable[str]) -> str:
    """An anchor for `title` that is not among `taken`."""
    base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:48] or "part"
    name, n, used = base, 2, set(taken)
    while name in used:
        name, n = f"{base}-{n}", n + 1
    return name


def _words(label: str) -> str:
    """A plotly label as plain words."""
    return html.unescape(_ANY_TAG.sub(" ", _KEPT_TAGS.sub("&lt;", label)).replace("\u200b", "")).strip()


def _column(values: list[Any]) -> tuple[list[str], bool]:
    present = [value for value in values if not _missing(value)]
    numeric = bool(present) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in present)
    # Whole numbers that a missing neighbour turned into floats are counts still.
    counts = numeric and len(present) < len(values) and all(float(v).is_integer() for v in present)
    return ["–" if _missing(v) else _cell(int(v) if counts else v) for v in values], numeric


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
