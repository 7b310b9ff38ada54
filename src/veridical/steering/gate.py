"""Steering only where a probe fires: the gate of a conditional vector.

After "Conditional Activation Steering" (Lee et al. 2024, arXiv:2409.05907), with a probe's log-odds in place
of a cosine. The gate sees only what the model has read so far, so prompts that are scored at once and texts
that are generated with a cache are gated alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from veridical.errors import InputError, unknown
from veridical.probes.fits import place_for
from veridical.probes.passes import Passes

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.probes.base import LinearProbe

Keep = Literal["on", "token"]


@dataclass(frozen=True, eq=False)
class Gate:
    """When a conditional vector acts.

    Attributes:
        probe: A fitted probe, which reads at its own site.
        threshold: Log-odds above which it fires.
        keep: "on": from the first token at which it fires to the end of the text; "token": at the tokens at
            which it fires and no others.
    """

    probe: LinearProbe
    threshold: float
    keep: Keep = "on"

    def __post_init__(self) -> None:
        if self.keep not in get_args(Keep):
            raise unknown("way to keep a gate", self.keep, get_args(Keep))
        if self.threshold != self.threshold:
            raise InputError("the threshold of the gate is NaN; expected a number in log-odds")

    def site(self, model: HookedModel, force: bool = False) -> str:
        """Where it reads in `model`, after every check of the probe."""
        return place_for(model, self.probe, force=force)

    def running(self, passes: Passes) -> Gating:
        """Its state over the passes of one context."""
        return Gating(self, passes)


class Gating:
    """Which tokens of the running pass are let through; fed with the values at the probe's site."""

    def __init__(self, gate: Gate, passes: Passes) -> None:
        self.gate, self.passes = gate, passes
        self.weights = torch.as_tensor(gate.probe.coef_[0], dtype=torch.float32)
        self.bias = float(gate.probe.intercept_[0])
        self.open: Tensor | None = None
        self._of: object = None
        self._so_far: Tensor | None = None

    def read(self, value: Tensor) -> None:
        """Takes the values of a pass and decides."""
        now = self.passes.require()
        self.weights = self.weights.to(value.device)
        scores = value.detach().reshape(*value.shape[:2], -1).float() @ self.weights + self.bias
        fires = scores > self.gate.threshold
        real = now.real
        if real is not None:
            fires = fires & real[:, now.past :].to(fires.device)
        if self.gate.keep == "on":
            if not now.first and self._so_far is not None:
                fires = fires | self._so_far
            fires = fires.cumsum(1) > 0
            self._so_far = fires[:, -1:]
        self.open, self._of = fires, now

    def choose(self) -> Tensor:
        """`[rows, tokens]` bool, of the running pass."""
        if self.open is None or self._of is not self.passes.current:
            raise InputError(
                f"the gate's site {self.gate.probe.site} was not reached before the steered one; "
                "steer at or behind the probe's site"
            )
        return self.open
