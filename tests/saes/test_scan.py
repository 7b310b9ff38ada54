"""Pre-activations made part by part: each product, each number format, and what is copied in passing."""

import pytest
import torch

from veridical.saes import scan
from veridical.saes.kernels import Block


@pytest.fixture(params=["oneDNN", "plain"])
def product(request, monkeypatch):
    """With the product that torch keeps for its compiler, and as where torch has none."""
    if request.param == "plain":
        monkeypatch.setattr(scan, "_linear", lambda: None)
    elif scan._linear() is None:
        pytest.skip("this torch has no product of oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parts_put_together_are_the_product(dtype, product, monkeypatch):
    monkeypatch.setattr(scan, "CPU_BYTES", 100 * 40 * dtype.itemsize)
    monkeypatch.setattr(scan, "CORE_BYTES", 0)
    random = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=random) for shape in [(2, 230, 12), (2, 40, 12), (2, 40)])
    x, W, b = x.requires_grad_(), W.requires_grad_(), b.requires_grad_()
    ids = torch.tensor([3, 1, 20])
    block = Block(1, ids, torch.zeros(230, 3, dtype=dtype))
    made, found = scan.Scan(x, W, b, [block], dtype, scratch := []), torch.zeros(2, 230, 40)

    def use(members, rows, pre):
        assert pre.dtype == dtype
        assert not pre.requires_grad
        found[members, rows] = pre.float()
        return members.start, rows.start

    places = made.each(use)
    assert places == [(member, row) for member in range(2) for row in range(0, 230, 100)]
    expected = (x @ W.mT + b[:, None]).detach()
    rounding = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(block.pre.float(), found[1][:, ids], rtol=0, atol=0)
    block.pre.zero_()
    made.each(use)
    assert (block.pre == 0).all()  # filled once
    assert len(scratch) <= torch.get_num_threads()


def test_an_operation_that_is_not_as_known_is_left_alone(monkeypatch):
    """It is not public: another torch may have it under the same name with another meaning, or not at all."""

    def wrong(x, W, b, *rest):
        return x @ W.T

    def refusing(*given):
        raise TypeError("unexpected arguments")

    for operation in (wrong, refusing):
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", operation, raising=False)
        assert scan._linear.__wrapped__() is None
