"""The page: self-contained, inert, the same from live results and from saved folders."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from veridical.errors import InputError, VeridicalError
from veridical.files import write_json
from veridical.reporting import Section, figures, markup, report
from veridical.reporting.report import read_folder, render

EVIL = "<script>document.title='pwned'</script><img src=https://evil.example/x.png onerror=alert(1)>"
LINK = "<a href='https://evil.example'>click</a>"


class Page(HTMLParser):
    """Every element of a page with its attributes, and the text in each kind of element."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture
def section():
    figure = figures.line_with_band(
        figures.figure(), ["a", "b"], np.array([0.5, 0.9]), [0.4, 0.8], [0.6, 1.0], name="p"
    )
    figures.style(figure, "AUROC by site", "Site", "AUROC")
    table = pd.DataFrame(
        {
            "site": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"],
            "auroc": [0.5, 0.99612],
            "rows": [10, 12000],
            "known": [True, False],
            "low": [np.nan, 0.25],
            "count": [3, None],
            "token": ["x", None],
        },
        index=[7, 9],
    )
    return Section(
        title="Probe: lied",
        text="First paragraph.\n\nSecond one.",
        figures=(figure,),
        tables=(("Figures by site", table),),
        html=("<p class='own'>kept as it is</p>",),
        headline=(("best site", "0.996"),),
    )


def evil_section():
    figure = go.Figure(
        go.Heatmap(
            z=[[1, 2]], x=[EVIL, LINK], y=[EVIL], text=[[EVIL, EVIL]], hovertext=[[EVIL, LINK]], name=EVIL
        )
    )
    figure.update_layout(title=EVIL, xaxis_title=LINK, annotations=[{"text": EVIL, "x": 0, "y": 0}])
    figure.add_layout_image(source="https://evil.example/x.png")
    return Section(
        title=EVIL,
        text=EVIL,
        figures=(figure,),
        tables=((EVIL, pd.DataFrame({EVIL: [EVIL], "token": [LINK], "list": [[EVIL]]})),),
        headline=((EVIL, EVIL),),
    )


def test_everything_of_a_section_is_on_the_page(section, tmp_path):
    page = Page(report([section], tmp_path / "r.html", title="A title", intro="Why.\n\nHow.").read_text())
    assert page.texts["h1"] == ["A title"]
    assert page.texts["h2"] == ["Probe: lied"]
    said = [text for text in page.texts["p"] if "JavaScript" not in text]
    assert said[:4] == ["Why.", "How.", "First paragraph.", "Second one."]
    assert page.texts["figcaption"] == ["AUROC by site"]
    assert "0.996" in page.texts["span"]
    assert page.texts["th"] == ["site", "auroc", "rows", "known", "low", "count", "token"]
    cells = page.texts["td"]
    assert cells[:7] == ["blocks.0.hook_resid_post", "0.500", "10", "yes", "–", "3", "x"]
    assert cells[7:] == ["blocks.1.hook_resid_post", "0.996", "12,000", "no", "0.250", "–", "–"]
    assert ("p", {"class": "own"}) in page.elements


def test_the_page_loads_nothing(section, tmp_path):
    page = Page(report([section, evil_section()], tmp_path / "r.html").read_text())
    assert page.count("link") == page.count("img") == page.count("iframe") == page.count("base") == 0
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "data", "poster"} & set(attributes), (tag, attributes)
        assert all(not name.startswith("on") for name in attributes), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
    (style,) = page.texts["style"]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_only_our_two_scripts_may_run(section, tmp_path):
    text = report(section, tmp_path / "r.html").read_text()
    policy = re.search(r"script-src ([^\"]+)\"", text)
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 2
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy is not None
    assert html.unescape(policy[1]).split() == [f"'sha256-{digest}'" for digest in digests]


def test_model_text_is_inert_everywhere(tmp_path):
    text = report(
        [evil_section()], tmp_path / "r.html", title=EVIL, intro=EVIL, facts={EVIL: EVIL}
    ).read_text()
    page = Page(text)
    assert page.count("script") == 3  # the figure's data, plotly, and ours
    assert page.count("img") == 0
    assert all(a.get("href", "#").startswith("#") for t, a in page.elements if t == "a")
    (spec,) = (
        json.loads(found)
        for found in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, flags=re.DOTALL)
    )
    drawn = json.dumps(spec)
    assert not re.search(r"<(?!/?(br|b|i|em|strong|sub|sup|extra)\b)", drawn)
    assert "&lt;script" in drawn
    assert "images" not in spec["layout"]
    for where in ("h1", "h2", "figcaption", "td", "th", "dd", "dt", "title"):
        assert any("<script>" in said for said in page.texts[where]), where


def test_json_in_a_script_element_cannot_end_it():
    said = str(markup.script_json({"x": "</script><!--", "y": "\u2028&"}))
    assert not set("<>&\u2028") & set(said)
    assert json.loads(said) == {"x": "</script><!--", "y": "\u2028&"}


def test_saved_sections_make_the_same_page_as_live_ones(section, tmp_path):
    other = Section(title="Other", tables=(("", pd.DataFrame({"n": [1, 2]})),))
    live = render([section, other], title="T")
    for name, part in (("a", section), ("b", other)):
        part.save(tmp_path / name)
    saved = render([part.section for name in "ab" for part in read_folder(tmp_path / name)], title="T")
    assert saved == live


def test_a_folder_stands_for_its_parts_in_reading_order(tmp_path):
    for name in ("activations", "beliefs", "sweep", "zebra", "."):
        Section(title=name).save(tmp_path / name)
    write_json(tmp_path / "provenance.json", {"seed": 3, "packages": {"torch": "2"}})
    titles = [part.section.title for part in read_folder(tmp_path)]
    assert titles == [".", "beliefs", "sweep", "zebra", "activations"]
    page = Page(report(tmp_path, tmp_path / "r.html").read_text())
    assert "Provenance of ." in page.texts["summary"]
    assert "3" in page.texts["dd"]


def test_same_input_same_bytes(section, tmp_path):
    one, two = (report([section], tmp_path / name).read_bytes() for name in ("1.html", "2.html"))
    assert one == two


def test_without_a_figure_the_page_is_small(tmp_path):
    path = report(Section(title="Words", text="only"), tmp_path / "r.html")
    assert path.stat().st_size < 20_000
    assert "script-src &#39;none&#39;" in path.read_text() or "script-src 'none'" in path.read_text()


def test_a_failed_report_leaves_the_old_one(section, tmp_path):
    path = report([section], tmp_path / "r.html")
    before = path.read_bytes()
    with pytest.raises(InputError):
        report([section, object()], path)  # type: ignore[list-item]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_equal_titles_get_different_anchors(section, tmp_path):
    page = Page(report([section, section], tmp_path / "r.html").read_text())
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for t, a in page.elements if t == "a"]
    assert {link[1:] for link in links if link} <= set(ids)


def test_lone_surrogates_in_model_text_do_not_stop_the_page(tmp_path):
    text = report(Section(title="t", text="a \ud800 b"), tmp_path / "r.html").read_text()
    assert "a ? b" in text


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], "nothing to report"),
        ([3], "cannot report a int"),
        (3, "cannot report a int"),
        (["nowhere"], "no folder at nowhere"),
    ],
)
def test_what_cannot_be_reported_is_named(bad, said, tmp_path):
    with pytest.raises(VeridicalError, match=said):
        report(bad, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_folder_without_a_section_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no section\.json in"):
        report(tmp_path, tmp_path / "r.html")


def test_long_tables_scroll_and_say_what_is_left_out():
    part = markup.table_part(pd.DataFrame({"n": range(markup.MAX_ROWS + 5)}), "t", "id")
    assert part.tall
    assert part.left_out == 5
    assert len(part.rows) == markup.MAX_ROWS


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.99612, "0.996"),
        (1.0, "1.000"),
        (0.0, "0"),
        (3.2e-5, "3.2e-05"),
        (12.34, "12.3"),
        (150.2, "150"),
        (4210.4, "4,210"),
        (-0.5, "-0.500"),
        (float("inf"), "∞"),
    ],
)
def test_numbers_keep_three_figures(value, said):
    assert markup.number(value) == said


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_the_figures_and_runs_nothing_else(section, tmp_path):
    harmful = Section(title="Fragment", html=("<script>document.title='pwned'</script>",))
    path = report([section, evil_section(), harmful], tmp_path / "r.html", title="Safe")
    command = "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    command += (
        " --disable-background-networking --disable-component-update --virtual-time-budget=8000 --dump-dom"
    )
    done = subprocess.run(
        [*command.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "<title>Safe</title>" in done.stdout
    assert done.stdout.count("main-svg") >= 2
    assert "scatterlayer" in done.stdout
