"""Random directions: what any direction reads of a label, before a probe has learnt anything.

Where the classes differ along many directions at once (a topic, a length, the words of an instruction), most
directions part them. A probe is worth no more than its lead over that.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from veridical.probes.evaluate import auroc, settled
from veridical.probes.solver import deviations

DRAWS = 50
"""Random directions per site."""


def random_directions(
    fit: Tensor,
    positive: np.ndarray,
    test: Tensor,
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
    mean = fit.mean(0)
    spread, constant = deviations(fit - mean, mean)
    random = np.random.default_rng([seed, 4])
    drawn = torch.from_numpy(random.normal(size=(fit.shape[1], draws))).to(fit)
    directions = torch.where(constant[:, None], 0.0, drawn / spread[:, None] if standardise else drawn)
    on_fit = auroc(settled(((fit - mean) @ directions).cpu().numpy()), positive)
    on_test = auroc(settled(((test - mean) @ directions).cpu().numpy()), test_positive)
    return np.where(on_fit >= 0.5, on_test, 1 - on_test)
