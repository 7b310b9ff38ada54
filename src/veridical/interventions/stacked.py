"""Maps of cells one below the other, each with room for slanted labels below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

CELL, FEWEST = 22, 3
"""Pixels of a line of cells, and the lines that a map of fewer is as high as."""
TITLE, AXIS = 36, 150
"""Pixels above the first map for the title, and below each for slanted tokens and the next map's title."""


def stacked(lines: Sequence[int], titles: Sequence[str] | None) -> go.Figure:
    """An empty figure with a row of subplots for each map, as high as its lines need.

    Args:
        lines: Lines of cells of each map.
        titles: Of the maps; None for none.
    """
    from plotly.subplots import make_subplots

    heights = [CELL * max(FEWEST, count) for count in lines]
    height = TITLE + sum(heights) + AXIS * len(lines)
    inside = height - TITLE - AXIS  # plotly counts the gaps as shares of what lies within the margins
    return make_subplots(
        rows=len(lines),
        cols=1,
        row_heights=heights,
        subplot_titles=titles,
        vertical_spacing=AXIS / inside if len(lines) > 1 else 0,
    ).update_layout(height=height, margin={"t": TITLE, "b": AXIS})
