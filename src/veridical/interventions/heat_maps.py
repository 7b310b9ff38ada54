"""Heat maps of a sweep, one for each kind of site: layer by position with its tokens, or layer by head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.errors import unknown
from veridical.interventions.stacked import stacked, token_label
from veridical.reporting import figures

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.interventions.patched import Patched


def heat_maps(result: Patched, what: str = "effect") -> go.Figure:
    """One map for each kind of site, with one colour scale around 0; see `Patched.figure`."""
    if what not in ("effect", "recovered"):
        raise unknown("quantity", what, ("effect", "recovered"))
    frame = result.to_frame()
    parts = [(kind, part) for kind, part in frame.groupby("kind", sort=False)]
    maps = [_Map(part, str(kind), what) for kind, part in parts]
    titles = [each.title for each in maps] if len(maps) > 1 else None
    figure = stacked([len(each.rows) for each in maps], titles)
    values = np.abs(frame[what].to_numpy(dtype=float))
    bound = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    unit = "" if what == "recovered" else str(result.facts["unit"])
    for number, each in enumerate(maps, start=1):
        figure.add_trace(each.trace(unit), row=number, col=1)
        figure.update_xaxes(title_text=each.x, row=number, col=1, tickangle=-45, showgrid=False)
        figure.update_yaxes(title_text=each.y, row=number, col=1, showgrid=False, type="category")
    figure.update_xaxes(type="category")
    title = f"What patching does to {figures.plain(result.facts['metric'], 40)} ({result.facts['direction']})"
    name = "fraction recovered" if what == "recovered" else f"effect{f' ({unit})' if unit else ''}"
    figure.update_layout(
        coloraxis={
            "colorscale": [list(stop) for stop in figures.DIVERGING],
            "cmin": -bound if bound else -1.0,
            "cmax": bound or 1.0,
            "colorbar": {"title": {"text": figures.plain(name), "side": "right"}, "thickness": 12},
        }
    )
    figures.style(figure, title, height=figure.layout.height, legend=False)
    return figure.update_layout(hovermode="closest")


class _Map:
    """The lines of one kind, laid out by layer (and head) and position, or by layer and head."""

    def __init__(self, part: pd.DataFrame, kind: str, what: str) -> None:
        lines = part.to_dict("records")
        heads = {line["head"] for line in lines}
        grid = len(heads) > 1 and len({line["position"] for line in lines}) == 1
        self.title = kind
        self.x = "head" if grid else "position"
        self.y = "layer, head" if len(heads) > 1 and not grid else "layer"
        across = [line["head"] if grid else line["position"] for line in lines]
        down = [(line["layer"], -1 if grid else line["head"]) for line in lines]
        labels = {
            name: str(name) if grid else token_label(name, line["token"]) for name, line in zip(across, lines)
        }
        self.columns, self.rows = list(dict.fromkeys(across)), list(dict.fromkeys(down))
        self.x_labels = [labels[name] for name in self.columns]
        self.y_labels = [_row_label(layer, head, kind) for layer, head in self.rows]
        at = [self.rows.index(row) for row in down], [self.columns.index(name) for name in across]
        self.values = np.full((len(self.rows), len(self.columns)), np.nan)
        self.values[at] = part[what].to_numpy()
        self.said = np.full(self.values.shape, "", dtype=object)
        self.said[at] = [_hover(line, what) for line in lines]

    def trace(self, unit: str) -> Any:
        """The heat map; cells without a value stay empty."""
        import plotly.graph_objects as go

        return go.Heatmap(
            z=self.values.tolist(),
            x=self.x_labels,
            y=self.y_labels,
            customdata=self.said.tolist(),
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate="%{customdata}<extra></extra>",
        )


def _row_label(layer: int, head: int, kind: str) -> str:
    name = kind if layer < 0 else str(layer)
    return name if head < 0 else f"{name}.{head}"


def _hover(line: dict[Any, Any], what: str) -> str:
    name = figures.plain(line["site"]) if line["layer"] < 0 else f"{line['kind']}.{line['layer']}"
    head = "" if line["head"] < 0 else f", head {line['head']}"
    token = f" {figures.plain(repr(line['token']), 40)}" if line["token"] else ""
    spread = ""
    if np.isfinite(line[f"{what}_low"]):
        spread = f"<br>95 % interval {line[f'{what}_low']:.3g} to {line[f'{what}_high']:.3g}"
    return (
        f"{name}{head}, position {figures.plain(line['position'])}{token}<br>effect {line['effect']:+.4g}, "
        f"recovered {line['recovered']:.1%}{spread}<br>{line['examples']} examples"
    )
