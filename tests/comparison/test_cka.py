"""Streaming CKA is the direct unbiased formula, and Procrustes is the distance after the best rotation."""

import numpy as np
import pytest
import torch
from comparison_oracles import direct_cka
from scipy.linalg import orthogonal_procrustes

from veridical.comparison.cka import Products
from veridical.comparison.procrustes import procrustes


def added(x, y, sizes):
    products = Products()
    for a, b in zip(x.split(sizes), y.split(sizes)):
        products.add(a, b)
    return products


def rotation(width, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))[0]


@pytest.mark.parametrize("widths", [(24, 24), (24, 9)])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_streaming_is_the_direct_formula(widths, mean):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(90, widths[0], generator=random, dtype=torch.float64) + mean
    y = x[:, : widths[1]] + torch.randn(90, widths[1], generator=random, dtype=torch.float64)
    found = added(x, y, [7, 1, 50, 32]).cka()
    # Taking a mean off changes nothing but the rounding of the direct formula.
    assert found == pytest.approx(direct_cka((x - mean).numpy(), (y - mean).numpy()), rel=1e-11)
    assert found == pytest.approx(direct_cka(x.numpy(), y.numpy()), rel=1e-7)
    low = added(x.float(), y.float(), [40, 50]).cka()
    assert low == pytest.approx(found, abs=1e-5)


def test_it_has_no_bias():
    """Independent data at n = 50, d = 512: the biased estimator gives 0.91."""
    values = []
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(50, 512, generator=random, dtype=torch.float64) for _ in range(2))
        values.append(added(x, y, [50]).cka())
    assert abs(np.mean(values)) < 0.02
    centred = x - x.mean(0)
    k, m = centred @ centred.T, (y - y.mean(0)) @ (y - y.mean(0)).T
    biased = (k * m).sum() / (k.square().sum() * m.square().sum()).sqrt()
    assert biased > 0.85


def test_a_rotation_and_a_scale_leave_it_at_one():
    random = torch.Generator().manual_seed(2)
    x = torch.randn(200, 16, generator=random, dtype=torch.float64) * torch.arange(1, 17) + 3
    products = added(x, 2.5 * x @ rotation(16), [64, 64, 72])
    assert products.cka() == pytest.approx(1, abs=1e-12)
    distance, unrotated = procrustes(products)
    assert distance == pytest.approx(0, abs=1e-10)
    assert unrotated > 0.5


def test_equal_streams_are_equal_to_the_last_bit():
    x = torch.randn(300, 20)
    products = added(x, x.clone(), [128, 128, 44])
    assert products.cka() == pytest.approx(1, abs=1e-14)
    assert procrustes(products) == pytest.approx((0, 0), abs=1e-12)


def test_procrustes_is_the_best_rotation():
    random = torch.Generator().manual_seed(3)
    x, y = (torch.randn(100, 8, generator=random, dtype=torch.float64) + 5 for _ in range(2))
    a, b = ((v - v.mean(0)) / (v - v.mean(0)).norm() for v in (x, y))
    turn, _ = orthogonal_procrustes(a.numpy(), b.numpy())
    distance, unrotated = procrustes(added(x, y, [33, 67]))
    assert distance == pytest.approx(np.square(a.numpy() @ turn - b.numpy()).sum(), rel=1e-10)
    assert unrotated == pytest.approx(float((a - b).square().sum()), rel=1e-10)


def test_too_few_or_constant_rows_have_no_cka():
    assert np.isnan(added(torch.ones(3, 4), torch.ones(3, 4), [3]).cka())
    assert np.isnan(added(torch.ones(9, 4), torch.ones(9, 4), [9]).cka())
    assert np.isnan(procrustes(added(torch.ones(9, 4), torch.ones(9, 4), [9]))).all()
