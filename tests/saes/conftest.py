"""Vectors that every test of SAEs may use."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def vectors():
    """Inputs `[64, 12]` and targets `[64, 9]`, float64, away from zero."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=random, dtype=torch.float64) + 0.5
    return x, torch.randn(64, 9, generator=random, dtype=torch.float64) - 0.3
