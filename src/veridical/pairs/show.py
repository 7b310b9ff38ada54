"""How pairs are shown: in a line, in a notebook, in a report."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from veridical.pairs.schema import Pairs
    from veridical.reporting.section import Section

SAMPLE_ROWS = 3
FEW = 6


def section(pairs: Pairs) -> Section:
    """Counts, columns and a few rows."""
    import pandas as pd

    from veridical.reporting.section import Section

    texts = pairs.texts
    rows = [{"row": row, "text": shorten(texts[row], 300)} for row in _sample(pairs)]
    return Section(
        title=f"Data: {pairs.name}",
        text=counts(pairs) + ". Rows of one pair are never on both sides of a split.",
        tables=(("Columns", _column_table(pairs)), ("Some rows", pd.DataFrame(rows))),
        headline=(("rows", f"{len(pairs):,}"), ("pairs", f"{_n_pairs(pairs):,}")),
    )


def to_html(pairs: Pairs) -> str:
    """Counts, columns and a few rows as HTML, everything from the data escaped."""
    shown = [column for column in ("pair", "prompt", "completion", "label", "split") if column in pairs]
    head = "".join(f"<th>{column}</th>" for column in shown)
    body = ""
    for number in _sample(pairs):
        row = pairs[number]
        cells = [flat(row[column]) if column == "prompt" else str(row[column]) for column in shown]
        body += "<tr>" + "".join(f"<td>{html.escape(shorten(cell, 200))}</td>" for cell in cells) + "</tr>"
    return (
        f"<div><p>{html.escape(counts(pairs))}</p><p>{html.escape(', '.join(pairs.columns))}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def counts(pairs: Pairs) -> str:
    """Rows, pairs, and the sizes of labels and splits in one line."""
    said = f"{pairs.name}: {len(pairs):,} rows in {_n_pairs(pairs):,} pairs"
    for column in ("label", "split"):
        sizes = _sizes(pairs, column) if column in pairs else {}
        if 1 < len(sizes) <= FEW:
            said += f"; {column} " + ", ".join(f"{value}: {size:,}" for value, size in sizes.items())
    return said


def flat(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as one text; the roles of chat messages stand at the start of lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def shorten(text: str, limit: int) -> str:
    """`text` cut to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _n_pairs(pairs: Pairs) -> int:
    return len(set(pairs.groups.tolist()))


def _sizes(pairs: Pairs, column: str) -> dict[Any, int]:
    sizes: dict[Any, int] = {}
    for value in pairs.dataset[column]:
        sizes[value] = sizes.get(value, 0) + 1
    return dict(sorted(sizes.items(), key=lambda item: str(item[0])))


def _column_table(pairs: Pairs) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for column in pairs.columns:
        if column in ("prompt", "options") or isinstance(pairs.dataset[0][column], list | dict):
            continue
        sizes = _sizes(pairs, column)
        few = ", ".join(f"{shorten(str(value), 30)}: {size:,}" for value, size in sizes.items())
        rows.append({"column": column, "values": few if len(sizes) <= FEW else f"{len(sizes):,} different"})
    return pd.DataFrame(rows, columns=["column", "values"])


def _sample(pairs: Pairs) -> list[int]:
    return sorted({round(row) for row in np.linspace(0, len(pairs) - 1, SAMPLE_ROWS)})
