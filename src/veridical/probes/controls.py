"""Random directions: what any direction reads of a label, before a probe has learnt anything.

Where the classes differ along many directions at once (a topic, a length, the words of an instruction), most
directions part them. A probe is worth no more than its lead over that.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from veridical.probes.evaluate import auroc, settled
from veridical.probes.solver import spread_of
from veridical.probes.streamed import StreamedRows

DRAWS = 50
"""Random directions per site."""


def random_directions(
    fit: Tensor | StreamedRows,
    positive: np.ndarray,
    test: Tensor | StreamedRows,
    test_positive: np.ndarray,
    *,
    standardise: bool = True,
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """AUROC on the test rows of random directions whose sign is chosen on the fitted rows, `[draws]`.

    Directions are Gaussian, of equal variance along every feature, in the space in which the probe pays its
    penalty: standardised by the fitted rows, or centred only. Features that are constant there take no part.

    Args:
        fit: `[n, d]` float64, the fitted rows.
        positive: `[n]` bool.
        test: `[m, d]` float64.
        test_positive: `[m]` bool.
        standardise: Whether the probe standardises.
        draws: How many directions.
        seed: Decides the directions.
    """
    if isinstance(fit, StreamedRows):
        mean, variance, width = fit.moments.mean, fit.moments.var, fit.columns
    else:
        mean, width = fit.mean(0), draws
        variance = (fit - mean).square_().mean(0)
    spread, constant = spread_of(variance, mean, len(fit))
    random = np.random.default_rng([seed, 4])
    drawn = torch.from_numpy(random.normal(size=(fit.shape[1], draws))).to(mean)
    directions = torch.where(constant[:, None], 0.0, drawn / spread[:, None] if standardise else drawn)

    def figures(x: Tensor | StreamedRows, labels: np.ndarray) -> np.ndarray:
        centred = x - mean
        parts = [centred @ some for some in directions.split(width, 1)]
        return np.concatenate([auroc(settled(part.cpu().numpy()), labels) for part in parts])

    on_fit, on_test = figures(fit, positive), figures(test, test_positive)
    return np.where(on_fit >= 0.5, on_test, 1 - on_test)
