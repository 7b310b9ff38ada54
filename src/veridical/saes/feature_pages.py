"""Features as sections of a report: a page for one, an index of all."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from veridical.probes.card import number
from veridical.reporting.figures import BLUE, GREY, figure, style
from veridical.reporting.section import Section
from veridical.saes.base import FIRED

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.hooked import HookedModel
    from veridical.saes.features import Example, FeatureTable

LISTED = 200
"""Features in the index at most: the most active; the table of all is `FeatureTable.to_frame()`."""
STYLE = """<style>
.vd-example { line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem;
  margin: .3em 0; font-family: ui-monospace, Menlo, Consolas, monospace }
.vd-example span { border-radius: 3px; padding: 1px 0 }
.vd-example span.vd-at { outline: 1px solid #1b1f24 }
.vd-example b { font: 600 .8rem system-ui, sans-serif; color: #374151; margin-right: .6em }
</style>"""


def pages(table: FeatureTable, features: Sequence[int], model: HookedModel | None = None) -> list[Section]:
    """A section for each feature; with a model also the tokens that it promotes and suppresses."""
    values = table.values(features)
    effects = None
    if model is not None:
        from veridical.saes.logit_effects import top_tokens

        effects = top_tokens(model, table.sae, list(dict.fromkeys(features)))
    made = []
    for at, feature in enumerate(features):
        tables: tuple[tuple[str, pd.DataFrame], ...] = ()
        if effects is not None:
            own = effects.loc[effects["feature"] == feature, effects.columns.drop("feature")]
            tables = (("Tokens that its direction promotes and suppresses by the direct path", own.round(3)),)
        drawn = () if table.frequency[feature] == 0 else (_histogram(table, feature, values[:, at]),)
        made.append(
            Section(
                title=f"Feature {feature} at {table.site}",
                text=_said(table, feature),
                figures=drawn,
                tables=tables,
                html=_shown(table, feature),
            )
        )
    return made


def index(table: FeatureTable) -> Section:
    """Every feature in a line, most active first, and how often features fire."""
    frame = table.to_frame()
    order = np.argsort(-table.frequency, kind="stable")[:LISTED]
    order = order[table.frequency[order] > 0]
    active = frame.iloc[order].round(5)
    active = active.assign(strongest=[_strongest(table, feature) for feature in order.tolist()])
    silent = int((table.frequency == 0).sum())
    text = (
        f"{len(frame):,} features over {len(table.acts):,} tokens of {len(table.acts.rows):,} texts; "
        f"{silent:,} never fire there. The table lists the {len(active)} that fire most; a feature that "
        "fires on a large share of all tokens seldom means anything that can be named."
    )
    return Section(
        title=f"Features at {table.site}",
        text=text,
        figures=(_frequencies(table),),
        tables=((f"The {len(active)} features that fire most", active),),
        headline=(("features that fire", f"{len(frame) - silent:,} of {len(frame):,}"),),
    )


def example_html(example: Example, largest: float) -> str:
    """One example with every token coloured by the feature's activation, all text escaped."""
    pieces = []
    for at, (token, value) in enumerate(zip(example.tokens, example.values)):
        share = 0.0 if largest <= 0 else min(1.0, max(0.0, value / largest))
        kind = ' class="vd-at"' if at == example.at else ""
        pieces.append(
            f'<span{kind} style="background:rgba(213,94,0,{0.6 * share:.3f})" title="{value:.3g}">'
            f"{html.escape(token)}</span>"
        )
    said = f"<b>{example.value:.3g}, row {example.row}</b>"
    return f'<div class="vd-example" dir="auto">{said}{"".join(pieces)}</div>'


def _said(table: FeatureTable, feature: int) -> str:
    if table.frequency[feature] == 0:
        return f"It fires on none of {len(table.acts):,} tokens."
    return (
        f"It fires on {table.frequency[feature]:.2%} of {len(table.acts):,} tokens and in "
        f"{table.texts[feature]:.1%} of the texts; its activation there is "
        f"{number(float(table.mean[feature]))} on average and {number(float(table.largest[feature]))} at "
        "most.\n\n"
        "The strongest examples, one for each text, and a random draw among all tokens on which it fires; "
        "judge it by both."
    )


def _shown(table: FeatureTable, feature: int) -> tuple[str, ...]:
    largest = float(table.largest[feature])
    parts = []
    for heading, examples in (
        ("Strongest", table.examples(feature)),
        ("At random", table.random_examples(feature)),
    ):
        if examples:
            shown = "".join(example_html(example, largest) for example in examples)
            parts.append(f"<h3>{heading}</h3>{shown}")
    return (STYLE + "".join(parts),) if parts else ()


def _strongest(table: FeatureTable, feature: int) -> str:
    at = int(table.strongest[0, feature]) if len(table.strongest) else -1
    return str(table.acts.index["token"].iat[at]) if at >= 0 else ""


def _histogram(table: FeatureTable, feature: int, values: np.ndarray) -> go.Figure:
    import plotly.graph_objects as go

    counts, edges = np.histogram(values[values > FIRED], bins=40)
    drawn = figure()
    drawn.add_trace(
        go.Bar(x=((edges[:-1] + edges[1:]) / 2).tolist(), y=counts.tolist(), marker_color=BLUE, name="tokens")
    )
    drawn.update_layout(bargap=0.03)
    title = f"Activations of feature {feature} where it fires"
    return style(drawn, title, "activation", "tokens", legend=False, height=260)


def _frequencies(table: FeatureTable) -> go.Figure:
    import plotly.graph_objects as go

    fires = table.frequency > 0
    drawn = figure()
    drawn.add_trace(
        go.Scatter(
            x=table.frequency[fires].tolist(),
            y=table.mean[fires].tolist(),
            mode="markers",
            marker={"color": BLUE, "size": 6, "opacity": 0.6, "line": {"color": GREY, "width": 0.5}},
            text=[f"feature {feature}" for feature in np.flatnonzero(fires)],
            hovertemplate="%{text}<br>%{x:.2%} of tokens, mean %{y:.3g}<extra></extra>",
            name="features",
        )
    )
    drawn.update_layout(hovermode="closest")
    drawn.update_xaxes(type="log")
    return style(
        drawn, "Features by how often and how strongly they fire", "share of tokens", "mean activation",
        legend=False,
    )  # fmt: skip
