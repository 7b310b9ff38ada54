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
is float64 and runs on the device of the design.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Rows times problems held at once; about eight float64 arrays of this size (32 MiB each) are alive."""


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

    @classmethod
    def of(cls, x: Tensor, standardise: bool = True) -> Design:
        """Prepares `x`, `[n, d]`; the statistics are those of these rows alone."""
        x = x.to(torch.float64)
        mean = x.mean(0)
        centred = x - mean
        spread, constant = deviations(centred, mean)
        scale = spread if standardise else torch.ones_like(mean)
        rotated, basis = _rotate(torch.where(constant, 0.0, centred / scale))
        rows = torch.cat([rotated, rotated.new_ones(len(rotated), 1)], 1)
        return cls(rows, basis, mean, scale, rows.square().mean(0))

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


def deviations(centred: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations of centred columns, 1 where a column is constant up to rounding, and which are."""
    variance = centred.square().mean(0)
    eps = torch.finfo(torch.float64).eps
    # The variance that rounding alone can give a constant column (Chan, Golub and LeVeque 1983).
    constant = variance <= len(centred) * eps * variance + (len(centred) * mean * eps) ** 2
    return torch.where(constant, 1.0, variance.sqrt()), constant


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
        targets: `[n, k]`, 1 for the positive class and 0 for the other.
        weights: `[n, k]`, weight of each row in each problem; 0 leaves the row out.
        strengths: `[k]`, scikit-learn's C.
        start: `[r + 1, k]`, such as the solution at the strength before.
        tol: Gradient norm at which a problem counts as solved, relative to |w|. The penalty makes the
            objective 1-strongly convex in w, so this bounds the relative error of w.
        max_steps: Newton steps at most.
    """
    n, k = targets.shape
    width = max(1, CHUNK_ELEMENTS // max(n, design.rows.shape[1]))
    parts = []
    for first in range(0, k, width):
        columns = slice(first, first + width)
        begin = None if start is None else start[:, columns]
        parts.append(
            _newton(
                design, targets[:, columns], weights[:, columns], strengths[columns], begin, tol, max_steps
            )
        )
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


def _newton(
    design: Design,
    targets: Tensor,
    weights: Tensor,
    strengths: Tensor,
    start: Tensor | None,
    tol: float,
    max_steps: int,
) -> Solution:
    rows = design.rows
    targets, losses = targets.to(rows), weights.to(rows) * strengths.to(rows)
    k = targets.shape[1]
    penalty = rows.new_ones(rows.shape[1], 1)
    penalty[-1] = 0
    solved = rows.new_zeros(rows.shape[1], k) if start is None else start.clone()
    if start is None:
        solved[-1] = _log_odds(targets, losses)
    steps = torch.zeros(k, dtype=torch.int64, device=rows.device)
    converged = torch.zeros(k, dtype=torch.bool, device=rows.device)
    active = torch.arange(k, device=rows.device)
    w, t, m = solved.clone(), targets, losses
    z, first_norm = rows @ w, None
    for _ in range(max_steps + 1):
        p = torch.sigmoid(z)
        gradient = rows.T @ (m * (p - t)) + penalty * w
        norm = gradient.norm(dim=0)
        first_norm = norm.clone() if first_norm is None else first_norm
        done = norm <= tol * w[:-1].norm(dim=0) + 1e-12 * first_norm + 1e-14
        solved[:, active] = w
        converged[active] = done
        if bool(done.all()):
            break
        if bool(done.any()):
            keep = ~done
            active, w, t, m, z, p = active[keep], w[:, keep], t[:, keep], m[:, keep], z[:, keep], p[:, keep]
            gradient, norm, first_norm = gradient[:, keep], norm[keep], first_norm[keep]
        curvature = m * p * (1 - p)
        step = _conjugate_gradients(
            rows, curvature, penalty, design.second_moment, gradient, norm, first_norm
        )
        along = rows @ step
        size = _line_search(z, along, t, m, w, step, gradient, penalty)
        w, z = w + size * step, z + size * along
        steps[active] += 1
    return Solution(solved, steps, converged)


def _conjugate_gradients(
    rows: Tensor,
    curvature: Tensor,
    penalty: Tensor,
    second_moment: Tensor,
    gradient: Tensor,
    norm: Tensor,
    first_norm: Tensor,
) -> Tensor:
    """Newton directions `[r + 1, k]`, to a residual that shrinks with the gradient (superlinear)."""
    inverse = 1 / (second_moment[:, None] * curvature.sum(0).clamp_min(1e-12) + penalty)
    wanted = norm * (norm / first_norm.clamp_min(1e-300)).sqrt().clamp(max=0.1)
    step = torch.zeros_like(gradient)
    residual = -gradient
    scaled = inverse * residual
    direction = scaled.clone()
    product = (residual * scaled).sum(0)
    for _ in range(2 * rows.shape[1]):
        bent = rows.T @ (curvature * (rows @ direction)) + penalty * direction
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


def _line_search(
    z: Tensor,
    along: Tensor,
    targets: Tensor,
    losses: Tensor,
    w: Tensor,
    step: Tensor,
    gradient: Tensor,
    penalty: Tensor,
) -> Tensor:
    """Step sizes `[k]` by halving until the objective falls enough (Armijo); no matrix product is needed."""
    sign = 1 - 2 * targets

    def objective(size: Tensor) -> Tensor:
        loss = losses * torch.nn.functional.softplus(sign * (z + size * along), threshold=700.0)
        return loss.sum(0) + 0.5 * (penalty * (w + size * step).square()).sum(0)

    size = w.new_ones(w.shape[1])
    before = objective(torch.zeros_like(size))
    slope = (gradient * step).sum(0)
    for _ in range(40):
        short = objective(size) > before + 1e-4 * size * slope + 1e-12 * before.abs()
        if not bool(short.any()):
            break
        size = torch.where(short, size / 2, size)
    return size


def _log_odds(targets: Tensor, losses: Tensor) -> Tensor:
    """The intercept that fits the class shares alone, `[k]`: a good start."""
    positive = (losses * targets).sum(0)
    total = losses.sum(0)
    share = (positive / total.clamp_min(1e-300)).clamp(1e-6, 1 - 1e-6)
    return torch.log(share) - torch.log1p(-share)
