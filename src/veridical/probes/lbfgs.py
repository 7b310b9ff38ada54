"""L-BFGS for many problems side by side, one column each.

Each column has its own curvature history, step size and end, so that a column's result does not depend on
which others are solved with it (up to rounding); products with the shared rows are made once for all. Adam
was not taken: it has a learning rate to choose and no natural end.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch import Tensor

HISTORY = 10
"""Steps whose curvature is remembered (Nocedal and Wright, Numerical Optimization, 2nd ed., section 7.2)."""
PATIENCE = 5
"""Steps over which the objective must have fallen."""
HALVINGS = 25


class Problem(Protocol):
    """`k` objectives of the form f(readings(w)) + penalty(w), where the readings are linear in w `[p, k]`."""

    inverse: Tensor
    """`[p, k]`, a rough inverse of the diagonal of the Hessian."""

    def readings(self, w: Tensor) -> Tensor:
        """What the rows say of the parameters; linear."""
        ...

    def value(self, readings: Tensor, w: Tensor) -> tuple[Tensor, Any]:
        """Objectives `[k]`, and what `gradient` needs of them."""
        ...

    def gradient(self, kept: Any, w: Tensor) -> Tensor:
        """Gradients `[p, k]` at the point of the last value."""
        ...

    def pick(self, columns: Tensor) -> Self:
        """Some of the columns, by a mask."""
        ...


def minimise(problem: Any, start: Tensor, tol: float, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Solutions `[p, k]`, steps `[k]`, and which converged `[k]`.

    A column is done when its objective fell by less than `tol` of itself over `PATIENCE` steps, or when no
    step along its direction and none along the preconditioned gradient makes it fall. (At a maximum over
    tokens the objective has kinks, where no gradient vanishes; falling is what can be tested.)

    Args:
        problem: A `Problem`.
        start: `[p, k]`.
        tol: Relative fall of the objective.
        max_steps: Steps at most.
    """
    k = start.shape[1]
    solved, steps = start.clone(), torch.zeros(k, dtype=torch.int64, device=start.device)
    converged = torch.zeros(k, dtype=torch.bool, device=start.device)
    active = torch.arange(k, device=start.device)
    w, z = start, problem.readings(start)
    value, kept = problem.value(z, w)
    gradient = problem.gradient(kept, w)
    past = value.new_full((PATIENCE, k), float("inf"))
    stuck = torch.zeros_like(converged)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(max_steps):
        step, slope = _direction(problem.inverse, gradient, history)
        along = problem.readings(step)
        size, value, kept, failed = _line_search(problem, w, z, step, along, value, slope)
        w, z = w + size * step, z + size * along
        steps[active] += 1
        before = gradient
        gradient = problem.gradient(kept, w)
        history = _remember(history, size * step, gradient - before, failed)
        # A column that could not fall gets one more try, from the gradient alone.
        done = (past[0] - value <= tol * value.abs()) | (failed & stuck)
        stuck = failed
        past = torch.cat([past[1:], value[None]])
        solved[:, active] = w
        converged[active] = done
        if bool(done.all()):
            break
        if bool(done.any()):
            keep = ~done
            problem = problem.pick(keep)
            active, w, value, gradient = active[keep], w[:, keep], value[keep], gradient[:, keep]
            z, past, stuck = z[..., keep], past[:, keep], stuck[keep]
            history = [(s[:, keep], y[:, keep], rho[keep]) for s, y, rho in history]
    return solved, steps, converged


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
    plain = slope >= 0
    if bool(plain.any()):
        q = torch.where(plain, inverse * gradient, q)
        slope = -(gradient * q).sum(0)
    return -q, slope


def _line_search(
    problem: Any, w: Tensor, z: Tensor, step: Tensor, along: Tensor, value: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Sizes `[k]` by halving until each objective falls enough (Armijo), the values there, and which failed.

    Readings are linear in the parameters, so a trial costs a pooling and no matrix product.
    """
    size = torch.ones_like(slope)
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
