"""What benchmarks share: their options, what ran them, and the committed table with its figures."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from veridical.provenance import versions

RESULTS = Path(__file__).parent / "results"


def options_of(doc: str | None, *, turns: int | None, threads: int = 1) -> argparse.ArgumentParser:
    """A command line with `--write`, `--turns` and `--threads`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--turns", type=int, default=turns)
    parser.add_argument("--threads", type=int, default=threads)
    return parser


def lines_of(
    name: str,
    cases: Sequence[dict[str, Any]],
    only: Sequence[int] | None,
    act: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """The line of every case: measured by `act`, or kept from the committed figures if not in `only`."""
    file = RESULTS / f"{name}.json"
    kept = json.loads(file.read_text())["lines"] if only and file.is_file() else []
    found = []
    for number, case in enumerate(cases):
        same = (line for line in kept if all(line.get(key) == case[key] for key in case.keys() - {"turns"}))
        line = act(case) if not only or number in only else next(same, None)
        found += [] if line is None else [line]
    return found


def told(options: argparse.Namespace, lines: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The figures with what made them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    ran = {"device": device, "threads": options.threads, "turns": options.turns}
    return {**ran, **more, "lines": lines, "versions": versions()}


def show(name: str, result: dict[str, Any], table: str, write: bool) -> None:
    """Prints the table, and puts it into the results if asked."""
    print(table)
    if write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(table)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
