"""The k largest, against a full sort, on rows that make it easy and rows that do not."""

import pytest
import torch

from veridical.saes.largest import kth_largest, largest


def rows_of(kind, n=2048):
    random = torch.Generator().manual_seed(0)
    made = torch.randn(50, n, generator=random)
    return {
        "normal": made,
        "double": made.double(),
        "equal": torch.zeros(50, n),
        "ties": (made * 3).round(),
        "crowded": torch.cat([made[:, :64] - 100, made[:, 64:] * 1e-3], 1),
        "one_block": torch.where(torch.arange(n) % 256 == 7, made + 50, made),
        "mostly_dead": torch.where(torch.arange(n) < n - 40, -1e4, made),
        "infinite": torch.where(made > 2, torch.inf, made),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["normal", "double", "equal", "ties", "crowded", "one_block", "mostly_dead", "infinite"]
)
@pytest.mark.parametrize("k", [1, 32, 64, 100])
def test_values_and_indices_are_those_of_a_sort(kind, k):
    rows = rows_of(kind)
    values, indices = largest(rows, k)
    expected = rows.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)
    assert torch.equal(rows.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(kth_largest(rows, k), expected[:, -1:])


def test_few_candidates_are_sorted_in_place_of_whole_rows(monkeypatch):
    """The short way is taken where it should be, and not where a crowd of candidates makes it long."""
    sorted_widths, plain = [], torch.Tensor.topk

    def topk(self, *given, **named):
        sorted_widths.append(self.shape[-1])
        return plain(self, *given, **named)

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    largest(rows_of("normal"), 32)
    assert len(sorted_widths) == 1
    assert sorted_widths[0] < 100
    largest(rows_of("equal"), 32)
    largest(rows_of("normal")[:, :1000], 32)
    assert sorted_widths[1:] == [2048, 1000]


def test_leading_axes_stay():
    rows = rows_of("normal").view(5, 10, 2048)
    values, indices = largest(rows, 8)
    assert values.shape == indices.shape == (5, 10, 8)
    assert torch.equal(rows.gather(2, indices), values)


@pytest.mark.parametrize("bad", [1, 40])
def test_nan_counts_as_the_largest(bad):
    """As in torch: a member whose weights are NaN must be found out, not read around."""
    rows = rows_of("normal")
    rows[3, :bad] = float("nan")
    values, _ = largest(rows, 32)
    assert int(values[3].isnan().sum()) == min(bad, 32)
    assert values[[2, 4]].isfinite().all()
