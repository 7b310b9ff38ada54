"""A section of a report: what a result hands over to be shown, and how it is saved beside the result."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from veridical.errors import InputError
from veridical.files import read_json, write_json

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FILE = "section.json"


@dataclass(frozen=True)
class Section:
    """One titled part of a report.

    Attributes:
        title: Heading, plain text.
        text: Paragraphs of plain text parted by blank lines; escaped when shown.
        figures: Plotly figures, shown in order.
        tables: Captioned tables, as (caption, data frame).
        html: Fragments that are already safe HTML (built with `markupsafe.escape` for every outside text).
        headline: The one or two figures worth reading first, as (label, value) of plain text.
    """

    title: str
    text: str = ""
    figures: tuple[go.Figure, ...] = ()
    tables: tuple[tuple[str, pd.DataFrame], ...] = ()
    html: tuple[str, ...] = ()
    headline: tuple[tuple[str, str], ...] = field(default=())

    def save(self, folder: str | Path) -> Path:
        """Writes `section.json` into `folder`, so that `veridical report` can assemble it later."""
        return write_json(
            Path(folder) / FILE,
            {
                "title": self.title,
                "text": self.text,
                "figures": [json.loads(str(figure.to_json())) for figure in self.figures],
                "tables": [
                    {"caption": caption, **json.loads(str(table.to_json(orient="split", index=False)))}
                    for caption, table in self.tables
                ],
                "html": list(self.html),
                "headline": [list(item) for item in self.headline],
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> Section:
        """Reads the section that a result saved in `folder`."""
        import pandas as pd
        import plotly.graph_objects as go

        path = Path(folder) / FILE
        if not path.is_file():
            raise InputError(f"no {FILE} in {folder}: expected a folder that a veridical verb wrote")
        saved = read_json(path)
        return cls(
            title=saved["title"],
            text=saved["text"],
            figures=tuple(go.Figure(figure) for figure in saved["figures"]),
            tables=tuple(
                (table["caption"], pd.DataFrame(table["data"], columns=table["columns"]))
                for table in saved["tables"]
            ),
            html=tuple(saved["html"]),
            headline=tuple((label, value) for label, value in saved["headline"]),
        )


@runtime_checkable
class Reportable(Protocol):
    """Anything that can be put into a report."""

    def report_section(self) -> Section:
        """The result as a section."""
        ...
