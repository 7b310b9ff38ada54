"""LAT and CCS: what they find, against brute force; what they find where it is not the label."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from veridical.errors import DataError
from veridical.probes.ccs import CCSProbe, Contrast
from veridical.probes.lat import LATProbe
from veridical.probes.lbfgs import minimise


def uneven(width=7, seed=0):
    """Groups of 1 to 4 rows, with labels that vary within them."""
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(30), random.integers(1, 5, 30))
    labels = random.integers(0, 2, len(groups))
    x = (
        random.normal(size=(len(groups), width)) * np.linspace(1, 2, width)
        + 3 * random.normal(size=(30, width))[groups]
    )
    return x, labels, groups


def distractor(strength, pairs=400, seed=0):
    """Pairs whose label parts rows by 3 along axis 0; another feature flips by `strength` along axis 1."""
    random = np.random.default_rng(seed)
    labels = np.tile([0, 1], pairs)
    other = np.where(np.repeat(random.integers(0, 2, pairs), 2), labels, 1 - labels)
    x = random.normal(size=(2 * pairs, 10))
    x[:, 0] += 3 * (labels - 0.5)
    x[:, 1] += strength * (other - 0.5)
    return x, labels, other, np.repeat(np.arange(pairs), 2)


# LAT


@pytest.mark.parametrize("width", [7, 150])
def test_lat_is_the_main_axis_of_all_differences_within_pairs(width):
    x, labels, groups = uneven(width)
    differences = [
        x[i] - x[j] for i in range(len(x)) for j in range(len(x)) if i != j and groups[i] == groups[j]
    ]
    axis = np.linalg.svd(np.array(differences), full_matrices=False)[2][0]
    found = LATProbe().fit(x, labels, groups).direction_
    assert abs(axis @ found) == pytest.approx(1, abs=1e-9)


def test_lat_without_pairs_compares_any_two_rows():
    x, labels, _ = uneven()
    differences = (x[:, None] - x[None]).reshape(-1, x.shape[1])
    axis = np.linalg.svd(differences, full_matrices=False)[2][0]
    assert abs(axis @ LATProbe().fit(x, labels).direction_) == pytest.approx(1, abs=1e-9)


def test_lat_takes_only_its_sign_from_the_labels(planted):
    data = planted()
    x, pairs = data.acts["signal"], data.pairs
    probe, opposite = (LATProbe().fit(x, labels, pairs) for labels in (data.labels, 1 - data.labels))
    np.testing.assert_allclose(opposite.direction_, -probe.direction_)
    some = np.where(np.random.default_rng(0).random(len(x)) < 0.2, 1 - data.labels, data.labels)
    assert abs(LATProbe().fit(x, some, pairs).direction_ @ probe.direction_) == pytest.approx(1)


def test_pairs_take_out_what_their_rows_share():
    x, labels, _, groups = distractor(0)
    x = x + 50 * np.random.default_rng(1).normal(size=(400, 10))[groups]
    assert LATProbe().fit(x, labels, groups).direction_[0] > 0.98
    assert abs(LATProbe().fit(x, labels).direction_[0]) < 0.9


def test_lat_finds_another_feature_where_that_varies_more():
    x, labels, _, groups = distractor(6)
    probe = LATProbe().fit(x, labels, groups)
    assert abs(probe.direction_[1]) > 0.98
    assert 0.4 < (probe.predict(x) == labels).mean() < 0.6


@pytest.mark.parametrize(("probe", "said"), [(LATProbe(), "LAT compares"), (CCSProbe(), "CCS compares")])
def test_refuses_labels_that_are_constant_within_every_pair(probe, said):
    x, groups = np.random.default_rng(0).normal(size=(20, 3)), np.repeat(np.arange(10), 2)
    with pytest.raises(DataError, match=f"constant within every pair; {said}"):
        probe.fit(x, groups % 2, groups)


def test_lat_refuses_pairs_whose_rows_are_equal():
    x, groups = np.random.default_rng(0).normal(size=(10, 3)).repeat(2, axis=0), np.repeat(np.arange(10), 2)
    with pytest.raises(DataError, match="no pair has two rows that differ"):
        LATProbe().fit(x, np.tile([0, 1], 10), groups)


# CCS


def ingredients(pairs=12, width=5, problems=3):
    random = np.random.default_rng(0)
    one, other = (torch.from_numpy(random.normal(size=(pairs, width))) for _ in range(2))
    share = torch.from_numpy(random.random((pairs, problems)))
    share /= share.sum(0)
    means = torch.stack([one.T @ share, other.T @ share])
    theta = torch.from_numpy(random.normal(size=(width + 1, problems)))
    return theta, one, other, means, share


def loss(theta, one, other, means, share, decay):
    """Losses and gradients at `theta`."""
    contrast = Contrast(one, other, means, share, decay, torch.ones_like(share[:1]))
    value, kept = contrast.value(contrast.readings(theta), theta)
    return value, contrast.gradient(kept, theta)


def test_the_loss_is_that_of_the_paper():
    theta, one, other, means, share = ingredients()
    found, _ = loss(theta, one, other, means, share, 0.0)
    for at in range(3):
        weights = share[:, at].numpy()
        p, q = (
            1 / (1 + np.exp(-((side - weights @ side) @ theta[:-1, at].numpy() + float(theta[-1, at]))))
            for side in (one.numpy(), other.numpy())
        )
        wanted = weights @ ((p - (1 - q)) ** 2 + np.minimum(p, q) ** 2)
        assert float(found[at]) == pytest.approx(wanted, rel=1e-12)


def test_the_gradient_agrees_with_finite_differences():
    theta, *rest = ingredients()
    _, gradient = loss(theta, *rest, 0.05)
    for row in range(len(theta)):
        step = torch.zeros_like(theta)
        step[row] = 1e-6
        numeric = (loss(theta + step, *rest, 0.05)[0] - loss(theta - step, *rest, 0.05)[0]) / 2e-6
        torch.testing.assert_close(gradient[row], numeric, rtol=1e-6, atol=1e-8)


def test_ccs_finds_the_label_without_reading_it(planted):
    data = planted(pairs=400)
    x, groups = data.acts["signal"], data.pairs
    probe, opposite = (CCSProbe().fit(x, labels, groups) for labels in (data.labels, 1 - data.labels))
    assert probe.direction_ @ data.direction > 0.9
    np.testing.assert_allclose(opposite.coef_, -probe.coef_)
    noise = CCSProbe().fit(data.acts["noise"], data.labels, groups)
    assert abs(noise.direction_ @ data.direction) < 0.7


def test_what_only_tells_the_sides_apart_is_taken_out():
    x, labels, _, groups = distractor(0)
    side = np.where(np.repeat(np.random.default_rng(2).integers(0, 2, 400), 2), labels, 1 - labels)
    x[:, 2] += 20 * side
    with_side = CCSProbe(side="answer").fit(x, labels, groups, side=side)
    assert abs(with_side.coef_[0, 0]) * 3 > 2
    assert (
        with_side.predict(x - 20 * side[:, None] * np.eye(10)[2] + 10 * np.eye(10)[2]) == labels
    ).mean() > 0.9
    # The same pairs with sides drawn at random: the difference of the sides is the most consistent feature.
    assert abs(CCSProbe(standardise=False).fit(x, labels, groups).direction_[2]) > 0.9


def test_ccs_finds_another_feature_that_is_more_consistent():
    x, labels, other, groups = distractor(6)
    probe = CCSProbe(standardise=False).fit(x, labels, groups)
    assert abs(probe.direction_[1]) > 0.9
    assert (probe.predict(x) == labels).mean() < 0.75
    assert abs(np.corrcoef(probe.decision_function(x), other)[0, 1]) > 0.8


def test_the_best_of_several_starts_is_kept():
    x, labels, _, groups = distractor(2.5, pairs=60)
    single = [CCSProbe(restarts=1, seed=seed, decay=1e-3).fit(x, labels, groups) for seed in range(6)]
    several = CCSProbe(restarts=20, decay=1e-3).fit(x, labels, groups)
    assert min(abs(probe.direction_ @ several.direction_) for probe in single) < 0.9
    # Sides are drawn with the seed, which alone moves the minimum; the starts of one seed end in several.
    sides = {"side": labels ^ np.random.default_rng(1).integers(0, 2, 60).repeat(2)}
    ends = [
        CCSProbe("s", restarts=1, seed=seed, decay=1e-3).fit(x, labels, groups, **sides) for seed in range(6)
    ]
    best = [
        CCSProbe("s", restarts=20, seed=seed, decay=1e-3).fit(x, labels, groups, **sides) for seed in range(3)
    ]
    assert min(abs(a.direction_ @ b.direction_) for a in ends for b in ends) < 0.99
    assert min(abs(a.direction_ @ b.direction_) for a in best for b in best) > 0.9999


def test_ccs_is_the_same_for_the_same_seed_and_starts_elsewhere_for_another():
    x, labels, _, groups = distractor(0, pairs=50)
    first, again = (CCSProbe(seed=1).fit(x, labels, groups) for _ in range(2))
    assert np.array_equal(first.coef_, again.coef_)
    assert not np.array_equal(CCSProbe(seed=2).fit(x, labels, groups).coef_, first.coef_)


def test_sides_of_several_rows_are_their_means():
    x, labels, _, _ = distractor(0)
    fours = np.arange(800) // 4
    turned = np.random.default_rng(1).integers(0, 2, 200)
    many = CCSProbe("side").fit(x, labels, fours, side=labels ^ turned[fours])
    means = np.stack([x[(fours == g) & (labels == at)].mean(0) for g in range(200) for at in (0, 1)])
    pairs, signs = np.repeat(np.arange(200), 2), np.tile([0, 1], 200)
    few = CCSProbe("side").fit(means, signs, pairs, side=signs ^ turned[pairs])
    assert many.direction_ @ few.direction_ > 0.97


def test_rows_without_a_partner_do_not_enter_the_search():
    x, labels, _, groups = distractor(0, pairs=100)
    extra = 30 * np.random.default_rng(3).normal(size=(5, 10))
    more = np.r_[x, extra], np.r_[labels, 0, 1, 0, 1, 1], np.r_[groups, 200:205]
    a = CCSProbe(standardise=False).fit(x, labels, groups)
    b = CCSProbe(standardise=False).fit(*more)
    assert a.direction_ @ b.direction_ > 0.9999


@pytest.mark.parametrize(
    ("probe", "groups", "columns", "said"),
    [
        (CCSProbe(), np.arange(12) // 3, {}, "a pair has 3 rows; CCS needs two sides"),
        (CCSProbe("form"), np.arange(12) // 2, {}, "needs that column"),
        (CCSProbe("form"), np.arange(12) // 2, {"side": np.arange(12) % 3}, r"side has 3 values \(0, 1, 2\)"),
        (CCSProbe("form"), np.arange(12) // 2, {"side": np.arange(11) % 2}, "side has shape"),
        (CCSProbe("form"), np.arange(12) // 2, {"side": np.arange(12) // 2 % 2}, "0 pairs have both sides"),
        (
            CCSProbe("form"),
            np.arange(12) // 2,
            {"side": np.tile(["b", "a"], 6)},
            "side tells the label of every row",
        ),
        (CCSProbe(restarts=0), np.arange(12) // 2, {}, "restarts is 0"),
        (CCSProbe(decay=0), np.arange(12) // 2, {}, "decay is 0"),
    ],
)
def test_ccs_refuses_pairs_without_two_sides(probe, groups, columns, said):
    with pytest.raises(DataError, match=said):
        probe.fit(np.random.default_rng(0).normal(size=(12, 3)), np.tile([0, 1], 6), groups, **columns)


# The descent


@dataclass(frozen=True)
class Plain:
    """Any function of points `[d, j]` and the numbers `[j]` of their problems, to values and gradients."""

    function: object
    columns: torch.Tensor

    @property
    def inverse(self):
        return torch.ones(1, len(self.columns), dtype=torch.float64)

    def readings(self, w):
        return w

    def value(self, readings, w):
        return self.function(w, self.columns)

    def gradient(self, kept, w):
        return kept

    def pick(self, columns):
        return replace(self, columns=self.columns[columns])


def descend(function, start, max_steps, tol=1e-7):
    return minimise(Plain(function, torch.arange(start.shape[1])), start, max_steps, norm=tol)


def test_the_descent_reaches_the_minimum_of_each_problem_alone_or_together():
    random = np.random.default_rng(0)
    factors = [random.normal(size=(8, 8)) * np.geomspace(0.01, 10, 8) for _ in range(4)]
    matrices = torch.from_numpy(np.stack([f @ f.T + 0.1 * np.eye(8) for f in factors]))
    wanted = torch.from_numpy(random.normal(size=(8, 4)))

    def function(x, columns):
        away = x - wanted[:, columns]
        bent = torch.einsum("kij,jk->ik", matrices[columns], away)
        return (away * bent).sum(0) / 2 + (away**4).sum(0), bent + 4 * away**3

    reached = descend(function, torch.zeros(8, 4, dtype=torch.float64), 500, tol=1e-10)
    assert bool(reached.converged.all())
    torch.testing.assert_close(reached.points, wanted, rtol=1e-5, atol=1e-6)
    alone = descend(lambda x, c: function(x, c + 2), torch.zeros(8, 1, dtype=torch.float64), 500, tol=1e-10)
    torch.testing.assert_close(alone.points[:, 0], reached.points[:, 2], rtol=1e-9, atol=1e-11)
    assert int(alone.steps[0]) == int(reached.steps[2])


def test_the_descent_says_when_it_was_cut_short():
    def function(x, columns):
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2, torch.stack(
            [-2 * (1 - x[0]) - 400 * x[0] * (x[1] - x[0] ** 2), 200 * (x[1] - x[0] ** 2)]
        )

    start = torch.tensor([[-1.2], [1.0]], dtype=torch.float64)
    assert not bool(descend(function, start, 3).converged)
    assert int(descend(function, start, 3).steps) == 3
    torch.testing.assert_close(
        descend(function, start, 500, tol=1e-10).points, torch.ones(2, 1, dtype=torch.float64)
    )


def test_a_search_that_was_cut_short_warns():
    x, labels, _, groups = distractor(0, pairs=50)
    with pytest.warns(UserWarning, match="did not converge in 2 steps"):
        CCSProbe(max_iter=2).fit(x, labels, groups)
