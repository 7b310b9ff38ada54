"""Maps of cells one below the other, each with room for slanted labels below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from veridical.reporting.figures import plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

CELL, FEWEST = 22, 3
"""Pixels of a line of cells, and the lines that a map of fewer is as high as."""
TITLE, AXIS, PLAIN = 36, 150, 60
"""Pixels above the first map for the title, below each for slanted tokens and the next map's title, and below
the last where it has no tokens."""
LONGEST = 14
"""Characters of a token that an axis shows."""


def stacked(lines: Sequence[int], titles: Sequence[str] | None, last: int = AXIS) -> go.Figure:
    """An empty figure with a row of subplots for each map, as high as its lines need.

    Args:
        lines: Lines of cells of each map.
        titles: Of the maps; None for none.
        last: Pixels below the last map.
    """
    from plotly.subplots import make_subplots

    heights = [CELL * max(FEWEST, count) for count in lines]
    inside = sum(heights) + AXIS * (len(lines) - 1)  # gaps are shares of what lies within the margins
    return make_subplots(
        rows=len(lines),
        cols=1,
        row_heights=heights,
        subplot_titles=titles,
        vertical_spacing=AXIS / inside if len(lines) > 1 else 0,
    ).update_layout(height=TITLE + inside + last, margin={"t": TITLE, "b": last})


def token_label(place: str, token: str) -> str:
    """A token and its place, as an axis shows them."""
    return f"{plain(token, LONGEST)} · {plain(place, 24)}" if token else plain(place, 24)


def beside(figure: go.Figure, row: int, title: str) -> dict[str, Any]:
    """A colour bar as high as the map in a row, beside it."""
    low, high = figure.layout["yaxis" if row == 1 else f"yaxis{row}"].domain or (0.0, 1.0)
    return {
        "title": {"text": plain(title), "side": "right"},
        "thickness": 12,
        "len": high - low,
        "lenmode": "fraction",
        "y": (low + high) / 2,
    }
