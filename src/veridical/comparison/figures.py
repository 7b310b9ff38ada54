"""Figures of a comparison: KL by position, the sites side by side, weights, shifted tokens, texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.comparison.reading_figures import MAKERS
from veridical.comparison.where_figures import draw_heads, draw_parts, draw_positions, locatable
from veridical.errors import InputError, unknown
from veridical.reporting import figures

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.comparison.comparison import Comparison

KINDS = (
    "behaviour", "probes", "features", "position", "answer", "sites", "where", "where parts", "where heads",
    "weights", "shift", "texts",
)  # fmt: skip
CELL = 10
"""Characters of a token that are written in a cell."""


def draw(result: Comparison, what: str) -> go.Figure:
    """One of `KINDS`; see `Comparison.figure`."""
    makers = {
        "position": lambda: _positions(result, "text"),
        "answer": lambda: _positions(result, "answer"),
        "sites": lambda: _sites(result),
        "where": lambda: draw_positions(result.tables),
        "where parts": lambda: draw_parts(result.tables),
        "where heads": lambda: draw_heads(result.tables),
        "weights": lambda: _weights(result),
        "shift": lambda: _shift(result),
        "texts": lambda: _texts(result),
        **{name: lambda make=make: make(result.tables) for name, (_, make) in MAKERS.items()},
    }
    if what not in makers:
        raise unknown("figure", what, KINDS)
    return makers[what]()


def drawable(result: Comparison) -> list[str]:
    """The figures that this comparison has something for."""
    tables = result.tables
    positions = [table for name, table in tables.items() if name.startswith("outputs by position")]
    has = {
        **{name: table in tables and not tables[table].empty for name, (table, _) in MAKERS.items()},
        "answer": any((table["axis"] == "answer").any() for table in positions),
        "position": bool(positions),
        "sites": any(name in tables for name in ("drift", "cka", "logit-lens divergence")),
        **locatable(tables),
        "weights": "weights" in tables and bool((tables["weights"]["norm"] > 0).any()),
        "shift": any(not table.empty for name, table in tables.items() if name.startswith("shifted")),
        "texts": any(not table.empty for name, table in tables.items() if name.startswith("texts")),
    }
    return [name for name, there in has.items() if there]


def _positions(result: Comparison, axis: str) -> go.Figure:
    figure = figures.figure()
    colours = dict(zip(("fixed text", "policy samples"), (figures.BLUE, figures.ORANGE)))
    for source, colour in colours.items():
        table = result.tables.get(f"outputs by position on {source}")
        if table is None:
            continue
        part = table[(table["axis"] == axis) & (table["measure"] == "kl")]
        if part.empty:
            continue
        figures.line_with_band(
            figure, part["position"].tolist(), part["value"], part["low"], part["high"],
            name=source, colour=colour, markers=False,
        )  # fmt: skip
    if not figure.data:
        raise InputError("there are no answers, so there is no KL around their beginning")
    if axis == "answer":
        figure.add_vline(x=0, line={"color": figures.GREY, "dash": "dot"})
        where = "position of the predicted token, from the answer's first"
    else:
        where = "position in the text (the last one counts all behind it too)"
    return figures.style(figure, "KL(policy || reference) by position", where, "nats")


def _sites(result: Comparison) -> go.Figure:
    from plotly.subplots import make_subplots

    lines: list[tuple[str, Any, str]] = []
    drift = result.tables.get("drift")
    if drift is not None:
        for measure, title in (
            ("relative norm", "change over the reference's norm"),
            ("turn", "1 - cosine"),
        ):
            lines.append((title, drift.loc[drift["measure"] == measure], "value"))
    for name, title, column in (
        ("cka", "CKA", "cka"),
        ("procrustes", "Procrustes distance", "distance"),
        ("logit-lens divergence", "logit-lens KL (nats)", "kl"),
        ("directions", "cosine of the label's directions", "cosine"),
    ):
        if name in result.tables and not result.tables[name].empty:
            lines.append((title, result.tables[name], column))
    if not lines:
        raise InputError("no measure by site applies to these two models")
    figure = make_subplots(
        rows=len(lines), cols=1, shared_xaxes=True, subplot_titles=[title for title, *_ in lines],
        vertical_spacing=min(0.08, 0.4 / len(lines)),
    )  # fmt: skip
    for row, (title, table, column) in enumerate(lines, start=1):
        part = figures.figure()
        low, high = (table.get(name) for name in ("low", "high"))
        figures.line_with_band(part, table["site"].tolist(), table[column], low, high, name=title)
        for trace in part.data:
            figure.add_trace(trace, row=row, col=1)
    return figures.style(figure, "What changed along the depth", height=110 + 170 * len(lines), legend=False)


def _weights(result: Comparison) -> go.Figure:
    import plotly.graph_objects as go

    table = result.table("weights")
    wide = table[table["layer"] >= 0].pivot_table(index="layer", columns="part", values="relative")
    figure = figures.figure()
    figure.add_trace(
        go.Heatmap(
            x=[figures.plain(part, 24) for part in wide.columns],
            y=[int(layer) for layer in wide.index],
            z=wide.to_numpy().tolist(),
            zmin=0.0,
            autocolorscale=False,
            colorscale=[list(stop) for stop in figures.SEQUENTIAL],
            colorbar={"title": {"text": "relative"}},
            hovertemplate="layer %{y}, %{x}: %{z:.4g}<extra></extra>",
        )
    )
    return figures.style(
        figure, "Relative change of the weights", "weight", "layer",
        height=max(320, 120 + 26 * len(wide)), legend=False,
    )  # fmt: skip


def _shift(result: Comparison) -> go.Figure:
    import plotly.graph_objects as go

    name = next(
        (f"shifted tokens on {s}" for s in ("policy samples", "fixed text")
         if not result.tables.get(f"shifted tokens on {s}", pd.DataFrame()).empty), None,
    )  # fmt: skip
    if name is None:
        raise InputError("no token's probability changed")
    table, figure = result.tables[name], figures.figure()
    figure.add_trace(
        go.Bar(
            x=[figures.plain(repr(token), 24) for token in table["token"]],
            y=table["shift"].tolist(),
            error_y={
                "type": "data", "array": (table["high"] - table["shift"]).fillna(0).tolist(),
                "color": figures.GREY,
            },
            marker={"color": [figures.BLUE if v >= 0 else figures.ORANGE for v in table["shift"]]},
            hovertemplate="%{x}: %{y:+.4f}<extra></extra>",
        )
    )  # fmt: skip
    source = name.removeprefix("shifted tokens on ")
    return figures.style(
        figure, f"Tokens whose mean probability changed most, on {source}", "token", "change", legend=False
    )


def _texts(result: Comparison) -> go.Figure:
    import plotly.graph_objects as go

    name = next(
        (f"texts on {s}" for s in ("policy samples", "fixed text")
         if not result.tables.get(f"texts on {s}", pd.DataFrame()).empty), None,
    )  # fmt: skip
    if name is None:
        raise InputError("no text was kept")
    table: Any = result.tables[name]
    rows = list(dict.fromkeys(table["row"]))
    longest = int(table["position"].max()) + 1
    grid = np.full((len(rows), longest), np.nan)
    words = np.full((len(rows), longest), "", dtype=object)
    for row, position, token, kl in zip(table["row"], table["position"], table["token"], table["kl"]):
        grid[rows.index(row), position] = kl
        words[rows.index(row), position] = figures.plain(token, CELL)
    figure = figures.figure()
    figure.add_trace(
        go.Heatmap(
            z=grid.tolist(),
            y=[f"row {row}" for row in rows],
            customdata=words.tolist(),
            autocolorscale=False,
            colorscale=[list(stop) for stop in figures.SEQUENTIAL],
            zmin=0.0,
            colorbar={"title": {"text": "nats"}},
            hovertemplate="%{y}, token %{x} %{customdata}: %{z:.4f} nats<extra></extra>",
        )
    )
    source = name.removeprefix("texts on ")
    return figures.style(
        figure, f"The texts that differ most, KL token by token ({source})", "token", "",
        height=160 + 34 * len(rows), legend=False,
    )  # fmt: skip
