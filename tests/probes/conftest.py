"""Activations whose truth is planted: a direction in noise, with pairs."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small fits on many threads wait for each other, the more so where the cores are shared."""
    with threadpool_limits(1):
        yield


@dataclass
class Planted:
    """Pairs of one negative and one positive row, parted along `direction` at the site "signal" only."""

    acts: dict
    labels: np.ndarray
    pairs: np.ndarray
    direction: np.ndarray


@pytest.fixture(scope="session")
def planted():
    torch.set_num_threads(1)

    def make(pairs=150, width=24, distance=3.0, seed=0):
        random = np.random.default_rng(seed)
        labels, groups = np.tile([0, 1], pairs), np.repeat(np.arange(pairs), 2)
        direction = random.normal(size=width)
        direction /= np.linalg.norm(direction)
        noise = random.normal(size=(2 * pairs, width)) + 3
        signal = random.normal(size=(2 * pairs, width)) + distance * (labels - 0.5)[:, None] * direction
        return Planted({"noise": noise, "signal": signal}, labels, groups, direction)

    return make


QUICK = {"bootstrap": 100, "shuffles": 4, "text_baseline": False, "progress": False}
"""Options that keep a sweep short where its controls are not what is tested."""


@pytest.fixture(scope="session")
def quick():
    return QUICK
