"""One progress bar for every verb: rate and time left, quiet where nobody watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


def bar(total: int | None, desc: str, unit: str = "it", progress: bool | None = None) -> Any:
    """A `tqdm` bar over `total` units.

    Args:
        total: Number of units, or None when it is not known.
        desc: What is being done, in a word or two.
        unit: Name of one unit; the rate is shown in it (`tokens/s`).
        progress: True or False to force it; None shows it only on a terminal or in a notebook.
    """
    from tqdm.auto import tqdm

    shown = watched() if progress is None else progress
    return tqdm(
        total=total,
        desc=desc,
        unit=f" {unit}",
        unit_scale=True,
        disable=not shown,
        dynamic_ncols=True,
        smoothing=0.1,
    )


def watched() -> bool:
    """Whether someone can see a bar: standard error is a terminal, or this is a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if type(shell).__name__ == "ZMQInteractiveShell":
        return True
    return sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """The bars of `datasets` only where someone watches; as they were afterwards."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    if not watched():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
