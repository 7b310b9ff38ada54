"""Probes over token sequences: planted signals, lengths, pooling, running scores, gradients, training."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from sequence_data import ALL, NAMES, every, pooled, sequences
from veridical.probes.attention import AttentionProbe
from veridical.probes.base import Problems
from veridical.probes.lbfgs import minimise
from veridical.probes.logistic import LogisticProbe
from veridical.probes.max_tokens import MaxTokenProbe
from veridical.probes.mean_tokens import MeanTokenProbe
from veridical.probes.mil import MILProbe
from veridical.probes.packed import Layout, expected_maximum, expected_rolling_maximum
from veridical.probes.pooled import Fits
from veridical.probes.rolling import RollingProbe
from veridical.probes.sequence import Sequences

torch.set_num_threads(1)


def score(probe, x, y, fitted=400):
    probe.fit(x[:fitted], y[:fitted])
    return roc_auc_score(y[fitted:], probe.decision_function(x[fitted:]))


# What is found


def test_a_signal_in_one_token_is_found_by_all_but_the_mean():
    x, y, direction = sequences("one", n=1200, shift=4.0)
    found = {name: score(make(C=0.01), x, y) for name, make in zip(["mean", *NAMES], ALL)}
    assert found["mean"] < 0.8
    for name in ("max", "attention", "attention3", "mil"):
        assert found[name] > 0.93, found
        assert found[name] > found["mean"] + 0.15, found
    assert MaxTokenProbe(C=0.01).fit(x, y).direction_ @ direction > 0.97
    assert MILProbe(C=0.01).fit(x, y).direction_ @ direction > 0.97


def test_a_signal_over_all_tokens_is_found_by_the_mean():
    x, y, direction = sequences("spread", n=1200, shift=0.5)
    found = {name: score(make(C=0.01), x, y) for name, make in zip(["mean", *NAMES], ALL)}
    assert found["mean"] > 0.85
    assert found["mean"] > found["max"] + 0.1, found
    assert abs(found["mean"] - found["attention"]) < 0.03, found
    assert MeanTokenProbe(C=0.01).fit(x, y).direction_ @ direction > 0.9


def test_a_signal_in_a_run_of_tokens_is_found_best_by_the_rolling_mean():
    x, y, _ = sequences("run", n=1200, shift=1.5)
    found = {name: score(make(C=0.01), x, y) for name, make in zip(["mean", *NAMES], ALL)}
    assert found["rolling"] == max(found.values()), found
    assert found["rolling"] > 0.93


def test_token_scores_point_at_the_planted_token():
    x, y, direction = sequences("one", shift=6.0)
    for probe in (MaxTokenProbe(C=0.01), AttentionProbe(C=0.01), MILProbe(C=0.01)):
        probe.fit(x, y)
        hits = [
            np.argmax(probe.token_scores(t)) == np.argmax(t @ direction) for t, label in zip(x, y) if label
        ]
        assert np.mean(hits) > 0.95
    attention = AttentionProbe(C=0.01).fit(x, y).attention(x[1])
    assert attention.shape == (1, len(x[1]))
    assert attention.sum() == pytest.approx(1)


# What must not be found


@every
def test_noise_is_noise_whatever_the_lengths(make):
    """Positive sequences are 12 tokens longer: length alone has AUROC of about 0.9."""
    found = []
    for seed in range(4):
        x, y, _ = sequences(n=1600, longer=12, seed=seed)
        found.append(score(make(C=0.01), x, y))
    assert roc_auc_score(y, [len(t) for t in x]) > 0.85
    assert abs(np.mean(found) - 0.5) < 0.05, found


@pytest.mark.parametrize(("make", "least"), [(MaxTokenProbe, 0.6), (MILProbe, 0.8)])
def test_without_the_adjustment_length_leaks(make, least):
    x, y, _ = sequences(n=1600, longer=12)
    assert score(make(C=0.01, adjust_length=False), x, y) > least


@every
def test_a_trend_over_positions_is_not_the_label(make):
    x, y, _ = sequences("trend", n=1600)
    assert abs(score(make(C=0.01), x, y) - 0.5) < 0.06


def test_expected_maxima_are_those_of_draws():
    draws = np.random.default_rng(1).normal(size=(40_000, 40))
    for length in (1, 2, 5, 20, 40):
        wanted = draws[:, :length].max(1).mean()
        assert expected_maximum(torch.tensor([length])).item() == pytest.approx(wanted, abs=0.04)
        windows = np.lib.stride_tricks.sliding_window_view(draws[:, :length], min(4, length), axis=1)
        wanted = windows.mean(2).max(1).mean() if length > 4 else 0
        assert expected_rolling_maximum(torch.tensor([length]), 4).item() == pytest.approx(wanted, abs=0.03)


# The pooling, against an obvious loop


def reference(probe, x):
    """Log-odds of one sequence, one token at a time."""
    if isinstance(probe, AttentionProbe):
        total = probe.offsets_[probe.heads :].sum()
        for query, value in zip(probe.queries_, probe.values_):
            weights = np.exp(x @ query - (x @ query).max())
            total += weights @ (x @ value) / weights.sum()
        raw = total
    else:
        z = x @ probe.coef_[0] + probe.intercept_[0]
        if isinstance(probe, MeanTokenProbe):
            return z.mean()
        if isinstance(probe, MaxTokenProbe):
            raw = z.max()
        elif isinstance(probe, RollingProbe):
            size = min(probe.window, len(z))
            raw = max(z[at : at + size].mean() for at in range(len(z) - size + 1))
        else:
            missing = np.prod(1 - 1 / (1 + np.exp(-z)))
            raw = np.log((1 - missing) / missing)
    return raw - (float(probe.drift(torch.tensor([len(x)]))) if probe.adjust_length else 0.0)


@every
@pytest.mark.parametrize("adjusted", [True, False])
def test_scores_are_those_of_a_plain_loop(make, adjusted):
    x, y, _ = sequences("one", n=60, width=5)
    options = {} if make is MeanTokenProbe else {"adjust_length": adjusted}
    probe = make(C=0.1, **options).fit(x, y)
    wanted = [reference(probe, t) for t in x]
    np.testing.assert_allclose(probe.decision_function(x), wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(probe.predict_proba(x)[:, 1], 1 / (1 + np.exp(-np.array(wanted))))
    assert (probe.predict(x) == (np.array(wanted) > 0)).all()


@every
def test_running_scores_are_those_of_the_tokens_so_far(make):
    x, y, _ = sequences("one", n=80, width=5, low=8, high=12)
    probe = make(C=0.1).fit(x, y)
    coefficients, intercepts = probe.readers()
    both, state = np.stack([x[0][:8], x[1][:8]]), probe.running()
    for length in range(1, 9):
        readings = both[:, length - 1] @ coefficients.T + intercepts
        found = state.update(torch.from_numpy(readings))
        wanted = probe.decision_function(both[:, :length])
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-8, atol=1e-9)
    assert state.count == 8


@every
def test_token_scores_are_those_of_sequences_of_one_token(make):
    x, y, _ = sequences("one", n=80, width=5)
    probe = make(C=0.1).fit(x, y)
    alone = probe.decision_function([t[None] for t in x[3]])
    np.testing.assert_allclose(probe.token_scores(x[3]), alone)
    # Up to the adjustment for length, which is a constant for single tokens, this is the linear reading.
    linear = x[3] @ probe.coef_[0] + probe.intercept_[0]
    assert np.ptp(alone - linear) < 1e-9
    assert np.linalg.norm(probe.direction_) == pytest.approx(1)


@every
def test_padding_never_enters_and_the_company_of_a_sequence_does_not_matter(make):
    x, y, _ = sequences("one", n=80, width=5)
    probe = make(C=0.1).fit(x, y)
    alone = np.concatenate([probe.decision_function([t]) for t in x])
    np.testing.assert_allclose(probe.decision_function(x), alone, rtol=1e-9, atol=1e-9)
    last = probe.decision_function(x[::-1])[::-1]
    np.testing.assert_allclose(probe.decision_function(x), last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [ALL[i] for i in (0, 1, 3, 5)], ids=["mean", "max", "attention", "mil"])
def test_the_order_of_tokens_does_not_matter(make):
    x, y, _ = sequences("one", n=80, width=5)
    random = np.random.default_rng(0)
    mixed = [random.permutation(t) for t in x]
    probe, other = make(C=0.1).fit(x, y), make(C=0.1).fit(mixed, y)
    np.testing.assert_allclose(probe.decision_function(x), probe.decision_function(mixed), atol=1e-9)
    np.testing.assert_allclose(probe.decision_function(x), other.decision_function(mixed), atol=1e-3)


def test_a_window_of_one_is_the_maximum_and_a_wide_one_the_mean():
    x, y, _ = sequences("one", n=100, width=5)
    one = RollingProbe(C=0.1, window=1).fit(x, y)
    top = MaxTokenProbe(C=0.1).fit(x, y)
    bare = RollingProbe(C=0.1, window=1, adjust_length=False).fit(x, y)
    np.testing.assert_allclose(
        bare.decision_function(x),
        MaxTokenProbe(C=0.1, adjust_length=False).fit(x, y).decision_function(x),
        atol=1e-4,
    )
    assert one.direction_ @ top.direction_ > 0.99
    wide = RollingProbe(C=0.1, window=100).fit(x, y)
    z = [t @ wide.coef_[0] + wide.intercept_[0] for t in x]
    np.testing.assert_allclose(wide.decision_function(x), [each.mean() for each in z])


# The training


@every
def test_single_tokens_give_the_logistic_probe(planted, make):
    data = planted(pairs=80)
    x, y = data.acts["signal"], data.labels
    plain = LogisticProbe(C=0.05).fit(x, y)
    found = make(C=0.05).fit(x, y)
    np.testing.assert_allclose(found.decision_function(x), plain.decision_function(x), atol=2e-3)
    assert found.direction_ @ plain.direction_ > 0.99999


def test_the_mean_is_logistic_regression_on_means():
    x, y, _ = sequences("spread", n=100, shift=0.5)
    means = np.stack([t.mean(0) for t in x])
    probe = MeanTokenProbe(C=0.3, standardise=False).fit(x, y)
    theirs = LogisticRegression(C=0.3, tol=1e-10, max_iter=10_000).fit(means, y)
    np.testing.assert_allclose(probe.coef_, theirs.coef_, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(probe.decision_function(x), theirs.decision_function(means), rtol=1e-3)


def fits_of(probe, n=30, k=3, seed=0):
    """Problems with folds and mixed strengths, and random parameters."""
    x, _, _ = sequences("one", n=n, width=4, low=1, high=9, seed=seed)
    design = probe.space(Sequences.of(x))
    made = torch.Generator().manual_seed(seed)
    targets = (torch.rand(n, k, generator=made) > 0.5).double()
    weights = (torch.rand(n, k, generator=made) > 0.3).double()
    strengths = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)[:k]
    fits = Fits.of(probe, design, Problems(targets, weights, strengths))
    w = torch.randn(5 * probe.channels, k, generator=made, dtype=torch.float64)
    return fits, w, x, targets, weights, strengths


@pooled
@pytest.mark.parametrize("adjusted", [True, False])
def test_gradients_agree_with_finite_differences(make, adjusted):
    fits, w, *_ = fits_of(make(adjust_length=adjusted))
    _, kept = fits.value(fits.readings(w), w)
    gradient = fits.gradient(kept, w)
    step = 1e-6
    for at in range(len(w)):
        up, down = w.clone(), w.clone()
        up[at] += step
        down[at] -= step
        slope = (fits.value(fits.readings(up), up)[0] - fits.value(fits.readings(down), down)[0]) / (2 * step)
        torch.testing.assert_close(gradient[at], slope, rtol=1e-5, atol=1e-5)


@pooled
def test_the_objective_is_the_one_that_is_stated(make):
    probe = make(adjust_length=False)
    fits, w, x, targets, weights, strengths = fits_of(probe)
    value, _ = fits.value(fits.readings(w), w)
    shaped = w.reshape(5, probe.channels, -1)
    padding = torch.cat([w, torch.zeros(2, 3)])
    scores = probe.scores(fits.design, padding)[fits.design.layout.order]
    margin = (2 * targets - 1) * scores
    wanted = strengths * (weights * torch.log1p(torch.exp(-margin))).sum(0)
    wanted = wanted + shaped[:-1].square().sum((0, 1)) / 2
    torch.testing.assert_close(value, wanted)
    assert len(x) == len(targets)


@pooled
def test_no_nearby_point_is_better_and_a_batch_equals_each_alone(make):
    fits, w, *_ = fits_of(make(), n=60)
    reached = minimise(fits, 0.1 * w, 2000, fall=1e-10)
    found = reached.points
    assert bool(reached.converged.all())
    best, _ = fits.value(fits.readings(found), found)
    made = torch.Generator().manual_seed(5)
    for size in (1e-3, 1e-2):
        for _ in range(20):
            near = found + size * torch.randn(found.shape, generator=made, dtype=torch.float64)
            assert bool((fits.value(fits.readings(near), near)[0] >= best - 1e-6 * best.abs()).all())
    for column in range(3):
        mask = torch.arange(3) == column
        alone = minimise(fits.pick(mask), 0.1 * w[:, mask], 2000, fall=1e-10).points
        value, _ = fits.pick(mask).value(fits.readings(alone), alone)
        assert value.item() == pytest.approx(best[column].item(), rel=1e-3)


@pooled
def test_folds_choose_in_float32_as_they_would_in_float64(make):
    """Also where readings are far from 0: three sites of very different scale."""
    for scale, strength in ((1.0, 0.1), (1.0, 100.0), (1e4, 10.0)):
        x, y, _ = sequences("spread", n=120, width=5, shift=3.0)
        read = Sequences.of([scale * t for t in x])
        probe = make(tol=1e-9)
        design = probe.space(read)
        targets, ones = torch.from_numpy(y.astype(float))[:, None], torch.ones(120, 1).double()
        exact = Problems(targets, ones, torch.tensor([strength]).double())
        rough = Problems(targets, ones, torch.tensor([strength]).double(), tol=1e-4)
        wanted, found = (probe.scores(design, probe.solve(design, p).weights)[:, 0] for p in (exact, rough))
        assert bool(torch.isfinite(found).all())
        assert abs(roc_auc_score(y, wanted) - roc_auc_score(y, found)) < 0.01


def test_a_noisy_or_of_tokens_far_below_0_stays_finite():
    layout = Layout.of(torch.tensor([2, 1]))
    for dtype in (torch.float32, torch.float64):
        for reading in (-1e5, -700.0, -90.0, 50.0, 1e5):
            z = torch.full((3, 1, 1), reading, dtype=dtype)
            probe = MILProbe()
            pooled_once = probe.pool(z, layout)
            assert bool(torch.isfinite(pooled_once.scores).all())
            gradient = probe.spread(torch.ones(2, 1, dtype=dtype), z, pooled_once, layout)
            assert bool(torch.isfinite(gradient).all())


@pooled
def test_training_never_ends_above_its_start(make):
    """The start is the mean probe; attention with one head can hold it exactly, so it can only be better."""
    x, y, _ = sequences("one", n=100, width=5)
    probe = make(C=1.0).fit(x, y)
    margin = np.where(y == 1, 1, -1) * probe.decision_function(x)
    assert np.logaddexp(0, -margin).mean() < np.log(2)
    assert probe.n_iter_[0] > 1


@every
def test_the_same_data_gives_the_same_probe_to_the_last_bit(make):
    x, y, _ = sequences("one", n=60, width=5)
    first, second = make().fit(x, y), make().fit(x, y)
    assert np.array_equal(first.coef_, second.coef_)
    assert np.array_equal(first.decision_function(x), second.decision_function(x))


@pooled
@pytest.mark.filterwarnings("ignore:the probe did not converge")
def test_separable_data_gives_finite_weights(make):
    x, y, _ = sequences("spread", n=40, shift=200.0)
    probe = make(C=1e6, max_iter=50).fit(x, y)
    scores = probe.decision_function(x)
    assert np.isfinite(probe.coef_).all()
    assert np.isfinite(scores).all()
    assert roc_auc_score(y, scores) == 1
    far = probe.predict_log_proba([1e4 * t for t in x])
    assert np.isfinite(far).all()


@pooled
def test_too_few_steps_are_said(make):
    from sklearn.exceptions import ConvergenceWarning

    x, y, _ = sequences("one", n=60, width=5)
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        make(max_iter=1).fit(x, y)
