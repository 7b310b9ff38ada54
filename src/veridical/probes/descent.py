"""Many smooth problems minimised side by side by L-BFGS.

Nocedal and Wright, Numerical Optimization, 2nd ed., algorithms 7.4 and 7.5.
Every column of the unknowns is a problem of its own with its own step length, history and end, so that a
problem gets the same steps alone as among many; the function is evaluated for all that still run at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HISTORY = 10
"""Pairs of steps and gradient changes that are kept."""


@dataclass(frozen=True)
class Reached:
    """Where the descent ended: `points` `[d, k]`, `values`, `steps` and `converged` `[k]`."""

    points: Tensor
    values: Tensor
    steps: Tensor
    converged: Tensor


def minimise(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    max_steps: int,
    tol: float = 1e-7,
) -> Reached:
    """Descends from `start` `[d, k]` until each gradient is small.

    Args:
        function: Points `[d, j]` and numbers `[j]` of their problems to values `[j]`, gradients `[d, j]`.
        start: One starting point per problem.
        max_steps: Steps at most.
        tol: Norm of the gradient at which a problem is solved, relative to the larger of the first one and 1.
    """
    k = start.shape[1]
    active = torch.arange(k, device=start.device)
    x = start.clone()
    value, gradient = function(x, active)
    points, values = x.clone(), value.clone()
    steps = torch.zeros(k, dtype=torch.int64, device=start.device)
    converged = torch.zeros(k, dtype=torch.bool, device=start.device)
    wanted = tol * gradient.norm(dim=0).clamp_min(1)
    moves: list[Tensor] = []
    changes: list[Tensor] = []
    stuck = torch.zeros_like(converged)
    for number in range(max_steps + 1):
        solved = gradient.norm(dim=0) <= wanted
        points[:, active], values[active] = x, value
        converged[active] = solved
        ended = solved | stuck[active]
        if bool(ended.all()) or number == max_steps:
            break
        if bool(ended.any()):
            keep = ~ended
            active, x, value, gradient, wanted = (
                active[keep], x[:, keep], value[keep], gradient[:, keep], wanted[keep],
            )  # fmt: skip
            moves, changes = [m[:, keep] for m in moves], [c[:, keep] for c in changes]
        step = -_curved(gradient, moves, changes)
        slope = (gradient * step).sum(0)
        # Where the history misleads (the function need not be convex), the gradient is followed.
        step = torch.where(slope < 0, step, -gradient)
        slope = torch.where(slope < 0, slope, -gradient.square().sum(0))
        moved, after, turned = _shortened(function, active, x, step, slope, value, gradient)
        stuck[active] = (moved == x).all(0)
        moves.append(moved - x)
        changes.append(turned - gradient)
        moves, changes = moves[-HISTORY:], changes[-HISTORY:]
        x, value, gradient = moved, after, turned
        steps[active] += 1
    return Reached(points, values, steps, converged)


def _curved(gradient: Tensor, moves: list[Tensor], changes: list[Tensor]) -> Tensor:
    """The gradient times the inverse Hessian that the history suggests (two-loop recursion)."""
    if not moves:
        return gradient / gradient.norm(dim=0).clamp_min(1)
    products = [(m * c).sum(0) for m, c in zip(moves, changes)]
    # A pair without positive curvature is left out, column by column.
    rates = [
        torch.where(p > 1e-12 * c.square().sum(0), 1 / p.clamp_min(1e-300), 0.0)
        for p, c in zip(products, changes)
    ]
    direction, parts = gradient.clone(), []
    for move, change, rate in zip(reversed(moves), reversed(changes), reversed(rates)):
        part = rate * (move * direction).sum(0)
        direction -= part * change
        parts.append(part)
    scale = torch.where(rates[-1] > 0, products[-1] / changes[-1].square().sum(0).clamp_min(1e-300), 1.0)
    direction *= scale
    for move, change, rate, part in zip(moves, changes, rates, reversed(parts)):
        direction += (part - rate * (change * direction).sum(0)) * move
    return direction


def _shortened(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    active: Tensor,
    x: Tensor,
    step: Tensor,
    slope: Tensor,
    value: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Points after steps halved until the value falls enough (Armijo); where it never does, none is taken."""
    size = torch.ones_like(value)
    moved, after, turned = x.clone(), value.clone(), gradient.clone()
    trying = torch.arange(len(value), device=x.device)
    for _ in range(30):
        point = x[:, trying] + size[trying] * step[:, trying]
        found, bent = function(point, active[trying])
        enough = found <= value[trying] + 1e-4 * size[trying] * slope[trying] + 1e-15
        taken = trying[enough]
        moved[:, taken], after[taken], turned[:, taken] = point[:, enough], found[enough], bent[:, enough]
        trying = trying[~enough]
        if not len(trying):
            break
        size[trying] /= 2
    return moved, after, turned
