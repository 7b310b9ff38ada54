"""What the command line says: plain lines on standard output, warnings on standard error, nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextlib.contextmanager
def console() -> Iterator[None]:
    """What Veridical says goes to standard output as plain lines; other libraries are quiet."""
    root, handler = logging.getLogger("veridical"), _Console()
    before = (root.level, root.propagate)
    environment = {name: os.environ.get(name) for name in QUIET}
    os.environ.update({name: value for name, value in QUIET.items() if os.environ.get(name) is None})
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="veridical")
            warnings.showwarning = _one_line_warning
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        root.propagate = before[1]
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Says what is being done, and how long it took once it is."""
    start = time.perf_counter()
    log.info("%s ...", name)
    yield
    log.info("  %.1f s", time.perf_counter() - start)


def said_where(page: Path) -> None:
    """Says where a page is, as a path and as a link that a terminal can open."""
    log.info("report: %s", page)
    log.info("        %s", page.resolve().as_uri())


class _Console(logging.Handler):
    """What is said goes to standard output, what is warned of to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            _one_line_warning(record.getMessage())
        else:
            sys.stdout.write(f"{record.getMessage()}\n")
            sys.stdout.flush()


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"veridical: warning: {' '.join(str(message).split())}\n")
