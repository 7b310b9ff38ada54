"""Figures of a training sent to trackio or wandb, one run for each member. Off unless asked for.

Both are extras with one interface: `init` gives a run object that is logged to beside others in the same
process. A tracker that fails while training goes on is said once and left alone: figures are kept in the
result anyway.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from veridical.errors import InputError, unknown

log = logging.getLogger(__name__)
TRACKERS = ("trackio", "wandb")


class Tracking:
    """Runs of one training at a tracker.

    Args:
        tracker: `trackio` or `wandb`.
        project: Project that the runs are put into.
        configs: Config of each member by name, as plain JSON values.
        store: Identity of the store that the training resumes from: a resumed training goes on in the same
            runs. Without one, every training makes runs of its own.

    Raises:
        UnknownNameError: Another tracker.
        InputError: It is not installed; gives the line that installs it.
    """

    def __init__(
        self, tracker: str, project: str, configs: Mapping[str, Mapping[str, Any]], store: str | None = None
    ) -> None:
        if tracker not in TRACKERS:
            raise unknown("tracker", tracker, TRACKERS)
        try:
            self._module = importlib.import_module(tracker)
        except ImportError as error:
            raise InputError(
                f"{tracker} is not installed; install it with: pip install 'veridical[{tracker}]'"
            ) from error
        self._tracker, self._project, self._configs, self._store = tracker, project, configs, store
        self._runs: dict[str, Any] = {}
        self._failed = False

    def log(self, name: str, tokens: int, figures: Mapping[str, float]) -> None:
        """Adds figures of a member after so many tokens; what is not finite is left out."""
        sound = {key: value for key, value in figures.items() if math.isfinite(value)}
        self._try(lambda: self._run(name).log({"tokens": tokens, **sound}, step=tokens))

    def finish(self, name: str, tokens: int, figures: Mapping[str, float], cancelled: bool) -> None:
        """Adds a member's last figures and ends its run."""
        self.log(name, tokens, {**figures, "cancelled": float(cancelled)})
        run = self._runs.pop(name, None)
        if run is not None:
            self._try(run.finish)

    def _run(self, name: str) -> Any:
        if name not in self._runs:
            self._runs[name] = self._begin(name)
        return self._runs[name]

    def _begin(self, name: str) -> Any:
        shared = {"project": self._project, "name": name, "config": dict(self._configs[name])}
        resume = "never" if self._store is None else "allow"
        if self._tracker == "trackio":
            return self._module.init(**shared, resume=resume)
        # Several wandb runs at once in one process need create_new; the id is what a run is resumed by.
        identity = {} if self._store is None else {"id": f"{self._store}-{_plain(name)}", "resume": resume}
        return self._module.init(**shared, **identity, reinit="create_new")

    def _try(self, act: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:
            self._failed = True
            log.warning(
                "%s failed (%s: %s); training goes on without it", self._tracker, type(error).__name__, error
            )


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)
