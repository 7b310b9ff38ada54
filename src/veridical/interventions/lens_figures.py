"""Figures of lenses and of direct logit attribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from veridical.errors import InputError, unknown

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.interventions.direct import DirectLogits
    from veridical.interventions.lens_reading import LensReading
    from veridical.interventions.tuned_result import TunedLens

VALUES = {"probability": "probability", "rank": "tokens above", "kl": "nats", "entropy": "nats"}
CELL = 9
"""Characters of a token that are written in a cell."""
BARS = 30


def lens_map(reading: LensReading, row: int, value: str) -> go.Figure:
    """Sites by tokens of one text, coloured by `value`, with the likeliest next token in each cell."""
    import plotly.graph_objects as go

    from veridical.reporting import figures

    if value not in VALUES:
        raise unknown("value", value, VALUES)
    columns = np.flatnonzero(reading.rows == row)
    if not len(columns):
        raise InputError(f"row {row} is not among the texts (0 to {int(reading.rows.max())})")
    grid = getattr(reading, value)[:, columns].astype(float)
    tops, likely = reading.top_tokens[:, columns, 0], reading.top_probabilities[:, columns, 0]
    details = [
        [
            f"{figures.plain(tops[at, k], 40)} {likely[at, k]:.3f}<br>target "
            f"{figures.plain(reading.target_tokens[column], 40)} {reading.probability[at, column]:.3f}, rank "
            f"{int(reading.rank[at, column])}<br>KL {reading.kl[at, column]:.3f}, entropy "
            f"{reading.entropy[at, column]:.3f} nats"
            for k, column in enumerate(columns)
        ]
        for at in range(len(reading.sites))
    ]
    words = [figures.plain(reading.tokens[column], CELL) for column in columns]
    figure = figures.figure()
    figure.add_trace(
        go.Heatmap(
            x=list(range(len(columns))),
            y=list(reading.sites),
            z=grid.tolist(),
            text=[[figures.plain(token, CELL) for token in line] for line in tops],
            texttemplate="%{text}",
            customdata=details,
            hovertemplate="%{y}, token %{x}<br>%{customdata}<extra></extra>",
            autocolorscale=False,
            colorscale=[list(stop) for stop in figures.SEQUENTIAL],
            reversescale=value == "rank",
            zmin=0.0,
            zmax=1.0 if value == "probability" else None,
            colorbar={"title": {"text": VALUES[value]}},
        )
    )
    figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=words, tickangle=-45)
    followed = {"probability": "of the target, by", "rank": "of the target, by"}.get(value, "by")
    return figures.style(
        figure,
        f"{reading.lens.capitalize()}: {value} {followed} site and token; written in: likeliest "
        f"{reading.facts.get('reads', 'next token')}",
        "token",
        "site",
        height=max(320, 140 + 26 * len(reading.sites)),
        legend=False,
    )


def tuned_lines(lens: TunedLens) -> go.Figure:
    """Held-out KL by site, of the tuned and of the plain lens."""
    from veridical.reporting import figures

    figure, sites = figures.figure(), list(lens.sites)
    figures.line_with_band(figure, sites, lens.plain_kl, name="logit lens", colour=figures.GREY, dash="dot")
    figures.line_with_band(figure, sites, lens.held_out_kl, name="tuned lens")
    return figures.style(figure, "KL from the model's output on held-out texts", "site", "nats", y_range=None)


def contributions(result: DirectLogits) -> go.Figure:
    """The largest contributions as bars, with their intervals."""
    import plotly.graph_objects as go

    from veridical.reporting import figures

    table = result.to_frame()
    order = np.argsort(-np.abs(result.values.mean(1)), kind="stable")[:BARS]
    shown = table.iloc[np.sort(order)]
    figure = figures.figure()
    spread = None
    if shown["low"].notna().all():
        spread = {
            "type": "data",
            "symmetric": False,
            "array": (shown["high"] - shown["mean"]).tolist(),
            "arrayminus": (shown["mean"] - shown["low"]).tolist(),
            "color": figures.GREY,
        }
    colours = [figures.BLUE if mean >= 0 else figures.ORANGE for mean in shown["mean"]]
    figure.add_trace(
        go.Bar(
            x=shown["component"].tolist(),
            y=shown["mean"].tolist(),
            error_y=spread,
            marker={"color": colours},
            hovertemplate="%{x}: %{y:.4f}<extra></extra>",
        )
    )
    what = f"the {len(shown)} largest of {len(table)} parts" if len(shown) < len(table) else "all parts"
    return figures.style(
        figure, f"Direct contributions to {result.facts['of']}: {what}", "part", "logits", legend=False
    )


def head_grid(result: DirectLogits) -> go.Figure:
    """Mean contribution of each head, layers by heads."""
    import plotly.graph_objects as go

    from veridical.reporting import figures

    table = result.to_frame()
    heads = table[table["kind"] == "head"]
    if heads.empty:
        raise InputError("this model's heads can't be told apart, so there is no grid of them")
    wide = heads.pivot(index="layer", columns="head", values="mean")
    limit = float(np.abs(wide.to_numpy()).max()) or 1.0
    figure = figures.figure()
    figure.add_trace(
        go.Heatmap(
            x=[int(head) for head in wide.columns],
            y=[int(layer) for layer in wide.index],
            z=wide.to_numpy().tolist(),
            zmin=-limit,
            zmax=limit,
            autocolorscale=False,
            colorscale=[list(stop) for stop in figures.DIVERGING],
            colorbar={"title": {"text": "logits"}},
            hovertemplate="layer %{y}, head %{x}: %{z:.4f}<extra></extra>",
        )
    )
    return figures.style(
        figure,
        f"Direct contribution of each head to {result.facts['of']}",
        "head",
        "layer",
        height=max(320, 120 + 26 * len(wide)),
        legend=False,
    )
