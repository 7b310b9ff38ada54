"""A few rows of the data, with a probe's score at every token: what the figures are about."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import escape

from veridical.errors import VeridicalError
from veridical.reporting import Section

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.config import ProbeConfig
    from veridical.models import HookedModel
    from veridical.pairs import Pairs
    from veridical.probes.base import LinearProbe

log = logging.getLogger(__name__)

LONGEST = 1200
"""Characters of an example; longer rows are passed over, so that the page stays readable."""


def token_section(
    model: HookedModel, probe: LinearProbe, pairs: Pairs, rows: Mapping[str, int], text: str
) -> Section | None:
    """The probe at each token of some rows, or None when there is none to show.

    Args:
        model: The model that the probe was fitted on.
        probe: A fitted probe with its site.
        pairs: The data.
        rows: What each row is an example of, and its number.
        text: Paragraphs that come first.
    """
    from veridical.probes import view_tokens

    html, notes = [], []
    for kind, row in rows.items():
        line = pairs[row]
        try:
            view = view_tokens(model, probe, line["prompt"], line.get("completion") or None)
        except VeridicalError as error:  # a row that has no view doesn't cost the report
            log.warning("no token view of row %d: %s", row, error)
            continue
        html.append(f"<h3>{escape(kind)}</h3>{view.to_html()}")
        notes.extend(note for note in view.notes if note not in notes)
    if not html:
        return None
    return Section(title="Token by token", text="\n\n".join([text, *notes]), html=tuple(html))


def one_of_each(acts: Activations, config: ProbeConfig, texts: Sequence[str]) -> dict[str, int]:
    """Two short rows that the sweep held out, one of each class and of the same pair where that can be.

    Args:
        acts: What the sweep was fitted on.
        config: Its options.
        texts: Text of each row.

    Returns:
        What the row is, such as "label = 1", and its number; fewer than two where no short row is left.
    """
    import numpy as np

    from veridical.probes.data import choose_rows, read_source

    source = read_source(acts, config.target, None, None, None)
    task = choose_rows(source, config, config.where)
    rows = acts.index["row"].to_numpy()[task.test]
    short = np.array([len(text) <= LONGEST for text in texts])[rows]
    positive, groups = task.positive[task.test], source.groups[task.test]
    first, second = short & positive, short & ~positive
    both = np.intersect1d(groups[first], groups[second])
    if len(both):
        first, second = first & (groups == both[0]), second & (groups == both[0])
    sides = ((task.classes[1], first), (task.classes[0], second))
    return {f"{config.target} = {value}": int(rows[side][0]) for value, side in sides if side.any()}
