"""Figures of an attribution: tokens coloured by score, maps of layers, the largest edges."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.interventions.stacked import AXIS, PLAIN, beside, stacked, token_label
from veridical.reporting import figures
from veridical.sites import HEAD_KINDS, Site

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.interventions.attribution import Attribution

BARS, LINES = 20, 20
HIGH, LOW = (0, 114, 178), (213, 94, 0)
"""Blue for what raises the metric, orange for what lowers it (Okabe and Ito), as in the other figures."""


def draw(found: Attribution) -> go.Figure:
    """The figure of nodes or edges."""
    if found.edge_scores is not None:
        return edge_bars(found)
    flat = {name: values for name, values in found.scores.items() if values.ndim == 2}
    if len(flat) == len(found.scores) == 1:
        return token_strip(found)
    return node_maps(found)


def token_strip(found: Attribution) -> go.Figure:
    """One line per example, one cell per token, coloured by its score."""
    ((name, values),) = found.scores.items()
    shown = values[:LINES]
    labels = [[figures.plain(text, 12) for text in line] for line in found.labels[:LINES]]
    figure = figures.figure()
    heat(
        figure,
        shown,
        [str(place) for place in range(values.shape[1])],
        [f"example {at}" for at in range(len(shown))],
        found.unit or found.metric,
        text=labels,
    )
    more = f" (first {LINES} of {len(values)})" if len(values) > LINES else ""
    return figures.style(
        figure,
        f"{figures.plain(found.metric, 30)}: score of each token at {name}{more}",
        "position",
        "",
        height=max(200, 130 + 34 * len(shown)),
        legend=False,
    )


def node_maps(found: Attribution) -> go.Figure:
    """For each kind of site a map of layers: by position, or of heads and neurons summed over positions."""
    maps = _maps(found)
    figure = stacked(
        [len(rows) for _, _, _, rows, _ in maps],
        [f"{kind}, by {axis}" for kind, axis, *_ in maps],
        AXIS if maps[-1][1] == "position" else PLAIN,
    )
    for row, (_, axis, names, rows, values) in enumerate(maps, 1):
        heat(figure, values, names, rows, found.unit or found.metric, row=row, count=len(maps))
        slant: dict[str, Any] = {"tickangle": -45} if axis == "position" else {}
        figure.update_xaxes(title_text=axis, type="category", **slant, row=row, col=1)
    title = f"{figures.plain(found.metric, 30)}: mean scores over {len(found)} examples"
    return figures.style(figure, title, height=figure.layout.height, legend=False)


def edge_bars(found: Attribution) -> go.Figure:
    """The largest edges, with intervals where there are several examples."""
    import plotly.graph_objects as go

    top = found.top(BARS).iloc[::-1]
    names = top["edge"] + (" at " + top["position"].astype(str) if "position" in top else "")
    score = top["score"].to_numpy()
    errors: dict[str, Any] = {}
    if np.isfinite(top["low"]).all():
        errors["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": (top["high"] - score).clip(lower=0).tolist(),
            "arrayminus": (score - top["low"]).clip(lower=0).tolist(),
            "color": figures.GREY,
        }
    figure = figures.figure()
    figure.add_trace(
        go.Bar(
            x=score.tolist(),
            y=names.tolist(),
            orientation="h",
            marker_color=[figures.ORANGE if value > 0 else figures.BLUE for value in score],
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
            **errors,
        )
    )
    figure.update_layout(hovermode="closest")
    return figures.style(
        figure,
        f"{figures.plain(found.metric, 30)}: the {len(top)} largest edges",
        found.unit or "score",
        "",
        height=130 + 24 * len(top),
        legend=False,
    )


def edge_map(found: Attribution) -> go.Figure:
    """Senders by receivers, averaged over examples and summed over positions."""
    values = found.mean()["edges"]
    if values.ndim == 3:
        there = np.isfinite(values).any(0)
        values = np.where(there, np.nansum(values, axis=0), np.nan)
    figure = figures.figure()
    heat(figure, values, list(found.receivers), list(found.senders), found.unit or found.metric)
    return figures.style(
        figure,
        f"{figures.plain(found.metric, 30)}: every edge",
        "receiver",
        "sender",
        height=min(900, 200 + 6 * len(found.senders)),
        legend=False,
    )


def heat(
    figure: go.Figure,
    values: np.ndarray,
    columns: list[str],
    rows: list[str],
    unit: str,
    *,
    text: list[list[str]] | None = None,
    row: int = 1,
    count: int = 1,
) -> None:
    """Adds a map whose colours are centred on zero; what is absent stays empty."""
    import plotly.graph_objects as go

    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    trace = go.Heatmap(
        x=columns,
        y=rows,
        z=[[None if not np.isfinite(cell) else float(cell) for cell in line] for line in values],
        text=text,
        texttemplate="%{text}" if text is not None else None,
        hovertemplate=("%{text}<br>" if text is not None else "") + "%{y}, %{x}: %{z:.4g}<extra></extra>",
        autocolorscale=False,
        colorscale=[list(stop) for stop in figures.DIVERGING],
        zmin=-(largest or 1.0),
        zmax=largest or 1.0,
        hoverongaps=False,
        colorbar=beside(figure, row, unit),
    )
    if count > 1:
        figure.add_trace(trace, row=row, col=1)
    else:
        figure.add_trace(trace)
        figure.update_xaxes(type="category")
    figure.update_layout(hovermode="closest")


def coloured_texts(found: Attribution, examples: int) -> str:
    """Texts with each token coloured by its score; "" where a token has more than one."""
    if found.edge_scores is not None or len(found.scores) != 1:
        return ""
    ((_, values),) = found.scores.items()
    if values.ndim != 2:
        return ""
    lines = []
    for scores, labels in zip(values[:examples], found.labels):
        largest = float(np.nanmax(np.abs(scores))) if np.isfinite(scores).any() else 0.0
        spans = [_span(text, score, largest or 1.0) for text, score in zip(labels, scores) if text != ""]
        lines.append(f'<p style="line-height:2;white-space:pre-wrap;margin:.3em 0">{"".join(spans)}</p>')
    return "".join(lines)


def page(found: Attribution) -> str:
    """What a notebook shows."""
    said = "".join(f"<p>{html.escape(line)}</p>" for line in found.findings())
    table = found.top(10).round(4).to_html(escape=True, index=False, border=0)
    return f"<p><b>{html.escape(repr(found))}</b></p>{coloured_texts(found, 8)}{said}{table}"


def _span(text: str, score: float, largest: float) -> str:
    shown = html.escape(text.replace("\n", "⏎"))
    if not np.isfinite(score):
        return f'<span title="absent">{shown}</span>'
    red, green, blue = HIGH if score >= 0 else LOW
    opacity = 0.6 * abs(score) / largest
    style = f"background:rgba({red},{green},{blue},{opacity:.3f});padding:.15em .1em;border-radius:.2em"
    return f'<span style="{style}" title="{score:.4g}">{shown}</span>'


Map = tuple[str, str, list[str], list[str], np.ndarray]
"""Kind of site, name of the horizontal axis, its labels, labels of rows, values."""


def _maps(found: Attribution) -> list[Map]:
    by_kind: dict[tuple[str, int], list[str]] = {}
    for name, values in found.scores.items():
        site = Site.parse(name)
        by_kind.setdefault((name if site.is_raw else site.kind, values.ndim), []).append(name)
    means, tokens = found.mean(), found._common_tokens()
    positions = [token_label(str(at), text) for at, text in enumerate(tokens)]
    maps = []
    for (kind, dimensions), names in by_kind.items():
        rows = [
            name if Site.parse(name).layer is None else f"layer {Site.parse(name).layer}" for name in names
        ]
        stacked = np.stack([means[name] for name in names])
        if dimensions == 2:
            maps.append((kind, "position", positions, rows, stacked))
            continue
        total = np.nansum(stacked, axis=1)
        unit = "head" if kind in (*HEAD_KINDS, "pattern") else "neuron"
        maps.append((kind, unit, [str(at) for at in range(total.shape[1])], rows, total))
    return maps
