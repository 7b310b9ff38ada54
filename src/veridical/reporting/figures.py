"""One look for every figure, and the two or three shapes that results draw.

Colours are those of Okabe and Ito (2008), which stay apart for people who are colour-blind. Figures are
plotly, are returned and never shown, carry no fixed width, and keep their legend under the plot so that it
also fits a phone. Text that comes from a model or a data set goes through `plain`, because plotly reads some
HTML in labels.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#B0578D"
SKY, AMBER, BLACK, GREY = "#56B4E9", "#E69F00", "#1B1F24", "#6B7280"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, BLACK)
"""Categorical colours in the order in which they are handed out."""
DIVERGING = ((0.0, "#B2442A"), (0.25, "#E8A58C"), (0.5, "#F7F7F5"), (0.75, "#8DBBDB"), (1.0, "#0B5C94"))
"""Low, middle, high: readable for the colour-blind and in grey print as distance from the middle."""
SEQUENTIAL = ((0.0, "#F7FAFC"), (0.35, "#9CC7E3"), (0.7, "#2F7FB6"), (1.0, "#0A3A66"))
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Numbers = Sequence[float] | Any


def plain(text: object, limit: int | None = None) -> str:
    """`text` for a plotly label, so that it is drawn as it is: markup in it stays text.

    Args:
        text: What to draw; line breaks become visible as ⏎, so that one label stays one line.
        limit: Cut to this many characters, with an ellipsis.
    """
    shown = str(text).replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")
    if limit is not None and len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    # A hover template would read %{...} as a field.
    return html.escape(shown, quote=False).replace("%{", "%\u200b{")


def figure() -> go.Figure:
    """An empty figure in the house style."""
    import plotly.graph_objects as go

    return style(go.Figure())


def style(
    figure: go.Figure,
    title: str = "",
    x: str = "",
    y: str = "",
    *,
    y_range: tuple[float, float] | None = None,
    height: int = 400,
    legend: bool = True,
) -> go.Figure:
    """Sets the house style, title and axis titles on `figure` and returns it.

    Args:
        figure: Changed in place.
        title: One sentence that says what is seen; a report shows it as a heading above the figure.
        x: Title of the horizontal axis, with its unit.
        y: Title of the vertical axis, with its unit.
        y_range: Fixed ends of the vertical axis; free when not given.
        height: Pixels; the width follows the page.
        legend: Whether a legend is shown under the plot.
    """
    figure.update_layout(
        template=_template(),
        height=height,
        showlegend=legend,
        title={"text": title} if title else None,
    )
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    if y_range is not None:
        figure.update_yaxes(range=list(y_range))
    return figure


def line_with_band(
    figure: go.Figure,
    x: Sequence[Any],
    y: Numbers,
    low: Numbers | None = None,
    high: Numbers | None = None,
    *,
    name: str,
    colour: str = BLUE,
    dash: str | None = None,
    markers: bool = True,
    band: str = "95 % interval",
    hover: Sequence[str] | None = None,
) -> go.Figure:
    """Adds a line, with the band from `low` to `high` behind it when both are given.

    Args:
        figure: Changed in place and returned.
        x: Positions or category names, in order; `[n]`.
        y: Values, `[n]`.
        low: Lower end of the band, `[n]`.
        high: Upper end of the band, `[n]`.
        name: What the line is, for the legend; the band is shown and hidden with it.
        colour: Six-digit hex colour.
        dash: Plotly's dash style, such as "dot" or "dash".
        markers: Whether points are marked.
        band: What the band is, for the hover text.
        hover: One further line per point, already made inert with `plain`.
    """
    import plotly.graph_objects as go

    x, label = list(x), plain(name)
    said = f"{label} %{{y:.3f}}"
    details: list[list[Any]] | None = None
    if low is not None and high is not None:
        low, high = list(low), list(high)
        details = [[a, b] for a, b in zip(low, high)]
        said += f"<br>{plain(band)} %{{customdata[0]:.3f}} to %{{customdata[1]:.3f}}"
        edge = {"x": x, "mode": "lines", "line": {"width": 0}, "legendgroup": label, "showlegend": False}
        figure.add_trace(go.Scatter(y=high, hoverinfo="skip", name=label, **edge))
        figure.add_trace(
            go.Scatter(
                y=low, hoverinfo="skip", name=label, fill="tonexty", fillcolor=tint(colour, 0.18), **edge
            )
        )
    if hover is not None:
        details = [[*(details[i] if details else ()), line] for i, line in enumerate(hover)]
        said += f"<br>%{{customdata[{len(details[0]) - 1 if details else 0}]}}"
    figure.add_trace(
        go.Scatter(
            x=x,
            y=list(y),
            name=label,
            legendgroup=label,
            mode="lines+markers" if markers else "lines",
            line={"color": colour, "width": 2.5, "dash": dash},
            marker={"size": 7},
            customdata=details,
            hovertemplate=said + "<extra></extra>",
        )
    )
    return figure


def reference_line(
    figure: go.Figure, y: float, name: str, *, colour: str = GREY, dash: str = "dot"
) -> go.Figure:
    """Adds a horizontal line at `y` over the whole width, written on the line itself (chance, a baseline)."""
    figure.add_hline(y=y, line={"color": colour, "width": 1.5, "dash": dash})
    figure.add_annotation(
        text=plain(name),
        xref="paper",
        x=1,
        y=y,
        xanchor="right",
        yanchor="bottom",
        showarrow=False,
        font={"size": 12, "color": colour},
    )
    return figure


def tint(colour: str, opacity: float) -> str:
    """The hex `colour` as an rgba() string of this opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _template() -> go.layout.Template:
    import plotly.graph_objects as go

    axis = {
        "gridcolor": "#E7EAEE",
        "linecolor": "#9AA3AE",
        "zerolinecolor": "#C7CDD4",
        "ticks": "outside",
        "tickcolor": "#C7CDD4",
        "ticklen": 4,
        "automargin": True,
        "title": {"standoff": 10, "font": {"size": 14}},
    }
    return go.layout.Template(
        data={"heatmap": [{"autocolorscale": True}]},
        layout={
            "colorway": list(COLOURS),
            "colorscale": {
                "sequential": [list(stop) for stop in SEQUENTIAL],
                "diverging": [list(stop) for stop in DIVERGING],
            },
            "font": {"family": FONT, "size": 13, "color": BLACK},
            "title": {"font": {"size": 16}, "x": 0, "xref": "paper", "xanchor": "left"},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "margin": {"l": 56, "r": 16, "t": 40, "b": 48},
            "xaxis": {**axis, "showgrid": False, "showline": True},
            "yaxis": axis,
            "hovermode": "x unified",
            "hoverlabel": {"bgcolor": "white", "bordercolor": "#C7CDD4", "align": "left"},
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "xref": "paper",
                "y": 0,
                "yanchor": "bottom",
                "yref": "container",
                "itemsizing": "constant",
                "title": {"text": ""},
            },
        },
    )
