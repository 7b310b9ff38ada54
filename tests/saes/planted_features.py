"""Data with known features: sparse combinations of fixed unit directions."""

import torch


def features(count=24, d=12, seed=0):
    """Unit directions `[count, d]`."""
    directions = torch.randn(count, d, generator=torch.Generator().manual_seed(seed))
    return directions / directions.norm(dim=1, keepdim=True)


def activations(rows, count=24, d=12, p=0.1, seed=0):
    """Vectors `[rows, d]`: each feature is active with probability `p`, with a strength from 0.5 to 1.5."""
    random = torch.Generator().manual_seed(seed + 1)
    active = torch.rand(rows, count, generator=random) < p
    strength = torch.rand(rows, count, generator=random) + 0.5
    return (active * strength) @ features(count, d, seed)
