"""How much memory a site may take, and on which device it is solved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from veridical.devices import usable
from veridical.errors import DataError
from veridical.probes.streamed import COLUMN_BYTES

if TYPE_CHECKING:
    from veridical.config import ProbeConfig
    from veridical.probes.data import Source, Task

log = logging.getLogger("veridical")

COPIES = 6
"""Float64 matrices of a site that its design takes: four are alive at once, 5.6 were measured at the peak."""
STREAMING = "logistic, ridge, mass_mean and lda"
"""Estimators that can read a site in chunks."""


@dataclass
class Room:
    """Memory in bytes for one site, and the device it is on (None: where the activations are)."""

    memory: int
    device: torch.device | None
    said: bool = False

    @classmethod
    def of(cls, config: ProbeConfig) -> Room:
        """What the options allow.

        Raises:
            DataError: No memory.
            ConfigError: A device that is not there or has no float64.
        """
        if not 0 < config.memory_gb < float("inf"):
            raise DataError(f"memory_gb is {config.memory_gb}; expected a number above 0")
        device = config.solve_on
        return cls(
            int(config.memory_gb * 1e9),
            None if device is None else usable(device, "solve_on", torch.float64),
        )

    def columns(self, rows: int) -> int:
        """Label sets whose masks and scores of so many rows take a quarter of the memory."""
        return max(1, self.memory // 4 // (2 * COLUMN_BYTES * max(1, rows)))

    def reader(
        self, source: Source, site: str, task: Task, who: str, streams: bool
    ) -> Callable[[np.ndarray], Any]:
        """What gives the vectors of a site at some rows: in memory, or to be read in chunks.

        Raises:
            DataError: The site needs more memory, and what asks for it can't read it in chunks.
        """
        vectors, width = source.count(task.fit), source.width(site)
        needed = COPIES * 8 * vectors * width
        if needed <= self.memory:
            return lambda rows: source.vectors(site, rows, self.device)
        size = (
            f"{vectors:,} fitted vectors of width {width:,} take {needed / 1e9:.3g} GB in float64 with "
            f"{COPIES - 1} copies; memory_gb = {self.memory / 1e9:.3g}"
        )
        if not streams:
            raise DataError(
                f"{who} reads all vectors of a site at once and cannot stream {site}: {size}. Raise "
                f"memory_gb, read fewer tokens, or take an estimator that streams ({STREAMING})"
            )
        if not self.said:
            log.info("streaming %s, and sites of that size, in chunks: %s", site, size)
            self.said = True
        return lambda rows: source.stream(site, rows, self.memory, self.device)
