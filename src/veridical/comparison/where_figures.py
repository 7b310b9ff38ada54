"""Figures of cross-model patching: shares by part, by layer and position with the tokens, and by head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.comparison.where import (
    BETWEEN,
    CHANGE,
    DIRECTIONS,
    HEADS,
    INTO_REFERENCE,
    PARTS,
    POSITIONS,
    located,
)
from veridical.errors import InputError
from veridical.reporting import figures

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.comparison.findings import Tables

LONGEST = 14
"""Characters of a token that the axis shows."""
CELL = 24
"""Pixels of a line of cells."""


def locatable(tables: Tables) -> dict[str, bool]:
    """The figures that there is something for: none where the behaviour did not change beyond chance."""
    change: Any = tables.get(CHANGE)
    there = change is not None and not change.empty and located(change.iloc[0])
    names = {"where": POSITIONS, "where parts": PARTS, "where heads": HEADS}
    return {name: bool(there and table in tables) for name, table in names.items()}


def draw_parts(tables: Tables) -> go.Figure:
    """Bars: the share of the change that arises in each part, in both directions."""
    import plotly.graph_objects as go

    table = _shared(tables, PARTS)
    figure = figures.figure()
    for way, colour in zip(DIRECTIONS, (figures.BLUE, figures.ORANGE)):
        part = table[table["direction"] == way]
        figure.add_trace(
            go.Bar(
                x=[figures.plain(name) for name in part["part"]],
                y=part["share"].tolist(),
                name=way,
                marker={"color": colour},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (part["high"] - part["share"]).fillna(0).tolist(),
                    "arrayminus": (part["share"] - part["low"]).fillna(0).tolist(),
                    "color": figures.GREY,
                },
                hovertemplate="%{x}: %{y:.1%}<extra></extra>",
            )
        )
    figure.update_yaxes(tickformat=".0%")
    return figures.style(figure, "In which part the change arises", "", "share of the change")


def draw_positions(tables: Tables) -> go.Figure:
    """Heat maps, layer by position with the tokens: what one vector of the stream carries over."""
    table = _shared(tables, POSITIONS)
    first = table[table["direction"] == INTO_REFERENCE].drop_duplicates("position")
    labels = [_label(place, token) for place, token in zip(first["position"], first["token"])]
    return _maps(table, "position", labels, "What one vector of the stream takes over", "token · position")


def draw_heads(tables: Tables) -> go.Figure:
    """Heat maps, layer by head: what one head's output takes over."""
    table = _shared(tables, HEADS)
    labels = [str(head) for head in dict.fromkeys(table["head"])]
    return _maps(table, "head", labels, "What one head's output takes over", "head")


def _shared(tables: Tables, name: str) -> Any:
    table = tables.get(name)
    if table is None or table.empty:
        raise InputError(f"there is no table {name!r}, so nothing to draw")
    if table["share"].isna().all():
        raise InputError("the models do not differ there, so there is no change to share out")
    return table


def _maps(table: Any, across: str, labels: list[str], title: str, axis: str) -> go.Figure:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    layers, places = sorted(set(table["layer"])), list(dict.fromkeys(table[across]))
    ways = [way for way in DIRECTIONS if (table["direction"] == way).any()]
    figure = make_subplots(
        rows=len(ways), cols=1, shared_xaxes=True, subplot_titles=ways, vertical_spacing=0.14
    )
    bound = max(float(np.nanquantile(table["share"].abs(), 0.995)), 0.05)
    for row, way in enumerate(ways, start=1):
        part: pd.DataFrame = table[table["direction"] == way]
        values = np.full((len(layers), len(places)), np.nan)
        said = np.full(values.shape, "", dtype=object)
        for layer, place, share, low, high, effect in zip(
            part["layer"], part[across], part["share"], part["low"], part["high"], part["effect"]
        ):
            at = layers.index(layer), places.index(place)
            values[at] = share
            spread = f"<br>95 % interval {low:.1%} to {high:.1%}" if np.isfinite(low) else ""
            said[at] = f"layer {layer}, {across} {figures.plain(place)}: {share:.1%}{spread}<br>{effect:+.4g}"
        trace = go.Heatmap(
            z=values.tolist(), x=labels, y=[str(layer) for layer in layers], customdata=said.tolist(),
            coloraxis="coloraxis", xgap=1, ygap=1, hoverongaps=False,
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(title_text="layer", type="category", showgrid=False, row=row, col=1)
    figure.update_xaxes(type="category", tickangle=-45, showgrid=False)
    figure.update_xaxes(title_text=axis, row=len(ways), col=1)
    figure.update_layout(
        coloraxis={
            "colorscale": [list(stop) for stop in figures.DIVERGING], "cmin": -bound, "cmax": bound,
            "colorbar": {
                "title": {"text": "share of the change", "side": "right"}, "tickformat": ".0%",
                "thickness": 12,
            },
        }
    )  # fmt: skip
    height = 190 + len(ways) * (40 + CELL * max(3, len(layers)))
    figures.style(figure, title, height=height, legend=False)
    return figure.update_layout(hovermode="closest", margin={"b": 130 if across == "position" else 60})


def _label(place: str, token: str) -> str:
    if place == BETWEEN:
        return "(between)"
    return f"{figures.plain(token, LONGEST)} · {place}"
