"""The trainer of the probes that pool token readings in a way that is not linear.

All fits of a sweep at a site (folds, shuffles, strengths) are columns of one batch: one product with the
token rows gives the readings of all, and the pooling runs over them side by side.

    minimise over w   C * sum_i m_i log(1 + exp(-y_i f_i(w))) + |w|^2 / 2,

where i counts sequences, m_i is 0 or 1 (in the fold or not), f_i is the pooled and length-adjusted score on
tokens standardised over all fitted tokens, and intercepts are not penalised. It is convex in none of the
estimators, so where it starts matters: always at the exact solution for the mean over tokens, with no random
number, so that a fit by hand and the same fit in a sweep start and end alike. The token rows of a site are
held in memory: 12 bytes for each feature of each token while folds choose.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError, NonFiniteError
from veridical.probes.base import Problems
from veridical.probes.lbfgs import minimise
from veridical.probes.packed import Layout, SequenceDesign, expected_maximum
from veridical.probes.sequence import SequenceProbe, Sequences
from veridical.probes.solver import CHUNK_ELEMENTS, Design, Solution, solve

CHOOSING_TOL = 1e-3
"""Relative fall over five steps at which a fit ends while folds choose; they are then also in float32."""


@dataclass(frozen=True)
class Pooled:
    """Pooled scores `[n, k]` in packed order, and what the gradient needs of them."""

    scores: Tensor
    kept: Any = None


class PooledProbe(SequenceProbe):
    """Base of the estimators whose pooling needs the batched trainer.

    A file gives `pool` and its gradient `spread`, the state for `running`, and where it is not one reading
    per token, `channels` and `begin`.

    Args:
        C: Inverse strength of the penalty; it multiplies the sum of the losses over sequences.
        standardise: Scale every feature to variance 1 over the fitted tokens before the penalty applies.
        adjust_length: Subtract from each score what as many tokens that say nothing would be expected to
            reach (see `expected`), less the same at the average length, so that sequences that are
            only longer do not score higher. Training differentiates through it.
        tol: Relative fall of the objective over five steps at which a fit ends.
        max_iter: Steps at most.
    """

    extra: ClassVar[tuple[str, ...]] = ("length",)

    def __init__(
        self,
        C: float = 1.0,
        *,
        standardise: bool = True,
        adjust_length: bool = True,
        tol: float = 1e-5,
        max_iter: int = 1000,
    ) -> None:
        super().__init__(C, standardise=standardise)
        self.adjust_length = adjust_length
        self.tol = tol
        self.max_iter = max_iter

    @property
    def channels(self) -> int:
        """Readings per token."""
        return 1

    @abstractmethod
    def pool(self, readings: Tensor, layout: Layout) -> Pooled:
        """Scores `[n, k]` of readings `[tokens, channels, k]`."""

    @abstractmethod
    def spread(self, along: Tensor, readings: Tensor, pooled: Pooled, layout: Layout) -> Tensor:
        """The gradient of `sum(along * scores)` with respect to the readings, of their shape."""

    def growth(
        self, parameters: Tensor, within: Tensor, readings: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What decides how scores grow with length where tokens say nothing: one figure for each problem.

        For a maximum it is the spread of the readings within sequences.

        Args:
            parameters: `[r + 1, channels, k]`.
            within: Covariance of the token rows within sequences, `[r + 1, r + 1]`.
            readings: `[tokens, channels, k]`.

        Returns:
            The figures `[k]`, and their gradients with respect to parameters and readings (None where 0).
        """
        moved = within @ parameters[:, 0]
        spread = (parameters[:, 0] * moved).sum(0).clamp_min(0).sqrt()
        return spread, (moved / torch.where(spread > 0, spread, 1.0))[:, None], None

    def expected(self, lengths: Tensor, typical: float, growth: Tensor) -> tuple[Tensor, Tensor]:
        """Scores that so many tokens that say nothing would reach, less those at the typical length.

        Args:
            lengths: `[n]`.
            typical: Mean length of the fitted sequences.
            growth: `[k]`.

        Returns:
            `[n, k]`, and the derivative with respect to `growth`, `[n, k]` or `[n, 1]`.
        """
        away = self.beyond(lengths, typical)[:, None]
        return away * growth, away

    def beyond(self, lengths: Tensor, typical: float) -> Tensor:
        """`expected` for a growth of 1, where it is proportional to it; `[n]`."""
        return expected_maximum(lengths) - expected_maximum(torch.tensor(typical, dtype=torch.float64))

    def begin(self, design: SequenceDesign, solution: Tensor) -> Tensor:
        """Parameters `[r + 1, channels, k]` that read as the mean probe's `solution` `[r + 1, k]` does."""
        return solution[:, None]

    def lift(self, parameters: Tensor, shift: Tensor) -> Tensor:
        """Parameters whose scores are about `shift` `[k]` higher."""
        parameters[-1] += shift / parameters.shape[1]
        return parameters

    # Fitting

    def space(self, x: Sequences) -> SequenceDesign:
        return SequenceDesign.packed(x.vectors, x.lengths, self.standardise)

    def solve(self, design: Design, problems: Problems) -> Solution:
        """Parameters as `[(r + 1) * channels + 2, k]`: the last rows hold what `length_` does."""
        if not isinstance(design, SequenceDesign):
            raise DataError("a probe over sequences was given rows that are not of sequences")
        order = design.layout.order
        sorted_problems = replace(
            problems, targets=problems.targets[order], weights=problems.weights[order], start=None
        )
        size = len(design.rows) * self.channels
        width = max(1, CHUNK_ELEMENTS // max(size, 1))
        parts = []
        for first in range(0, len(problems), width):
            chosen = torch.arange(first, min(first + width, len(problems)), device=order.device)
            parts.append(self._solve(design, sorted_problems.pick(chosen)))
        return Solution(
            torch.cat([part.weights for part in parts], 1),
            torch.cat([part.steps for part in parts]),
            torch.cat([part.converged for part in parts]),
        )

    def _solve(self, design: SequenceDesign, problems: Problems) -> Solution:
        # Choosing needs ranks of held-out sequences, which are settled long before the coefficients are.
        choosing = problems.tol is not None
        fits = Fits.of(self, design.rough if choosing else design, problems)
        solution = solve(
            design.means, problems.targets, problems.weights, problems.strengths, tol=problems.tol or 1e-6
        )
        start = self.begin(design, solution.weights).contiguous()
        shape = start.shape
        # Pooling moves the scores as a whole (a maximum lies above a mean); the intercept takes that back.
        wanted = design.means.rows @ solution.weights
        pooled = self.pool(design.read(start), design.layout).scores
        count = problems.weights.sum(0).clamp_min(1e-300)
        start = self.lift(start, ((wanted - pooled) * problems.weights).sum(0) / count)
        start = start.reshape(-1, shape[2]).to(fits.design.rows)
        tol = max(self.tol, CHOOSING_TOL) if choosing else self.tol
        reached = minimise(fits, start, self.max_iter, fall=tol)
        found = reached.points.to(design.rows)
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(f"the fit of {self.name} left the finite numbers; give smaller strengths C")
        shaped = found.reshape(shape)
        growth, _, _ = self.growth(shaped, design.within, design.read(shaped))
        length = torch.stack([growth, torch.full_like(growth, fits.typical)])
        return Solution(torch.cat([found, length]), reached.steps, reached.converged)

    def scores(self, design: Design, weights: Tensor) -> Tensor:
        """Scores `[n, k]`, in the order of the data, of what `solve` found."""
        if not isinstance(design, SequenceDesign):
            raise DataError("a probe over sequences was given rows that are not of sequences")
        layout, c = design.layout, self.channels
        width = max(1, CHUNK_ELEMENTS // (len(design.rows) * c))
        parts = []
        for part in weights.split(width, dim=1):
            readings = design.read(part[:-2].reshape(design.rows.shape[1], c, -1))
            pooled = self.pool(readings, layout).scores
            if self.adjust_length:
                pooled = pooled - self.expected(layout.lengths, float(part[-1, 0]), part[-2])[0]
            parts.append(pooled)
        return layout.restore(torch.cat(parts, 1))

    def held_out(self, design: Design, weights: Tensor, x: Sequences) -> Tensor:
        if not isinstance(design, SequenceDesign):
            raise DataError("a probe over sequences was given rows that are not of sequences")
        return self.scores(design.place(x.vectors, x.lengths), weights)

    def settle(self, classes: np.ndarray, design: Design, solution: Solution) -> Self:
        first = solution.weights[:, 0]
        shaped = first[:-2].reshape(design.rows.shape[1], self.channels)
        coefficients, intercepts = (part.cpu().numpy() for part in design.raw(shaped))
        self._keep(coefficients, intercepts)
        self.length_ = first[-2:].cpu().numpy().copy()
        single = self.single(coefficients, intercepts)
        return self.adopt(classes, *single, int(solution.steps[0]))

    def _keep(self, coefficients: np.ndarray, intercepts: np.ndarray) -> None:
        """Stores what `coef_` and `intercept_` do not hold; with one channel there is nothing."""

    def single(self, coefficients: np.ndarray, intercepts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients and intercept of the score of a sequence of one token."""
        return coefficients, intercepts

    # Reading

    def decide(self, x: Sequences) -> np.ndarray:
        layout = Layout.of(x.lengths)
        coefficients, intercepts = (torch.from_numpy(part).to(x.vectors) for part in self.readers())
        readings = x.vectors[layout.tokens] @ coefficients.T + intercepts
        scores = self.pool(readings[:, :, None], layout).scores[:, 0]
        if self.adjust_length:
            scores = scores - self.drift(layout.lengths)
        return layout.restore(scores).cpu().numpy()

    def drift(self, lengths: Tensor) -> Tensor:
        """What `adjust_length` subtracts from the scores of sequences of so many tokens, `[n]`."""
        growth = torch.from_numpy(self.length_[:1]).to(lengths.device)
        return self.expected(lengths, float(self.length_[1]), growth)[0][:, 0]

    def _adjusts(self) -> Callable[[Tensor], Tensor] | None:
        return self.drift if self.adjust_length else None

    def _check(self) -> None:
        super()._check()
        if not self.tol > 0:
            raise DataError(f"tol is {self.tol!r}; expected a number above 0")
        if self.max_iter < 1:
            raise DataError(f"max_iter is {self.max_iter!r}; expected at least 1")

    def _said(self, name: str) -> str:
        adjusted = "length-adjusted" if self.adjust_length else "not length-adjusted"
        return f"{name}, C = {self.C:g}, standardise = {self.standardise}, {adjusted}"


@dataclass(frozen=True)
class Fits:
    """The problems of one batch on one design, as `lbfgs.minimise` asks for them.

    Attributes:
        probe: For the pooling.
        design: Token rows.
        signs: `[n, k]`, 1 for the positive class and -1 for the other, in packed order.
        losses: `[n, k]`, C times the weight of each sequence.
        typical: Mean length of the sequences.
        penalty: `[p, 1]`.
        inverse: `[p, k]`.
    """

    probe: PooledProbe
    design: SequenceDesign
    signs: Tensor
    losses: Tensor
    typical: float
    penalty: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, probe: PooledProbe, design: SequenceDesign, problems: Problems) -> Fits:
        """Prepares problems whose targets and weights are in packed order."""
        targets, weights = problems.targets.to(design.rows), problems.weights.to(design.rows)
        typical = float(design.layout.lengths.to(torch.float64).mean())
        losses = weights * problems.strengths.to(design.rows)
        width = design.rows.shape[1]
        penalty = design.rows.new_ones(width, probe.channels, 1)
        penalty[-1] = 0
        curvature = 0.25 * losses.sum(0) * design.second_moment[:, None, None] + penalty
        return cls(
            probe,
            design,
            2 * targets - 1,
            losses,
            typical,
            penalty.reshape(-1, 1),
            (1 / curvature.clamp_min(1e-12)).reshape(width * probe.channels, -1).to(design.rows),
        )

    def readings(self, w: Tensor) -> Tensor:
        """`[tokens, channels, k]`."""
        return self.design.read(w.reshape(self.design.rows.shape[1], self.probe.channels, -1))

    def growth(self, w: Tensor, readings: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`PooledProbe.growth` at parameters `[p, k]`."""
        shaped = w.reshape(self.design.rows.shape[1], self.probe.channels, -1)
        return self.probe.growth(shaped, self.design.within, readings)

    def value(self, readings: Tensor, w: Tensor) -> tuple[Tensor, Any]:
        layout = self.design.layout
        pooled = self.probe.pool(readings, layout)
        scores, bent = pooled.scores.to(torch.float64), None
        if self.probe.adjust_length:
            growth, by_parameters, by_readings = self.growth(w, readings)
            expected, slope = self.probe.expected(layout.lengths, self.typical, growth)
            scores, bent = scores - expected, (slope, by_parameters, by_readings)
        margin = self.signs * scores
        loss = self.losses * torch.nn.functional.softplus(-margin, threshold=700.0)
        value = loss.sum(0, dtype=torch.float64) + 0.5 * (self.penalty * w.square()).sum(
            0, dtype=torch.float64
        )
        return value, (readings, pooled, margin, bent)

    def gradient(self, kept: Any, w: Tensor) -> Tensor:
        readings, pooled, margin, bent = kept
        along = (-self.signs * self.losses * torch.sigmoid(-margin)).to(readings.dtype)
        spread = self.probe.spread(along, readings, pooled, self.design.layout)
        out = self.penalty * w
        if bent is not None:
            slope, by_parameters, by_readings = bent
            growing = (along * slope).sum(0).to(w.dtype)
            if by_readings is not None:
                spread = spread - growing * by_readings
            if by_parameters is not None:
                out = out - growing * by_parameters.reshape(w.shape)
        return out + (self.design.rows.T @ spread.reshape(len(spread), -1)).reshape(w.shape)

    def pick(self, columns: Tensor) -> Fits:
        parts = ("signs", "losses", "inverse")
        return replace(self, **{name: getattr(self, name)[..., columns] for name in parts})
