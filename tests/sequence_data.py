"""Token sequences with a planted signal, and the estimators that are tried on them."""

import numpy as np
import pytest

from veridical.probes.attention import AttentionProbe
from veridical.probes.max_tokens import MaxTokenProbe
from veridical.probes.mean_tokens import MeanTokenProbe
from veridical.probes.mil import MILProbe
from veridical.probes.rolling import RollingProbe

POOLED = [MaxTokenProbe, RollingProbe, AttentionProbe, lambda **o: AttentionProbe(heads=3, **o), MILProbe]
NAMES = ["max", "rolling", "attention", "attention3", "mil"]
ALL = [MeanTokenProbe, *POOLED]
pooled = pytest.mark.parametrize("make", POOLED, ids=NAMES)
every = pytest.mark.parametrize("make", ALL, ids=["mean", *NAMES])


def sequences(kind="noise", n=400, width=12, shift=3.0, low=4, high=25, longer=0, seed=0):
    """Token sequences of two classes and where the signal is.

    Args:
        kind: "one" token of each positive sequence, a "run" of five, "spread" over all tokens of both
            classes, a "trend" over positions that is the same for both classes, or "noise".
        longer: Tokens by which positive sequences are longer.
    """
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    direction = random.normal(size=width)
    direction /= np.linalg.norm(direction)
    made = []
    for label in labels:
        x = random.normal(size=(random.integers(low, high + 1) + longer * label, width))
        if kind == "one" and label:
            x[random.integers(len(x))] += shift * direction
        if kind == "run" and label:
            first = random.integers(max(1, len(x) - 4))
            x[first : first + 5] += shift * direction
        if kind == "spread":
            x += shift * (label - 0.5) * direction
        if kind == "trend":
            x[:, 0] += 5.0 / np.arange(1, len(x) + 1)
        made.append(x)
    return made, labels, direction
