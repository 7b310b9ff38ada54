"""Figures of several policies: inside against outside for each pair, and maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veridical.comparison.policies import MAPS
from veridical.errors import InputError
from veridical.reporting import figures

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.comparison.policies import Policies


def drawable(result: Policies) -> list[str]:
    """The figures that there is something for."""
    return [*(["alike"] if len(result.alike()) else []), *(["map"] if maps(result) else [])]


def draw_alike(result: Policies) -> go.Figure:
    """Each pair of policies: how alike outside (across), and inside (up), with the null of swapped texts."""
    import plotly.graph_objects as go

    table = result.alike()
    if table.empty:
        raise InputError(
            "no two policies here changed their streams, so there is nothing to hold side by side"
        )
    figure = figures.figure()
    for (same, trained), colour, symbol in zip(
        ((True, True), (True, False), (False, True), (False, False)),
        (figures.BLUE, figures.SKY, figures.ORANGE, figures.AMBER),
        ("circle", "circle-open", "diamond", "diamond-open"),
    ):
        part = table[(table["same_reference"] == same) & (table["same_training"] == trained)]
        if part.empty:
            continue
        name = f"{'one reference' if same else 'two references'}{', trained on the same' if trained else ''}"
        figure.add_trace(
            go.Scatter(
                x=part["outside"].tolist(), y=part["inside"].tolist(), mode="markers+text", name=name,
                text=[figures.plain(f"{a} · {b}", 40) for a, b in zip(part["a"], part["b"])],
                textposition="top center",
                marker={"color": colour, "size": 11, "symbol": symbol, "line": {"width": 2}},
                error_x=_spread(part, "outside"), error_y=_spread(part, "inside"),
                hovertemplate="%{text}<br>outside %{x:.3f}, inside %{y:.3f}<extra></extra>",
            )
        )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=table["outside"].tolist(), y=table["inside_null"].tolist(), mode="markers",
            name="inside, swapped texts (95 % lie below)",
            marker={"color": figures.GREY, "symbol": "line-ew-open", "size": 16, "line": {"width": 2}},
            hovertemplate="swapped texts %{y:.3f}<extra></extra>",
        )
    )  # fmt: skip
    outside = table["outside_is"].iloc[0]
    return figures.style(
        figure, "Alike inside, or only outside?", f"outside: {outside}",
        "inside: CKA of what training changed", height=460,
    )  # fmt: skip


def _spread(part: Any, name: str) -> dict[str, Any]:
    return {
        "type": "data", "symmetric": False, "color": figures.GREY, "thickness": 1,
        "array": (part[f"{name}_high"] - part[name]).fillna(0).tolist(),
        "arrayminus": (part[name] - part[f"{name}_low"]).fillna(0).tolist(),
    }  # fmt: skip


def maps(result: Policies) -> dict[str, tuple[Any, float]]:
    """Every map that there is: places and stress, by name."""
    found = {}
    for by in MAPS:
        try:
            found[by] = result.map(by)
        except InputError:
            continue
    return found


def draw_maps(result: Policies) -> go.Figure:
    """All maps side by side, each with its stress; the same model has the same colour in each."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    found = maps(result)
    if not found:
        raise InputError("a map needs three models or more")
    titles = [f"by {by}, stress {stress:.2f}" for by, (_, stress) in found.items()]
    figure = make_subplots(rows=1, cols=len(found), subplot_titles=titles, horizontal_spacing=0.06)
    models = result.models["model"].tolist()
    colours = {name: figures.COLOURS[at % len(figures.COLOURS)] for at, name in enumerate(models)}
    references = set(result.models.loc[result.models["reference"] == "", "model"])
    for column, (places, _) in enumerate(found.values(), start=1):
        for model, x, y in zip(places["model"], places["x"], places["y"]):
            figure.add_trace(
                go.Scatter(
                    x=[x], y=[y], mode="markers", name=figures.plain(model, 30), legendgroup=model,
                    showlegend=column == 1,
                    marker={
                        "color": colours[model], "size": 13,
                        "symbol": "square" if model in references else "circle",
                    },
                    hovertemplate=f"{figures.plain(model)}<extra></extra>",
                ),
                row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(showticklabels=False, row=1, col=column)
        figure.update_yaxes(showticklabels=False, row=1, col=column)
        axis = "x" if column == 1 else f"x{column}"
        figure.update_yaxes(scaleanchor=axis, row=1, col=column)
    return figures.style(figure, "Maps of the models (squares are references)", height=420)
