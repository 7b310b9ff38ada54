"""Exact L2-regularised logistic regression for many problems that share one design matrix.

A sweep asks for hundreds of fits on the same activations: folds (row weights of 0 and 1), strengths,
shuffled labels.
All share their rows, so they are solved side by side, one column each:

    minimise over (w, b)   C * sum_i m_i log(1 + exp(-y_i (x_i . w + b))) + |w|^2 / 2

which is scikit-learn's objective (the sum of losses times C, the intercept free). The design is first
rotated without
loss: with fewer rows than columns the solution lies in the row space (representer theorem), so a QR of the
transpose replaces [rows, d] by [rows, rows]; then the eigenvectors of the Gram matrix make the columns
orthogonal, so that a diagonal is nearly the inverse Hessian. Each Newton step (IRLS) is solved by conjugate
gradients preconditioned with that diagonal (Nocedal and Wright, Numerical Optimization, 2nd ed., algorithm
7.1), which costs two matrix products shared by all problems in place of one Hessian per problem. Everything
is float64 and runs on the device of the design. The solver asks a design only for products, so that its rows
may also be read from a store for each of them (see `streamed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Rows times problems held at once; about eight float64 arrays of this size (32 MiB each) are alive."""
Pull = Callable[[slice, Tensor], Tensor]
"""Which rows, and their readings `[c, k]`, to weights `[c, j]` of these rows."""


@dataclass(frozen=True)
class Design:
    """Standardised rows in a rotated basis, ready for many fits.

    Attributes:
        rows: `[n, r + 1]` float64; orthogonal columns, and a last column of ones for the intercept.
        basis: `[d, r]` orthonormal columns, so that standardised x = basis @ rotated x on the span of the
            rows.
        mean: `[d]`, subtracted before scaling.
        scale: `[d]`, standard deviations (1 for constant columns).
        second_moment: `[r + 1]`, mean square of each column of `rows`.
    """

    rows: Tensor
    basis: Tensor
    mean: Tensor
    scale: Tensor
    second_moment: Tensor

    held: ClassVar[bool] = True
    """Whether all rows are in memory."""

    @classmethod
    def of(cls, x: Tensor, standardise: bool = True) -> Design:
        """Prepares `x`, `[n, d]`; the statistics are those of these rows alone."""
        x = x.to(torch.float64)
        mean = x.mean(0)
        centred = x - mean
        spread, constant = spread_of(centred.square().mean(0), mean, len(x))
        scale = spread if standardise else torch.ones_like(mean)
        # In place: a site may be as large as a few copies leave room for.
        rotated, basis = _rotate(centred.div_(scale).masked_fill_(constant, 0.0))
        rows = torch.cat([rotated, rotated.new_ones(len(rotated), 1)], 1)
        return cls(rows, basis, mean, scale, rows.square().mean(0))

    @property
    def device(self) -> torch.device:
        """Where products are computed."""
        return self.rows.device

    @property
    def height(self) -> int:
        """Rows that are in memory at once."""
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def readings(self, v: Tensor) -> Iterable[tuple[slice, Tensor]]:
        """`rows @ v` for `v` `[r + 1, k]`: which rows, and their readings; one part or several."""
        return [(slice(None), self.rows @ v)]

    def through(self, v: Tensor, pull: Pull) -> Tensor:
        """`rows.T @ pull(rows @ v)`, `[r + 1, j]`; every row is read once."""
        return self.rows.T @ pull(slice(None), self.rows @ v)

    def sums(self, weights: Callable[[slice], Tensor]) -> Tensor:
        """`rows.T @ weights` `[r + 1, j]`, where `weights` gives those of some rows."""
        nothing = self.second_moment.new_zeros(len(self.second_moment), 0)
        return self.through(nothing, lambda at, _: weights(at))

    def gram(self, weights: Tensor, about: Tensor | None = None) -> Tensor:
        """`(rows - about).T @ diag(weights) @ (rows - about)`, `[r + 1, r + 1]`.

        Args:
            weights: `[n]`, of any sign; rows of weight 0 cost nothing.
            about: `[r + 1]`, with 0 in the last place.
        """
        weights = weights.to(torch.float64)
        changed = torch.nonzero(weights)[:, 0]
        rows = self.rows[changed] if about is None else self.rows[changed] - about
        return rows.T @ (weights[changed, None] * rows)

    @cached_property
    def squares(self) -> Tensor:
        """Squared length of each row without the intercept's column, `[n]`."""
        return self.rows[:, :-1].square().sum(1)

    def raw(self, solution: Tensor) -> tuple[Tensor, Tensor]:
        """Solutions `[r + 1, k]` as coefficients `[k, d]` and intercepts `[k]` on raw activations."""
        coefficients = (self.basis @ solution[:-1]).T / self.scale
        return coefficients, solution[-1] - coefficients @ self.mean


@dataclass(frozen=True)
class Solution:
    """Solved problems: `weights` `[r + 1, k]` in the design's basis, Newton steps, what converged."""

    weights: Tensor
    steps: Tensor
    converged: Tensor


def spread_of(variance: Tensor, mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Standard deviations of columns, 1 where a column is constant up to rounding, and which are."""
    eps = torch.finfo(torch.float64).eps
    # The variance that rounding alone can give a constant column (Chan, Golub and LeVeque 1983).
    constant = variance <= count * eps * variance + (count * mean * eps) ** 2
    return torch.where(constant, 1.0, variance.sqrt()), constant


def totals(targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of the positive rows of each problem, and of the negative ones, `[k]` float64 each."""
    positive = torch.zeros(targets.shape[1], dtype=torch.float64, device=targets.device)
    negative = torch.zeros_like(positive)
    for t, m in zip(*(part.split(_at_once(targets.shape[1])) for part in (targets, weights))):
        t, m = t.to(torch.float64), m.to(torch.float64)
        positive += (m * t).sum(0)
        negative += (m * (1 - t)).sum(0)
    return positive, negative


def _at_once(length: int) -> int:
    """How many columns (or rows) of so many elements are worked on at once."""
    return max(1, CHUNK_ELEMENTS // max(1, length))


def solve(
    design: Design,
    targets: Tensor,
    weights: Tensor,
    strengths: Tensor,
    *,
    start: Tensor | None = None,
    tol: float = 1e-6,
    max_steps: int = 100,
) -> Solution:
    """Solves `k` problems at once.

    Args:
        design: The rows that all problems share.
        targets: `[n, k]`, 1 for the positive class and 0 for the other; of any type.
        weights: `[n, k]`, weight of each row in each problem; 0 leaves the row out. Of any type.
        strengths: `[k]`, scikit-learn's C.
        start: `[r + 1, k]`, such as the solution at the strength before.
        tol: Gradient norm at which a problem counts as solved, relative to |w|. The penalty makes the
            objective 1-strongly convex in w, so this bounds the relative error of w.
        max_steps: Newton steps at most.
    """
    width = _at_once(max(design.height, len(design.second_moment)))
    parts = []
    for first in range(0, targets.shape[1], width):
        columns = slice(first, first + width)
        begin = None if start is None else start[:, columns]
        fits = _Fits.of(design, targets[:, columns], weights[:, columns], strengths[columns])
        parts.append(_newton(fits, begin, tol, max_steps))
    return Solution(
        torch.cat([part.weights for part in parts], 1),
        torch.cat([part.steps for part in parts]),
        torch.cat([part.converged for part in parts]),
    )


def _rotate(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in the eigenbasis of its Gram matrix, and the basis; orthogonal steps only, so nothing is lost."""
    basis = None
    if x.shape[0] < x.shape[1]:
        basis, triangle = torch.linalg.qr(x.T)
        x = triangle.T
    _, vectors = torch.linalg.eigh(x.T @ x)
    return x @ vectors, vectors if basis is None else basis @ vectors


@dataclass(frozen=True)
class _Point:
    """Where the problems stand: `[r + 1, k]`, objectives `[k]`, gradients, and the sum of the losses' second
    derivatives `[k]`; those of each row `[n, k]` where rows are in memory."""

    w: Tensor
    value: Tensor
    gradient: Tensor
    bend: Tensor
    curvature: Tensor | None

    def pick(self, keep: Tensor) -> _Point:
        curvature = None if self.curvature is None else self.curvature[:, keep]
        return _Point(self.w[:, keep], self.value[keep], self.gradient[:, keep], self.bend[keep], curvature)


@dataclass(frozen=True)
class _Fits:
    """Objectives of several problems on one design."""

    design: Design
    targets: Tensor
    weights: Tensor
    strengths: Tensor
    penalty: Tensor

    @classmethod
    def of(cls, design: Design, targets: Tensor, weights: Tensor, strengths: Tensor) -> _Fits:
        penalty = torch.ones_like(design.second_moment)[:, None]
        penalty[-1] = 0
        targets, weights = targets.to(design.device), weights.to(design.device)
        return cls(design, targets, weights, strengths.to(penalty), penalty)

    def pick(self, keep: Tensor) -> _Fits:
        columns = self.targets[:, keep], self.weights[:, keep], self.strengths[keep]
        return _Fits(self.design, *columns, self.penalty)

    def at(self, w: Tensor) -> _Point:
        """Objectives and gradients at `w` `[r + 1, k]`, from one pass over the rows."""
        value, bend, kept = w.new_zeros(w.shape[1]), w.new_zeros(w.shape[1]), []

        def pull(at: slice, z: Tensor) -> Tensor:
            targets, losses = self._part(at)
            p = torch.sigmoid(z)
            loss = torch.nn.functional.softplus((1 - 2 * targets) * z, threshold=700.0)
            curvature = losses * p * (1 - p)
            value.add_((losses * loss).sum(0))
            bend.add_(curvature.sum(0))
            if self.design.held:
                kept.append(curvature)
            return losses * (p - targets)

        gradient = self.design.through(w, pull) + self.penalty * w
        value += 0.5 * (self.penalty * w.square()).sum(0)
        return _Point(w, value, gradient, bend, kept[0] if kept else None)

    def bent(self, point: _Point, direction: Tensor) -> Tensor:
        """Hessians at a point times `direction` `[r + 1, k]`."""
        kept, k = point.curvature, direction.shape[1]
        if kept is not None:
            curved = self.design.through(direction, lambda _, along: kept * along)
            return curved + self.penalty * direction

        def pull(at: slice, read: Tensor) -> Tensor:
            _, losses = self._part(at)
            p = torch.sigmoid(read[:, :k])
            return losses * p * (1 - p) * read[:, k:]

        # Second derivatives of all rows are as large as the labels; they are computed again with each chunk.
        return self.design.through(torch.cat([point.w, direction], 1), pull) + self.penalty * direction

    def _part(self, at: slice) -> tuple[Tensor, Tensor]:
        """Targets and weighted strengths of some rows, `[c, k]` float64."""
        return self.targets[at].to(torch.float64), self.weights[at].to(torch.float64) * self.strengths


def _newton(fits: _Fits, start: Tensor | None, tol: float, max_steps: int) -> Solution:
    k, device = fits.targets.shape[1], fits.design.device
    solved = torch.zeros(len(fits.penalty), k, dtype=torch.float64, device=device)
    if start is None:
        solved[-1] = _log_odds(fits)
    else:
        solved[:] = start
    steps = torch.zeros(k, dtype=torch.int64, device=device)
    converged = torch.zeros(k, dtype=torch.bool, device=device)
    active = torch.arange(k, device=device)
    point, first_norm = fits.at(solved.clone()), None
    for number in range(max_steps + 1):
        norm = point.gradient.norm(dim=0)
        first_norm = norm.clone() if first_norm is None else first_norm
        done = norm <= tol * point.w[:-1].norm(dim=0) + 1e-12 * first_norm + 1e-14
        solved[:, active] = point.w
        converged[active] = done
        if bool(done.all()) or number == max_steps:
            break
        if bool(done.any()):
            keep = ~done
            fits, point = fits.pick(keep), point.pick(keep)
            active, norm, first_norm = active[keep], norm[keep], first_norm[keep]
        point = _line_search(fits, point, _conjugate_gradients(fits, point, norm, first_norm))
        steps[active] += 1
    return Solution(solved, steps, converged)


def _conjugate_gradients(fits: _Fits, point: _Point, norm: Tensor, first_norm: Tensor) -> Tensor:
    """Newton directions `[r + 1, k]`, to a residual that shrinks with the gradient (superlinear)."""
    second_moment = fits.design.second_moment[:, None]
    inverse = 1 / (second_moment * point.bend.clamp_min(1e-12) + fits.penalty)
    wanted = norm * (norm / first_norm.clamp_min(1e-300)).sqrt().clamp(max=0.1)
    step = torch.zeros_like(point.gradient)
    residual = -point.gradient
    scaled = inverse * residual
    direction = scaled.clone()
    product = (residual * scaled).sum(0)
    for _ in range(2 * len(step)):
        bent = fits.bent(point, direction)
        running = residual.norm(dim=0) > wanted
        length = torch.where(running, product / (direction * bent).sum(0).clamp_min(1e-300), 0.0)
        step += length * direction
        residual -= length * bent
        if not bool((residual.norm(dim=0) > wanted).any()):
            break
        scaled = inverse * residual
        following = (residual * scaled).sum(0)
        direction = scaled + (following / product.clamp_min(1e-300)) * direction
        product = following
    return step


def _line_search(fits: _Fits, point: _Point, step: Tensor) -> _Point:
    """Where the steps lead, halved until each objective falls enough (Armijo); the whole step nearly always
    does, and its gradient is the next one."""
    slope = (point.gradient * step).sum(0)
    size = torch.ones_like(slope)
    found = fits.at(point.w + step)
    for _ in range(40):
        short = found.value > point.value + 1e-4 * size * slope + 1e-12 * point.value.abs()
        if not bool(short.any()):
            break
        size = torch.where(short, size / 2, size)
        found = fits.at(point.w + size * step)
    return found


def _log_odds(fits: _Fits) -> Tensor:
    """The intercept that fits the class shares alone, `[k]`: a good start."""
    positive, negative = totals(fits.targets, fits.weights)
    share = (positive / (positive + negative).clamp_min(1e-300)).clamp(1e-6, 1 - 1e-6)
    return torch.log(share) - torch.log1p(-share)
