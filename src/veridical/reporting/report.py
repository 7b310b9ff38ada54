"""Results as one self-contained HTML page that works offline, on paper, and on a phone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from veridical.errors import InputError
from veridical.files import read_json, write_bytes
from veridical.provenance import provenance
from veridical.reporting import markup
from veridical.reporting.section import FILE, Reportable, Section

Result = Reportable | Section | str | Path
PROVENANCE = "provenance.json"
READING_ORDER = ("beliefs", "sweep", "patched", "", "tokens", "data", "activations")
"""Parts of a run that are shown in this order; parts with other names stand where the empty name is."""


def report(
    results: Result | Iterable[Result],
    path: str | Path = "report.html",
    *,
    title: str = "Veridical report",
    intro: str = "",
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `results` as one HTML file and returns its path.

    The file holds all that it needs, plotly included (about 5 MB when there is a figure), and loads nothing.
    Texts are escaped; a content security policy in the page lets no script run but the two that are ours.

    Args:
        results: What to show, in order: results of the library, sections, or folders that a verb has written
            (a folder stands for its own section and those of its sub-folders). One alone will do.
        path: The HTML file; replaced whole or not at all.
        title: Heading of the page.
        intro: Plain paragraphs under the heading, parted by blank lines.
        facts: Seeds, fingerprints and the like, shown at the foot beside the versions.

    Raises:
        InputError: Nothing to show, something that is no result, or a folder without a section.
    """
    parts = gather(results)
    page = render([part.section for part in parts], title=title, intro=intro, sources=_sources(parts, facts))
    return write_bytes(path, page.encode("utf-8", "replace"))


@dataclass(frozen=True)
class Part:
    """A section, and the folder that says what made it, if any."""

    section: Section
    folder: Path | None = None


def gather(results: Result | Iterable[Result]) -> list[Part]:
    """The sections that `results` stand for, in order."""
    if isinstance(results, str | Path | Section | Reportable):
        results = [results]
    if not isinstance(results, Iterable):
        raise InputError(_not_a_result(results))
    parts: list[Part] = []
    for result in results:
        if isinstance(result, str | Path):
            parts.extend(read_folder(result))
        elif isinstance(result, Section):
            parts.append(Part(result))
        elif isinstance(result, Reportable):
            parts.append(Part(result.report_section()))
        else:
            raise InputError(_not_a_result(result))
    if not parts:
        raise InputError("nothing to report: no result was given")
    return parts


def read_folder(folder: str | Path) -> list[Part]:
    """The saved section of `folder`, then those of its sub-folders in reading order."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder at {folder}: expected one that a veridical verb wrote")
    inside = sorted((p.parent for p in folder.glob(f"*/{FILE}")), key=lambda p: (_rank(p.name), p.name))
    found = [folder] if (folder / FILE).is_file() else []
    if not found and not inside:
        raise InputError(f"no {FILE} in {folder}: expected a folder that a veridical verb wrote")
    # What made a run is written once, beside its own section; its parts came from the same run.
    return [
        Part(Section.load(place), None if place in inside and found else place) for place in [*found, *inside]
    ]


def render(
    sections: Sequence[Section],
    *,
    title: str,
    intro: str = "",
    sources: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> str:
    """The page as text.

    Args:
        sections: What to show.
        title: Heading.
        intro: Paragraphs under it.
        sources: Named sets of facts for the foot of the page.
    """
    from veridical import __version__

    parts, taken = [], ["content"]
    for section in sections:
        id = markup.slug(section.title, taken)
        taken.append(id)
        parts.append(_part(section, id))
    figures = sum(len(part["figures"]) for part in parts)
    scripts = {"plotly_js": _plotly(), "page_js": _template_text("report.js")} if figures else {}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            intro=markup.paragraphs(intro),
            parts=parts,
            headlines=[
                {"id": part["id"], "label": label, "value": value}
                for part, section in zip(parts, sections)
                for label, value in section.headline
            ],
            figures=figures,
            sources=[{"name": name, "facts": _flat(values)} for name, values in sources],
            version=__version__,
            css=Markup(_template_text("report.css")),
            script_hashes=[Markup(_hash(script)) for script in scripts.values()],
            **{name: Markup(script) for name, script in scripts.items()},
        )
    )


def _part(section: Section, id: str) -> dict[str, Any]:
    return {
        "id": id,
        "title": section.title,
        "text": markup.paragraphs(section.text),
        "figures": [
            markup.figure_part(figure, f"{id}-figure-{n}") for n, figure in enumerate(section.figures, 1)
        ],
        "html": [Markup(fragment) for fragment in section.html],  # safe by the contract of Section
        "tables": [
            markup.table_part(table, caption, f"{id}-table-{n}")
            for n, (caption, table) in enumerate(section.tables, 1)
        ],
    }


def _sources(parts: Sequence[Part], facts: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any]]]:
    sources: list[tuple[str, Mapping[str, Any]]] = [("This page", provenance(**(facts or {})))]
    for part in parts:
        file = part.folder / PROVENANCE if part.folder else None
        if file is not None and file.is_file():
            sources.append((f"Provenance of {part.section.title}", read_json(file)))
    return sources


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.extend(_flat(value, f"{before}{key} " if key != "packages" else before))
        elif value not in (None, "", [], ()):
            said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            found.append((f"{before}{key}", said))
    return found


def _rank(name: str) -> int:
    return READING_ORDER.index(name if name in READING_ORDER else "")


def _not_a_result(value: object) -> str:
    kind = type(value).__name__
    return f"cannot report a {kind}: expected a result with report_section(), a Section, or a saved folder"


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # Browsers hash what the HTML parser gives them: line ends as \n; and no text in it may close the element.
    return get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script")


@cache
def _template_text(name: str) -> str:
    return (resources.files("veridical.reporting") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(_template_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
