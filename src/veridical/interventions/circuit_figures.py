"""Figures of edges: bars and grids of what each does, a circuit as a graph, and its faithfulness by size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from veridical.interventions.graph import Edge, Graph, Node
from veridical.reporting import figures

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.interventions.circuit_result import Circuit
    from veridical.interventions.patched_paths import PatchedPaths

MOST_BARS = 30
WIDTHS = (0.75, 1.5, 3.0, 5.0, 8.0)
"""Widths of edges in pixels, from the weakest to the strongest."""
UP, DOWN = figures.BLUE, figures.ORANGE


def bars(patched: PatchedPaths) -> go.Figure:
    """The strongest edges or paths by share of the whole effect, with intervals where there are any."""
    import plotly.graph_objects as go

    frame = patched.strongest(MOST_BARS)
    frame["name"] = [figures.plain(name, 60) for name in frame[patched.what.removesuffix("s")]]
    spread = None
    if len(patched.weights):
        spread = {
            "type": "data",
            "symmetric": False,
            "array": (frame["share_high"] - frame["share"]).tolist(),
            "arrayminus": (frame["share"] - frame["share_low"]).tolist(),
            "color": figures.BLACK,
            "thickness": 1.2,
        }
    figure = figures.figure()
    figure.add_trace(
        go.Bar(
            x=frame["share"],
            y=frame["name"],
            orientation="h",
            error_x=spread,
            marker={"color": [UP if share >= 0 else DOWN for share in frame["share"]]},
            customdata=frame["effect"],
            hovertemplate="%{y}<br>share %{x:.3f}<br>effect %{customdata:+.3f}<extra></extra>",
        )
    )
    figure.update_layout(hovermode="closest")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    few = f"The {len(frame)} strongest of {len(patched.names)} {patched.what}"
    title = few if len(frame) < len(patched.names) else f"What each of the {patched.what} carries"
    return figures.style(
        figure,
        f"{title}, {patched.direction}: {figures.plain(patched.facts['metric'], 40)}",
        "share of the whole effect",
        height=max(280, 120 + 24 * len(frame)),
        legend=False,
    )


def grid(patched: PatchedPaths) -> go.Figure:
    """Share of the whole effect of every edge, senders by receivers; empty where there is no edge."""
    import plotly.graph_objects as go

    senders, receivers = list(dict.fromkeys(patched.senders)), list(dict.fromkeys(patched.receivers))
    shares = np.full((len(senders), len(receivers)), np.nan)
    for i, line in enumerate(patched.to_frame()["share"]):
        shares[senders.index(patched.senders[i]), receivers.index(patched.receivers[i])] = line
    most = float(np.nanmax(np.abs(shares))) if np.isfinite(shares).any() else 1.0
    figure = figures.figure()
    figure.add_trace(
        go.Heatmap(
            x=receivers,
            y=senders,
            z=shares,
            autocolorscale=False,
            colorscale=[list(stop) for stop in figures.DIVERGING],
            zmin=-most,
            zmax=most,
            hoverongaps=False,
            hovertemplate="%{y} to %{x}<br>share %{z:.4f}<extra></extra>",
            colorbar={"title": {"text": "share"}},
        )
    )
    figure.update_layout(hovermode="closest")
    return figures.style(
        figure,
        f"Every edge patched alone, {patched.direction}: {figures.plain(patched.facts['metric'], 40)}",
        "receiver",
        "sender",
        height=min(1000, max(360, 160 + 14 * len(senders))),
        legend=False,
    )


def graph_figure(graph: Graph, scores: Mapping[Edge, float], title: str) -> go.Figure:
    """Edges as lines between nodes laid out by layer: width by size of score, colour by sign.

    From the embedding at the bottom to the logits at the top, heads of a layer stand in a row and its MLP
    at the right, above them where it reads them. An edge into a head ends at its left for the query, in the
    middle for the key, and at its right for the value. Keys and values that heads share stand below them.
    """
    import plotly.graph_objects as go

    spots = {
        node: _spot(graph, node) for edge in scores for node in (edge.sender, _shown(graph, edge.receiver))
    }
    figure = figures.figure()
    inner = [(spots[a], spots[b]) for a, b in _inner(graph, list(spots))]
    figure.add_trace(
        go.Scatter(
            x=[place for a, b in inner for place in (a[0], b[0], None)],
            y=[place for a, b in inner for place in (a[1], b[1], None)],
            mode="lines",
            line={"width": 1, "color": figures.GREY, "dash": "dot"},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    most = max((abs(score) for score in scores.values()), default=0.0) or 1.0
    lines: dict[tuple[bool, int], list[Edge]] = defaultdict(list)
    for edge, score in scores.items():
        step = min(len(WIDTHS) - 1, int(abs(score) / most * len(WIDTHS)))
        lines[score >= 0, step].append(edge)
    named: set[bool] = set()
    for (up, step), edges in sorted(lines.items()):
        x: list[float | None] = []
        y: list[float | None] = []
        for edge in edges:
            start, end = spots[edge.sender], _entry(graph, edge.receiver)
            x += [start[0], end[0], None]
            y += [start[1] + 0.12, end[1], None]
        name = "raises the metric" if up else "lowers the metric"
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                line={"width": WIDTHS[step], "color": figures.tint(UP if up else DOWN, 0.55)},
                name=name,
                legendgroup=name,
                showlegend=up not in named,
                hoverinfo="skip",
            )
        )
        named.add(up)
    middles = [(spots[e.sender], _entry(graph, e.receiver)) for e in scores]
    figure.add_trace(
        go.Scatter(
            x=[(a[0] + b[0]) / 2 for a, b in middles],
            y=[(a[1] + b[1]) / 2 for a, b in middles],
            mode="markers",
            marker={"size": 9, "opacity": 0},
            text=[f"{edge.name}<br>{score:+.4f}" for edge, score in scores.items()],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
    )
    nodes = list(spots)
    figure.add_trace(
        go.Scatter(
            x=[spots[node][0] for node in nodes],
            y=[spots[node][1] for node in nodes],
            mode="markers+text",
            text=[_label(node) for node in nodes],
            textfont={"size": 11},
            marker={
                "size": 26,
                "symbol": ["square" if node.kind != "head" else "circle" for node in nodes],
                "color": "white",
                "line": {"color": figures.BLACK, "width": 1.2},
            },
            hovertext=[node.name for node in nodes],
            hovertemplate="%{hovertext}<extra></extra>",
            showlegend=False,
        )
    )
    top = 2 * graph.n_layers + 1
    layers = {node.layer for node in nodes if node.layer is not None}
    figure.update_xaxes(visible=False, range=[-1, graph.n_heads + 1])
    figure.update_yaxes(
        showgrid=False,
        range=[-0.8, top + 0.8],
        tickvals=[0, *(2 * layer + 1.5 for layer in sorted(layers)), top],
        ticktext=["embed", *(f"layer {layer}" for layer in sorted(layers)), "logits"],
    )
    figure.update_layout(hovermode="closest")
    return figures.style(figure, title, height=min(1400, max(360, 160 + 55 * (top + 1))))


def curve_figure(circuit: Circuit) -> go.Figure:
    """Faithfulness by number of edges, on the rows that chose them and on others, beside random circuits."""
    figure = figures.figure()
    curve = {name: circuit.curve[name].tolist() for name in circuit.curve}
    figures.line_with_band(
        figure, curve["edges"], curve["faithfulness"], name="rows that chose the edges", colour=figures.SKY
    )
    if circuit.held_out_rows:
        figures.line_with_band(
            figure,
            curve["edges"],
            curve["held_out"],
            curve["held_out_low"],
            curve["held_out_high"],
            name="held-out rows",
        )
    drawn = circuit.curve[circuit.curve["random"].notna()]  # random ones are not drawn at every size
    figures.line_with_band(
        figure,
        drawn["edges"].tolist(),
        drawn["random"].tolist(),
        drawn["random_low"].tolist(),
        drawn["random_high"].tolist(),
        name="random circuits of as many edges",
        colour=figures.GREY,
        dash="dot",
        band=f"{circuit.facts['controls']} circuits, smallest to largest",
    )
    figures.reference_line(figure, 1.0, "the whole model")
    figure.add_vline(x=len(circuit.edges), line={"color": figures.BLACK, "width": 1, "dash": "dash"})
    figure.update_xaxes(type="log")
    return figures.style(
        figure,
        f"Faithfulness of growing circuits: {figures.plain(circuit.facts['metric'], 40)}",
        "edges in the circuit",
        "share of the clean-corrupt difference",
    )


def _shown(graph: Graph, receiver: Node) -> Node:
    """The node as which a receiver is drawn: its head, or a key/value head where heads share one."""
    if receiver.kind != "head":
        return Node(receiver.kind, receiver.layer)
    shared = receiver.port != "q" and graph.n_kv_heads < graph.n_heads
    return Node("head", receiver.layer, receiver.head, "kv" if shared else None)


def _spot(graph: Graph, node: Node) -> tuple[float, float]:
    middle = (graph.n_heads - 1) / 2
    if node.layer is None:
        return middle, 0.0 if node.kind == "embed" else 2.0 * graph.n_layers + 1
    below = 2.0 * node.layer
    if node.kind == "mlp":
        return float(graph.n_heads), below + (1 if graph.parallel[node.layer] else 2)
    if node.kind == "attn":
        return middle, below + 1.6
    if node.port == "kv":
        size = graph.n_heads // graph.n_kv_heads
        return (node.head or 0) * size + (size - 1) / 2, below + 0.5
    return float(node.head or 0), below + 1


def _entry(graph: Graph, receiver: Node) -> tuple[float, float]:
    """Where an edge into `receiver` ends."""
    x, y = _spot(graph, _shown(graph, receiver))
    return x + {"q": -0.12, "v": 0.12}.get(str(receiver.port), 0.0), y - 0.12


def _inner(graph: Graph, nodes: Sequence[Node]) -> list[tuple[Node, Node]]:
    """What belongs together without being an edge: shared keys and values with their heads, heads with the
    attention layer that they write as."""
    drawn, found = set(nodes), []
    size = graph.n_heads // graph.n_kv_heads
    for node in nodes:
        if node.kind == "head" and node.port == "kv" and node.head is not None:
            heads = [Node("head", node.layer, node.head * size + i) for i in range(size)]
            found += [(node, head) for head in heads if head in drawn]
            if graph.whole_attention:
                found.append((node, Node("attn", node.layer)))
        elif node.kind == "head" and graph.whole_attention:
            found.append((node, Node("attn", node.layer)))
    return [(a, b) for a, b in found if b in drawn]


def _label(node: Node) -> str:
    if node.kind == "head":
        return f"{node.layer}.{node.port or ''}{node.head}"
    return node.kind if node.layer is None else f"{node.kind[0]}{node.layer}"
