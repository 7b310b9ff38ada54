"""L-BFGS for many problems side by side, one column each.

Nocedal and Wright, Numerical Optimization, 2nd ed., algorithms 7.4 and 7.5. Each column has its own curvature
history, step size and end, so that a column's result does not depend on which others are solved with it (up
to rounding); products with the shared rows are made once for all. Adam was not taken: it has a learning rate
to choose and no natural end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

HISTORY = 10
"""Steps whose curvature is remembered."""
PATIENCE = 5
"""Steps over which the objective must have fallen."""
HALVINGS = 30


class Problem(Protocol):
    """`k` objectives of the form f(readings(w)) + penalty(w), where the readings are linear in w `[p, k]`."""

    @property
    def inverse(self) -> Tensor:
        """`[p, k]` or `[1, k]`, a rough inverse of the diagonal of the Hessian."""
        ...

    def readings(self, w: Tensor, /) -> Tensor:
        """What the rows say of the parameters, `[..., k]`; linear."""
        ...

    def value(self, readings: Tensor, w: Tensor, /) -> tuple[Tensor, Any]:
        """Objectives `[k]`, and what `gradient` needs of them."""
        ...

    def gradient(self, kept: Any, w: Tensor, /) -> Tensor:
        """Gradients `[p, k]` at the point of the last value."""
        ...

    def pick(self, columns: Tensor, /) -> Self:
        """Some of the columns, by a mask."""
        ...


@dataclass(frozen=True)
class Reached:
    """Where the search ended: `points` `[p, k]`, `values`, `steps` and `converged` `[k]`."""

    points: Tensor
    values: Tensor
    steps: Tensor
    converged: Tensor


def minimise(
    problem: Problem, start: Tensor, max_steps: int, *, fall: float | None = None, norm: float | None = None
) -> Reached:
    """Descends from `start` until each column is done.

    A column ends where no step along its direction and none along the preconditioned gradient makes its
    objective fall. That is a minimum if the objective has kinks (as a maximum over tokens has), where no
    gradient vanishes; so it counts as converged by `fall`, and not by `norm`.

    Args:
        problem: The objectives.
        start: `[p, k]`.
        max_steps: Steps at most.
        fall: A column is done when its objective fell by less than this share of itself over `PATIENCE`
            steps; for objectives with kinks.
        norm: A column is done when the norm of its gradient is at most this, relative to the larger of the
            first one and 1; for smooth objectives.
    """
    k = start.shape[1]
    active = torch.arange(k, device=start.device)
    w, z = start, problem.readings(start)
    value, kept = problem.value(z, w)
    gradient = problem.gradient(kept, w)
    reached = Reached(
        start.clone(), value.clone(), torch.zeros_like(active), torch.zeros_like(active, dtype=torch.bool)
    )
    wanted = (norm or 0.0) * gradient.norm(dim=0).clamp_min(1)
    past = value.new_full((PATIENCE, k), float("inf"))
    failed = stuck = torch.zeros_like(reached.converged)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for number in range(max_steps + 1):
        small = gradient.norm(dim=0) <= wanted
        # A column that could not fall gets one more try, from the gradient alone.
        given_up = failed & stuck
        done = small | given_up
        if fall is not None:
            done |= past[0] - value <= fall * value.abs()
        reached.points[:, active], reached.values[active] = w, value
        reached.converged[active] = small if fall is None else done
        if bool(done.all()) or number == max_steps:
            break
        past, stuck = torch.cat([past[1:], value[None]]), failed
        if bool(done.any()):
            keep = ~done
            problem = problem.pick(keep)
            active, w, value, gradient = active[keep], w[:, keep], value[keep], gradient[:, keep]
            z, past, stuck, wanted = z[..., keep], past[:, keep], stuck[keep], wanted[keep]
            history = [(s[:, keep], y[:, keep], rho[keep]) for s, y, rho in history]
        step, slope = _direction(problem.inverse, gradient, history)
        along = problem.readings(step)
        size, value, kept, failed = _line_search(problem, w, z, step, along, value, slope)
        w, z = w + size * step, z + size * along
        before, gradient = gradient, problem.gradient(kept, w)
        history = _remember(history, size * step, gradient - before, failed)
        reached.steps[active] += 1
    return reached


def _direction(
    inverse: Tensor, gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Directions `[p, k]` of descent by the two-loop recursion, and the slopes `[k]` along them."""
    q, shares = gradient.clone(), []
    for s, y, rho in reversed(history):
        share = rho * (s * q).sum(0)
        q -= share * y
        shares.append(share)
    q *= inverse
    if history:
        _, y, rho = history[-1]
        bent = (y * inverse * y).sum(0) * rho
        q *= torch.where(bent > 0, 1 / bent.clamp_min(1e-300), 1.0)
    for (s, y, rho), share in zip(history, reversed(shares)):
        q += s * (share - rho * (y * q).sum(0))
    slope = -(gradient * q).sum(0)
    # Where the history misleads (the objective need not be convex), the gradient is followed.
    plain = slope >= 0
    if bool(plain.any()):
        q = torch.where(plain, inverse * gradient, q)
        slope = -(gradient * q).sum(0)
    return -q, slope


def _line_search(
    problem: Problem, w: Tensor, z: Tensor, step: Tensor, along: Tensor, value: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Sizes `[k]` by halving until each objective falls enough (Armijo), the values there, and which failed.

    Readings are linear in the parameters, so a trial costs no matrix product.
    """
    size = torch.ones_like(slope)
    value = value + 1e-15 * value.abs()  # rounding is no rise
    found, kept = problem.value(z + along, w + step)
    for _ in range(HALVINGS):
        short = ~(found <= value + 1e-4 * size * slope)
        if not bool(short.any()):
            return size, found, kept, short
        size = torch.where(short, size / 2, size)
        found, kept = problem.value(z + size * along, w + size * step)
    short = ~(found <= value + 1e-4 * size * slope)
    size = torch.where(short, 0.0, size)
    found, kept = problem.value(z + size * along, w + size * step)
    return size, found, kept, short


def _remember(
    history: list[tuple[Tensor, Tensor, Tensor]], s: Tensor, y: Tensor, failed: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The history with one more step; steps without positive curvature count for nothing (rho = 0)."""
    curvature = (s * y).sum(0)
    sound = curvature > 1e-10 * s.norm(dim=0) * y.norm(dim=0)
    rho = torch.where(sound, 1 / torch.where(sound, curvature, 1.0), 0.0)
    kept = [*history[-(HISTORY - 1) :], (s, y, rho)]
    return [(s, y, torch.where(failed, 0.0, rho)) for s, y, rho in kept]
