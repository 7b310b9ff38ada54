"""The shared solver against scikit-learn, one problem at a time."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from veridical.probes import solver
from veridical.probes.solver import Design, solve

STRENGTHS = (1e-3, 1e-1, 1.0, 10.0)


def data(kind, seed=0):
    random = np.random.default_rng(seed)
    n, d = {"wide": (60, 150), "tall": (300, 30), "collinear": (200, 20), "separable": (120, 40)}[kind]
    x = random.normal(size=(n, d)) * np.exp(random.normal(size=d)) + 5 * random.normal(size=d)
    if kind == "collinear":
        x[:, 1], x[:, 2], x[:, 3] = 2 * x[:, 0], x[:, 0] - 1, 7.0
    score = (x - x.mean(0)) @ random.normal(size=d)
    noise = 0 if kind == "separable" else score.std()
    return x, (score + noise * random.normal(size=n) > 0).astype(float)


def reference(x, y, strength, rows=None):
    rows = slice(None) if rows is None else rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return LogisticRegression(C=strength, tol=1e-10, max_iter=100_000).fit(x[rows], y[rows])


@pytest.mark.parametrize("kind", ["wide", "tall", "collinear", "separable"])
def test_agrees_with_sklearn_for_folds_strengths_and_shuffles_at_once(kind):
    x, y = data(kind)
    n = len(x)
    random = np.random.default_rng(1)
    labels = [y, random.permutation(y)]
    masks = [np.ones(n), (np.arange(n) % 5 != 0).astype(float)]
    problems = [(t, m, c) for t in labels for m in masks for c in STRENGTHS]
    design = Design.of(torch.from_numpy(x))
    solution = solve(
        design,
        torch.from_numpy(np.stack([t for t, _, _ in problems], 1)),
        torch.from_numpy(np.stack([m for _, m, _ in problems], 1)),
        torch.tensor([c for _, _, c in problems], dtype=torch.float64),
    )
    assert solution.converged.all()
    coefficients, intercepts = design.raw(solution.weights)
    scale = design.scale.numpy()
    standard = (x - x.mean(0)) / scale
    for j, (t, m, c) in enumerate(problems):
        model = reference(standard, t, c, m > 0)
        ours, theirs = coefficients[j].numpy() * scale, model.coef_[0]
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)
        scores = x @ coefficients[j].numpy() + intercepts[j].item()
        np.testing.assert_allclose(scores, model.decision_function(standard), rtol=5e-3, atol=5e-3)
        assert abs(roc_auc_score(t, scores) - roc_auc_score(t, model.decision_function(standard))) <= 0.002


@pytest.mark.parametrize("shape", [(40, 100), (80, 15)])
def test_separable_data_with_hardly_a_penalty_stays_finite_and_is_solved(shape):
    random = np.random.default_rng(2)
    x = random.normal(size=shape)
    y = torch.from_numpy((x[:, 0] > 0).astype(float))[:, None]
    design = Design.of(torch.from_numpy(x))
    strength = torch.tensor([1e6], dtype=torch.float64)
    solution = solve(design, y, torch.ones_like(y), strength)
    assert solution.converged.all()
    assert torch.isfinite(solution.weights).all()
    assert gradient_norm(design, y, strength, solution.weights) <= 1e-5 * solution.weights.norm()
    assert (((design.rows @ solution.weights) > 0) == (y > 0)).all()


def gradient_norm(design, y, strength, weights):
    """From the formula of the objective by autograd, not from the solver's own algebra."""
    w = weights.clone().requires_grad_()
    z = design.rows @ w
    loss = strength * torch.nn.functional.softplus((1 - 2 * y) * z, threshold=700).sum()
    (loss + w[:-1].square().sum() / 2).backward()
    return w.grad.norm()


def test_the_gradient_vanishes_and_a_perturbed_solution_has_a_larger_objective():
    x, y = data("tall")
    y, design = torch.from_numpy(y)[:, None], Design.of(torch.from_numpy(x))
    strength = torch.tensor([1.0], dtype=torch.float64)
    solution = solve(design, y, torch.ones_like(y), strength, tol=1e-10)
    assert gradient_norm(design, y, strength, solution.weights) < 1e-7
    assert gradient_norm(design, y, strength, solution.weights + 0.01) > 1e-2


def test_chunks_warm_starts_and_company_change_nothing(monkeypatch):
    x, y = data("tall")
    design = Design.of(torch.from_numpy(x))
    random = np.random.default_rng(3)
    labels = torch.from_numpy(np.stack([y, *(random.permutation(y) for _ in range(6))], 1))
    strengths = torch.full((7,), 0.1, dtype=torch.float64)
    together = solve(design, labels, torch.ones_like(labels), strengths, tol=1e-10).weights
    warm = solve(design, labels, torch.ones_like(labels), strengths, start=together + 0.1, tol=1e-10).weights
    monkeypatch.setattr(solver, "CHUNK_ELEMENTS", len(x) * 2)
    chunked = solve(design, labels, torch.ones_like(labels), strengths, tol=1e-10).weights
    alone = solve(design, labels[:, 3:4], torch.ones_like(labels[:, :1]), strengths[:1], tol=1e-10).weights
    for other in (warm, chunked):
        torch.testing.assert_close(together, other, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(together[:, 3:4], alone, rtol=1e-7, atol=1e-8)


def test_an_unsolved_problem_says_so():
    x, y = data("tall")
    design, y = Design.of(torch.from_numpy(x)), torch.from_numpy(y)[:, None]
    strength = torch.tensor([10.0], dtype=torch.float64)
    assert not solve(design, y, torch.ones_like(y), strength, max_steps=1).converged.any()


def test_a_row_of_weight_two_counts_as_two_rows():
    x, y = data("tall")
    twice = np.concatenate([x, x[:50]]), np.concatenate([y, y[:50]])
    weights = np.ones(len(x))
    weights[:50] = 2
    plain = Design.of(torch.from_numpy(x), standardise=False)
    doubled = Design.of(torch.from_numpy(twice[0]), standardise=False)
    strength = torch.tensor([0.5], dtype=torch.float64)
    weighted = solve(
        plain, torch.from_numpy(y)[:, None], torch.from_numpy(weights)[:, None], strength, tol=1e-10
    )
    repeated = solve(
        doubled,
        torch.from_numpy(twice[1])[:, None],
        torch.ones(len(twice[1]), 1, dtype=torch.float64),
        strength,
        tol=1e-10,
    )
    torch.testing.assert_close(
        plain.raw(weighted.weights)[0], doubled.raw(repeated.weights)[0], rtol=1e-6, atol=1e-8
    )
