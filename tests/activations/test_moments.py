import torch

from veridical.activations import Moments
from veridical.activations.moments import merge


def test_moments_equal_the_definition_over_many_batches():
    data = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    found = merge(Moments.of(part) for part in data.split(137))
    exact = data.double()
    assert found.count == 5000
    assert found.mean.dtype == torch.float64
    torch.testing.assert_close(found.mean, exact.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.var, exact.var(0, unbiased=False), rtol=1e-10, atol=0)


def test_the_difference_between_batches_is_part_of_the_variance():
    low, high = torch.zeros(100, 2), torch.full((100, 2), 8.0)
    assert torch.equal((Moments.of(low) + Moments.of(high)).var, torch.full((2,), 16.0, dtype=torch.float64))


def test_bfloat16_vectors_do_not_drift():
    data = torch.full((20000, 3), 1.0078125, dtype=torch.bfloat16)
    found = merge(Moments.of(part) for part in data.split(64))
    assert torch.equal(found.mean, torch.full((3,), 1.0078125, dtype=torch.float64))
    assert float(found.var.max()) == 0


def test_chunks_inside_one_call_are_merged_and_input_is_left_alone():
    data = torch.randn(40_000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = data.clone()
    found = Moments.of(data)
    torch.testing.assert_close(found.var, data.var(0, unbiased=False))
    assert torch.equal(data, before)


def test_vectors_per_head_and_empty_parts():
    data = torch.randn(50, 4, 3)
    found = Moments.empty((4, 3)) + Moments.of(data) + Moments.of(data[:0])
    assert found.mean.shape == (4, 3)
    torch.testing.assert_close(found.mean_square, float(data.double().square().sum((1, 2)).mean()))
