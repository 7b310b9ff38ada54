"""The part of a report that says what was read: which tokens, at which sites, how large."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from veridical.reporting.section import Section
from veridical.sites import Site

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.activations.activations import Activations

EXAMPLES = 8


def section(acts: Activations) -> Section:
    """What was read, with the size of the vectors by site, and examples of the tokens."""
    request = acts.request
    pooled = request.tokens["selection"] == "mean"
    read = "the mean over all tokens of each row" if pooled else f"tokens: {request.tokens['selection']}"
    text = (
        f"{len(acts):,} vectors at each of {len(acts.sites)} sites from {len(acts.rows):,} rows "
        f"({read}), kept as {str(acts.dtype).removeprefix('torch.')}. Only tokens of the text are read, "
        "never padding."
    )
    tables = [("Sites", table(acts))]
    if not pooled:
        tables.append(("Tokens that were read, the commonest first", tokens(acts)))
    return Section(
        title="Activations",
        text=text,
        figures=(figure(acts),),
        tables=tuple(tables),
        headline=(("Vectors", f"{len(acts):,} x {len(acts.sites)} sites"),),
    )


def table(acts: Activations) -> pd.DataFrame:
    """One line per site: shape, size, root mean square norm, and mean standard deviation of a coordinate."""
    lines = []
    for site in acts.sites:
        moments = acts.moments[site]
        shape = tuple(moments.mean.shape)
        size = len(acts) * moments.mean.numel() * acts.dtype.itemsize
        lines.append(
            {
                "site": Site.parse(site).short,
                "vectors": len(acts),
                "shape": " x ".join(map(str, shape)),
                "MB": round(size / 1e6, 2),
                "rms norm": round(moments.mean_square**0.5, 4),
                "std of a coordinate": round(float(moments.std.mean()), 4),
            }
        )
    return pd.DataFrame(lines)


def tokens(acts: Activations) -> pd.DataFrame:
    """The commonest tokens that were read, and how often each was."""
    counts = acts.index["token"].value_counts().head(EXAMPLES)
    return pd.DataFrame(
        {
            "token": [repr(token) for token in counts.index],
            "vectors": counts.to_numpy(),
            "share": [round(count / len(acts), 3) for count in counts],
        }
    )


def figure(acts: Activations) -> go.Figure:
    """Root mean square norm of the vectors, with the part that the mean alone accounts for, by site."""
    from veridical.reporting import figures

    names = [Site.parse(site).short for site in acts.sites]
    moments = [acts.moments[site] for site in acts.sites]
    made = figures.figure()
    norms = [moment.mean_square**0.5 for moment in moments]
    figures.line_with_band(made, names, norms, name="all vectors (root mean square)")
    means = [float(moment.mean.norm()) for moment in moments]
    figures.line_with_band(made, names, means, name="their mean", colour=figures.ORANGE)
    return figures.style(made, "Size of the activations by site", "site", "norm")
