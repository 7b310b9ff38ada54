"""Figures: what is drawn, and that text from outside is drawn as text."""

import plotly.graph_objects as go
import pytest

from veridical.reporting import figures

SITES = ["resid_post.0", "resid_post.1"]


def test_a_band_has_its_line_on_top_and_shares_its_legend_entry():
    figure = figures.line_with_band(figures.figure(), SITES, [0.5, 0.9], [0.4, 0.8], [0.6, 1.0], name="probe")
    high, low, line = figure.data
    assert list(high.y) == [0.6, 1.0]
    assert list(low.y) == [0.4, 0.8]
    assert low.fill == "tonexty"
    assert list(line.y) == [0.5, 0.9]
    assert [trace.showlegend for trace in figure.data] == [False, False, None]
    assert {trace.legendgroup for trace in figure.data} == {"probe"}
    assert "95 % interval" in line.hovertemplate


def test_a_line_alone_has_no_band():
    figure = figures.line_with_band(figures.figure(), SITES, [0.5, 0.9], name="probe", hover=["a", "b"])
    (line,) = figure.data
    assert line.hovertemplate.endswith("%{customdata[0]}<extra></extra>")
    assert [list(row) for row in line.customdata] == [["a"], ["b"]]


def test_style_sets_titles_and_leaves_the_width_to_the_page():
    figure = figures.style(go.Figure(), "AUROC by site", "Site", "AUROC", y_range=(0.4, 1.0))
    assert figure.layout.title.text == "AUROC by site"
    assert figure.layout.xaxis.title.text == "Site"
    assert tuple(figure.layout.yaxis.range) == (0.4, 1.0)
    assert figure.layout.width is None
    assert figure.layout.template.layout.colorway[0] == figures.BLUE


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("<b>x</b>", "&lt;b&gt;x&lt;/b&gt;"),
        ("a & b", "a &amp; b"),
        ("line\nbreak", "line⏎break"),
        ("%{x}", "%\u200b{x}"),
        ("long text", "long…"),
    ],
)
def test_plain_makes_markup_inert(text, drawn):
    assert figures.plain(text, limit=5 if text == "long text" else None) == drawn


def test_names_with_markup_reach_no_trace_or_hover_text_as_markup():
    figure = figures.line_with_band(figures.figure(), SITES, [0, 1], [0, 1], [0, 1], name="<a href='x'>y</a>")
    figures.reference_line(figure, 0.5, "<b>chance</b>")
    assert "<a" not in figure.to_json().replace("\\u003c", "<")
    assert figure.layout.annotations[0].text == "&lt;b&gt;chance&lt;/b&gt;"


def test_categorical_colours_stay_apart_in_lightness_or_hue():
    assert len(set(figures.COLOURS)) == len(figures.COLOURS)
    assert figures.tint("#0072B2", 0.2) == "rgba(0,114,178,0.2)"
