"""The figure of a sweep: AUROC by site, with everything that it has to be compared with."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from veridical.reporting import figures

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from veridical.probes.calibration import Calibration
    from veridical.probes.honesty_report import HonestyReport
    from veridical.probes.learning import LearningCurve
    from veridical.probes.result import ProbeSweep, SiteResult
    from veridical.probes.transfer import TransferMatrix

_BLOCK = re.compile(r"blocks\.(\d+)\.(?:attn\.|mlp\.)?hook_(\w+)$")
_SHORT = re.compile(r"(\w+)\.(\d+)$")


def auroc_by_site(sweep: ProbeSweep) -> go.Figure:
    """One line per kind of site over the layers, or one over the sites where they are not layers."""
    series = _series(sweep)
    figure = figures.figure()
    for number, (kind, points) in enumerate(series.items()):
        colour = figures.COLOURS[number % len(figures.COLOURS)]
        estimates = [result.metrics["auroc"] for _, result in points]
        figures.line_with_band(
            figure,
            [x for x, _ in points],
            [e.value for e in estimates],
            [e.low for e in estimates],
            [e.high for e in estimates],
            name=kind or "probe",
            colour=colour,
            hover=[figures.plain(_said(result)) for _, result in points],
        )
    if len(sweep.selected_control):
        _control(figure, series)
    if all(len(result.random) for result in sweep.results):
        _random(figure, series)
    _mark_best(figure, sweep, series)
    figures.reference_line(figure, 0.5, "chance")
    if sweep.text is not None:
        figures.reference_line(
            figure, sweep.text["auroc"].value, "text alone", colour=figures.ORANGE, dash="dash"
        )
    values = [result.metrics["auroc"].low for result in sweep.results] + [0.5]
    lowest = float(np.nanmin(values + [float(r.control.min()) for r in sweep.results if len(r.control)]))
    layers = all(isinstance(x, int) for points in series.values() for x, _ in points)
    return figures.style(
        figure,
        f"AUROC on held-out pairs for {figures.plain(sweep._name, 80)}",
        "layer" if layers else "site",
        "AUROC",
        y_range=(max(0.0, min(0.4, lowest - 0.05)), 1.02),
    )


def _series(sweep: ProbeSweep) -> dict[str, list[tuple[int | str, SiteResult]]]:
    """Results by kind of site, each at its layer; all by name under "" where one is not of a layer."""
    series: dict[str, list[tuple[int | str, SiteResult]]] = {}
    for result in sweep.results:
        found = _place(result.site)
        if found is None:
            return {"": [(figures.plain(result.site, 32), result) for result in sweep.results]}
        series.setdefault(found[0], []).append((found[1], result))
    return {kind: sorted(points, key=lambda point: point[0]) for kind, points in series.items()}


def _place(site: str) -> tuple[str, int] | None:
    if match := _BLOCK.match(site):
        return match[2], int(match[1])
    if match := _SHORT.match(site):
        return match[1], int(match[2])
    return None


def _control(figure: go.Figure, series: dict[str, list[tuple[int | str, SiteResult]]]) -> None:
    for kind, points in series.items():
        draws = [result.control for _, result in points]
        figures.line_with_band(
            figure,
            [x for x, _ in points],
            [float(d.mean()) for d in draws],
            [float(np.quantile(d, 0.05)) for d in draws],
            [float(np.quantile(d, 0.95)) for d in draws],
            name="shuffled labels" if len(series) == 1 else f"shuffled labels, {kind}",
            colour=figures.GREY,
            dash="dot",
            markers=False,
            band="90 % of shuffles",
        )


def _random(figure: go.Figure, series: dict[str, list[tuple[int | str, SiteResult]]]) -> None:
    for kind, points in series.items():
        figures.line_with_band(
            figure,
            [x for x, _ in points],
            [float(np.quantile(result.random, 0.95)) for _, result in points],
            name="random directions, 95 % below" + ("" if len(series) == 1 else f", {kind}"),
            colour=figures.AMBER,
            dash="dot",
            markers=False,
        )


def _said(result: SiteResult) -> str:
    strength = getattr(result.probe, "C", None)
    return result.site if strength is None else f"{result.site}, C = {strength:g}"


def _mark_best(
    figure: go.Figure, sweep: ProbeSweep, series: dict[str, list[tuple[int | str, SiteResult]]]
) -> None:
    import plotly.graph_objects as go

    for points in series.values():
        for x, result in points:
            if result.site == sweep.best_site:
                ring = {"size": 15, "symbol": "circle-open", "color": figures.BLACK, "line": {"width": 2}}
                figure.add_trace(
                    go.Scatter(
                        x=[x],
                        y=[result.metrics["auroc"].value],
                        mode="markers",
                        marker=ring,
                        name="chosen on folds",
                        hoverinfo="skip",
                    )
                )


def reliability(calibration: Calibration) -> go.Figure:
    """Share of positives by mean probability of each bin, one line per method, against the diagonal."""
    import plotly.graph_objects as go

    figure = figures.figure()
    figure.add_trace(
        go.Scatter(
            x=[0, 1],
            y=[0, 1],
            mode="lines",
            line={"color": figures.GREY, "width": 1.5, "dash": "dot"},
            name="perfect",
            hoverinfo="skip",
        )
    )
    for colour, (method, bins) in zip(figures.COLOURS, calibration.bins.groupby("method", sort=False)):
        figures.line_with_band(
            figure,
            bins["probability"].tolist(),
            bins["share"],
            bins["low"],
            bins["high"],
            name=str(method),
            colour=colour,
            hover=[f"{rows} rows" for rows in bins["rows"]],
        )
    figure.update_xaxes(range=[0, 1])
    return figures.style(
        figure,
        f"Reliability on held-out pairs of the probe for {figures.plain(calibration.name, 80)}",
        "probability that the probe gives",
        "share of positives",
        y_range=(-0.02, 1.02),
    )


def honesty_by_site(report: HonestyReport) -> go.Figure:
    """AUROC by site: the lying and the instruction probes, each scored on the lie and the instruction."""
    figure = figures.figure()
    table = report.to_frame()
    table = table[(table["rows"] == "all rows") & (table["site"] != "text")]
    estimator = report.chosen["lying"][0][0]
    table = table[table["estimator"] == estimator]
    shown = (
        ("lying", "auroc_lied", "lying probe on lies", figures.ORANGE, None),
        ("lying, all rows", "auroc_lied", "lying probe (all rows) on lies", figures.AMBER, None),
        ("lying", "auroc_told_of_truthful", "lying probe on the instruction", figures.ORANGE, "dot"),
        ("instruction", "auroc_told", "instruction probe on the instruction", figures.BLUE, None),
        ("instruction", "auroc_lied", "instruction probe on lies", figures.BLUE, "dot"),
    )
    places = {site: _place(site) or ("", 0) for site in table["site"]}
    layers = len({kind for kind, _ in places.values()}) == 1 and "" not in dict(places.values())
    for probe, column, name, colour, dash in shown:
        lines = table[table["probe"] == probe]
        figures.line_with_band(
            figure,
            [places[site][1] if layers else figures.plain(site, 32) for site in lines["site"]],
            lines[column],
            lines[f"{column}_low"],
            lines[f"{column}_high"],
            name=name,
            colour=colour,
            dash=dash,
            hover=[figures.plain(site) for site in lines["site"]],
        )
    figures.reference_line(figure, 0.5, "chance")
    return figures.style(
        figure,
        f"Lie or instruction: AUROC on held-out pairs ({figures.plain(estimator, 40)})",
        "layer" if layers else "site",
        "AUROC",
        y_range=(0, 1.02),
    )


def heat_map(transfer: TransferMatrix) -> go.Figure:
    """AUROC by training set (rows) and test set (columns), written in each cell with its interval."""
    import plotly.graph_objects as go

    names = [figures.plain(name, 28) for name in transfer.names]
    cells = {(line["trained_on"], line["tested_on"]): line for line in transfer.table.to_dict("records")}
    grid = [[cells[a, b] for b in transfer.names] for a in transfer.names]
    short = [[f"{cell['auroc']:.2f}" for cell in row] for row in grid]
    hover = [
        [
            f"{cell['auroc']:.3f} [{cell['auroc_low']:.3f}, {cell['auroc_high']:.3f}]<br>{cell['rows']} "
            f"rows of {cell['pairs']} pairs"
            + (f"<br>text alone {cell['text_auroc']:.3f}" if "text_auroc" in cell else "")
            for cell in row
        ]
        for row in grid
    ]
    figure = figures.figure()
    figure.add_trace(
        go.Heatmap(
            x=names,
            y=names,
            z=[[cell["auroc"] for cell in row] for row in grid],
            text=short,
            texttemplate="%{text}",
            customdata=hover,
            hovertemplate="trained on %{y}<br>tested on %{x}<br>%{customdata}<extra></extra>",
            autocolorscale=False,
            colorscale=[list(stop) for stop in figures.DIVERGING],
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "AUROC"}},
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figures.style(
        figure,
        f"Transfer of probes for {figures.plain(transfer.config.target, 40)}",
        "tested on",
        "trained on",
        height=max(320, 160 + 48 * len(names)),
        legend=False,
    )


def by_pairs(curve: LearningCurve) -> go.Figure:
    """AUROC by number of fitted pairs, with the range of the draws."""
    frame = curve.to_frame()
    figure = figures.figure()
    figures.line_with_band(
        figure,
        frame["pairs"].tolist(),
        frame["auroc"],
        frame["auroc_low"],
        frame["auroc_high"],
        name=curve.estimator,
        band="range of the draws",
        hover=[f"{draws} draws" for draws in frame["draws"]],
    )
    figures.reference_line(figure, 0.5, "chance")
    if curve.text is not None:
        figures.reference_line(
            figure, curve.text.value, "text alone, all pairs", colour=figures.ORANGE, dash="dash"
        )
    figure.update_xaxes(type="log", tickvals=frame["pairs"].tolist(), ticktext=frame["pairs"].tolist())
    lowest = min(*frame["auroc_low"].tolist(), 0.5 if curve.text is None else curve.text.value, 0.5)
    return figures.style(
        figure,
        f"Learning curve of the probe for {figures.plain(curve.config.target, 40)} at "
        f"{figures.plain(curve.site, 40)}",
        "fitted pairs",
        "AUROC on held-out pairs",
        y_range=(max(0.0, lowest - 0.05), 1.02),
    )


def dots(table: pd.DataFrame, title: str) -> go.Figure:
    """AUROC of each line of a table (`probe`, `auroc` and its interval) as a dot with its whiskers."""
    import plotly.graph_objects as go

    names = [figures.plain(name, 40) for name in table["probe"]]
    middle = table["auroc"].to_numpy(dtype=float)
    figure = figures.figure()
    figure.add_trace(
        go.Scatter(
            x=names,
            y=middle.tolist(),
            mode="markers",
            marker={"size": 10, "color": figures.BLUE},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": (table["auroc_high"].to_numpy(dtype=float) - middle).tolist(),
                "arrayminus": (middle - table["auroc_low"].to_numpy(dtype=float)).tolist(),
            },
            hovertemplate="%{x}: %{y:.3f}<extra></extra>",
        )
    )
    figures.reference_line(figure, 0.5, "chance")
    return figures.style(figure, figures.plain(title), "", "AUROC on held-out pairs", legend=False)
