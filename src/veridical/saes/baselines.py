"""Dictionaries that know nothing of features, at the same number of active directions a row.

An SAE is worth its name only where it beats both: PCA spends its directions on where the variance is, and a
random dictionary of the same size shows what choosing among so many directions gives by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from veridical.saes.base import SAE
    from veridical.saes.held_out import HeldOut

ROWS = 256
"""Rows solved at a time: each brings a matrix of its chosen vectors."""
RIDGE = 1e-10


def pca_errors(sae: SAE, rows: HeldOut, components: int) -> np.ndarray:
    """Squared error of PCA `[texts]`, summed over the rows of each text.

    Each half of the texts is reconstructed from the mean and the leading components of the other half, so
    that PCA, like the SAE, is judged on rows that it has not seen.
    """
    half = _halves(rows)
    fitted = _components(sae, rows, half, components)
    errors = np.zeros(int(rows.groups.max()) + 1)
    for where, _, y in rows.blocks(sae):
        flat, side = y.double(), half[rows.groups[where]]
        for number, (mean, basis) in enumerate(fitted):
            own = torch.from_numpy(side == number).to(flat.device)
            if not bool(own.any()):
                continue
            centred = flat[own] - mean
            left = centred - (centred @ basis) @ basis.T
            np.add.at(errors, rows.groups[where][side == number], left.square().sum(1).cpu().numpy())
    return errors


def random_errors(sae: SAE, rows: HeldOut, mean: Tensor, active: int, seed: int = 0) -> np.ndarray:
    """Squared error of a random dictionary `[texts]`, summed over the rows of each text.

    As many random unit vectors as the SAE has latents; each row is reconstructed from the mean and its
    `active` vectors of largest absolute inner product, with least-squares coefficients of any sign, which an
    SAE does not have.
    """
    width = len(mean)
    atoms = random_atoms(sae.width, width, seed).to(mean.device)
    active = min(active, sae.width, width)
    errors = np.zeros(int(rows.groups.max()) + 1)
    for where, _, y in rows.blocks(sae):
        flat = y.double() - mean
        for first in range(0, len(flat), ROWS):
            part = flat[first : first + ROWS]
            chosen = (part.float() @ atoms.T).abs().topk(active, dim=1).indices
            left = _residual(part, atoms[chosen].double())
            np.add.at(errors, rows.groups[where][first : first + ROWS], left.square().sum(1).cpu().numpy())
    return errors


def random_atoms(count: int, width: int, seed: int) -> Tensor:
    """Random unit vectors `[count, width]`.

    Drawn by numpy from a stream of their own: torch's generator with the same seed and shape would give the
    very directions that an SAE of that seed was initialised with.
    """
    drawn = np.random.default_rng([seed, 8]).normal(size=(count, width))
    return torch.from_numpy(drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).float()


def _residual(rows: Tensor, vectors: Tensor) -> Tensor:
    """What is left of each of `rows [n, d]` outside the span of its own `vectors [n, k, d]`, by the normal
    equations: with unit vectors and a trace of ridge they are solved well enough at any k up to d."""
    gram = vectors @ vectors.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    coefficients = torch.cholesky_solve(vectors @ rows[..., None], torch.linalg.cholesky(gram))
    return rows - (coefficients.mT @ vectors).squeeze(-2)


def _halves(rows: HeldOut) -> np.ndarray:
    """Which half each text belongs to, `[texts]`: every other one, in a fixed random order."""
    count = int(rows.groups.max()) + 1
    half = np.empty(count, dtype=np.int64)
    half[np.random.default_rng(0).permutation(count)] = np.arange(count) % 2
    return half


def _components(sae: SAE, rows: HeldOut, half: np.ndarray, components: int) -> list[tuple[Tensor, Tensor]]:
    """Mean `[d]` and leading components `[d, k]` for each half, of the other half's rows."""
    # Moments about a point near the mean: sums of squares far from it would lose digits.
    shift = next(rows.blocks(sae))[2].double().mean(0)
    counts, sums = [0, 0], [torch.zeros_like(shift) for _ in range(2)]
    squares = [torch.zeros(len(shift), len(shift)).to(shift) for _ in range(2)]
    for where, _, y in rows.blocks(sae):
        flat, side = y.double(), half[rows.groups[where]]
        for number in range(2):
            part = flat[torch.from_numpy(side != number).to(flat.device)] - shift
            counts[number] += len(part)
            sums[number] += part.sum(0)
            squares[number] += part.T @ part
    made = []
    for count, total, square in zip(counts, sums, squares):
        mean = total / max(count, 1)
        covariance = square / max(count, 1) - torch.outer(mean, mean)
        made.append((mean + shift, torch.linalg.eigh(covariance).eigenvectors[:, -components:]))
    return made
