"""Figures of what the two models do, and of what probes and SAEs read in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.errors import InputError
from veridical.reporting import figures

if TYPE_CHECKING:
    import plotly.graph_objects as go

Tables = Mapping[str, Any]


def draw_behaviour(tables: Tables) -> go.Figure:
    """Each measure of behaviour in both models; whiskers are those of the change, at the policy."""
    import plotly.graph_objects as go

    table = _there(tables, "behaviour")
    names = [
        figures.plain(str(m) if rows == "all" else f"{m}, {rows}", 40)
        for m, rows in zip(table["measure"], table["rows"])
    ]
    figure = figures.figure()
    for side, colour in (("reference", figures.GREY), ("policy", figures.BLUE)):
        whiskers: dict[str, Any] = {}
        if side == "policy":
            whiskers["error_y"] = {
                "type": "data", "symmetric": False,
                "array": (table["high"] - table["change"]).fillna(0).tolist(),
                "arrayminus": (table["change"] - table["low"]).fillna(0).tolist(),
            }  # fmt: skip
        figure.add_trace(
            go.Bar(
                x=names, y=table[side].tolist(), name=side, marker={"color": colour},
                hovertemplate="%{x}: %{y:.1%}<extra>" + side + "</extra>", **whiskers,
            )
        )  # fmt: skip
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%")
    return figures.style(figure, "What the two do on the same prompts", "", "share of the prompts")


def draw_probes(tables: Tables) -> go.Figure:
    """AUROC of each reading of each probe."""
    import plotly.graph_objects as go

    table, figure = _there(tables, "probes"), figures.figure()
    for name, colour in zip(dict.fromkeys(table["probe"]), figures.COLOURS):
        part = table[table["probe"] == name]
        middle = part["auroc"].to_numpy(dtype=float)
        figure.add_trace(
            go.Scatter(
                x=middle.tolist(),
                y=[figures.plain(reading, 60) for reading in part["reading"]],
                mode="markers",
                name=figures.plain(name, 40),
                marker={"size": 9, "color": colour},
                error_x={
                    "type": "data", "symmetric": False,
                    "array": (part["high"].to_numpy(dtype=float) - middle).tolist(),
                    "arrayminus": (middle - part["low"].to_numpy(dtype=float)).tolist(),
                },
                hovertemplate="%{y}: %{x:.3f}<extra></extra>",
            )
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.add_vline(x=0.5, line={"color": figures.GREY, "dash": "dot"})
    return figures.style(
        figure, "Probes of the reference, read on both models", "AUROC on held-out pairs", "",
        height=160 + 32 * table["reading"].nunique(),
    )  # fmt: skip


def draw_features(tables: Tables) -> go.Figure:
    """Firing rates of the latents that changed most, reference against policy."""
    import plotly.graph_objects as go

    table, figure = _there(tables, "SAE latents"), figures.figure()
    least = 0.5 * float(np.min(table[["policy", "reference"]].to_numpy()[table[["policy", "reference"]] > 0]))
    for named, colour, label in ((False, figures.GREY, "not named"), (True, figures.ORANGE, "named")):
        part = table[table["named"] == named]
        if part.empty:
            continue
        figure.add_trace(
            go.Scatter(
                x=part["reference"].clip(lower=least).tolist(),
                y=part["policy"].clip(lower=least).tolist(),
                mode="markers",
                name=label,
                marker={"size": 7, "color": colour, "opacity": 0.7},
                customdata=[f"{s}, latent {n}" for s, n in zip(part["sae"], part["latent"])],
                hovertemplate="%{customdata}: %{x:.3%} and %{y:.3%}<extra></extra>",
            )
        )
    ends = [least, 1.0]
    figure.add_trace(
        go.Scatter(
            x=ends, y=ends, mode="lines", line={"color": figures.GREY, "dash": "dot"}, showlegend=False
        )
    )
    figure.update_xaxes(type="log", tickformat=".2%")
    figure.update_yaxes(type="log", tickformat=".2%")
    return figures.style(
        figure, "How often features fire (the leftmost and lowest never do)", "in the reference",
        "in the policy", height=460,
    )  # fmt: skip


MAKERS: dict[str, tuple[str, Callable[[Tables], go.Figure]]] = {
    "behaviour": ("behaviour", draw_behaviour),
    "probes": ("probes", draw_probes),
    "features": ("SAE latents", draw_features),
}
"""By name, the table that a figure needs and what draws it."""


def _there(tables: Tables, name: str) -> Any:
    table = tables.get(name)
    if table is None or table.empty:
        raise InputError(f"this comparison has no table {name!r} to draw")
    return table
