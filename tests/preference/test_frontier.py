"""The fit of over-optimisation recovers planted coefficients; frontier and best-of-n against brute force."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from veridical.errors import DataError, InputError
from veridical.preference.frontier import (
    Frontier,
    best_of_n,
    best_of_n_kl,
    efficient,
    fit_overoptimisation,
    frontier,
)
from veridical.preference.hacking import HackingCheck, check_hacking, judged
from veridical.preference.runs import PreferenceRun


@pytest.mark.parametrize(("form", "a", "b"), [("rl", 1.3, 0.4), ("rl", 0.7, -0.1), ("bon", 0.9, 0.12)])
def test_planted_coefficients_are_recovered(form, a, b):
    d = np.linspace(0, 6, 25)
    safe = np.where(d > 0, d, 1)
    gain = d * (a - b * (np.log(safe) if form == "rl" else d))
    fit = fit_overoptimisation(d, gain, form)
    assert (fit.a, fit.b) == pytest.approx((a, b), abs=1e-9)
    assert fit.r2 == pytest.approx(1)
    np.testing.assert_allclose(fit.at(d), gain, atol=1e-9)
    if b > 0:  # the peak, against a fine grid
        grid = np.linspace(1e-3, 60, 600_000)
        assert fit.peak == pytest.approx(grid[np.argmax(fit.at(grid))], abs=1e-3)
    else:
        assert fit.peak == math.inf


@pytest.mark.parametrize("form", ["rl", "bon"])
def test_intervals_hold_the_planted_coefficients_as_often_as_they_say(form):
    random = np.random.default_rng(0)
    inside = 0
    for seed in range(60):
        d = random.uniform(0.2, 5, size=60)
        gain = d * (1.0 - 0.2 * (np.log(d) if form == "rl" else d)) + random.normal(0, 0.2, size=60)
        fit = fit_overoptimisation(d, gain, form, seed=seed, resamples=200)
        inside += fit.b_low <= 0.2 <= fit.b_high
    assert inside >= 52


def test_points_without_overoptimisation_are_not_called_so():
    d = np.linspace(0.1, 4, 40)
    fit = fit_overoptimisation(d, 0.5 * d + np.random.default_rng(1).normal(0, 0.05, 40))
    assert fit.b_low < 0.02


def test_efficient_points_against_the_definition():
    random = np.random.default_rng(3)
    kl, reward = random.integers(0, 6, 30).astype(float), random.integers(0, 6, 30).astype(float)
    for at, found in enumerate(efficient(kl, reward)):
        beaten = any(
            reward[j] >= reward[at] and kl[j] <= kl[at] and (reward[j] > reward[at] or kl[j] < kl[at])
            for j in range(30)
        )
        assert found == (not beaten)


def test_best_of_n_is_the_mean_over_all_draws():
    random = np.random.default_rng(0)
    proxy, judge = random.normal(size=7), random.normal(size=7)
    for n in (1, 2, 3, 7):
        drawn = [judge[max(rows, key=lambda row: proxy[row])] for rows in itertools.combinations(range(7), n)]
        assert best_of_n(proxy, judge, n) == pytest.approx(np.mean(drawn))
    many = random.normal(size=3000)
    assert best_of_n(many, many, 1500) == pytest.approx(many.max(), abs=0.2)
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    with pytest.raises(DataError):
        best_of_n([1.0], [1.0], 2)


def test_bad_points_end_in_one_line():
    with pytest.raises(DataError, match="3 different distances"):
        fit_overoptimisation([0, 1, 2, 3], [0, 1, 1, 1])
    with pytest.raises(DataError, match="never negative"):
        fit_overoptimisation([-1, 1, 2, 3, 4], [0, 1, 1, 1, 1])
    with pytest.raises(InputError, match="nearest: bon"):
        fit_overoptimisation([1], [1], "bonn")


# Runs


def made(rewards, **columns):
    """A run of two checkpoints whose samples have these columns, [before, after] each."""
    rows = 40
    random = np.random.default_rng(0)
    base = {"reward": [0.0, rewards], "length": [5.0, 5.0], "repetition": [0.0, 0.0], "entropy": [1.0, 1.0]}
    base |= {"kl": [0.0, 1.0]} | columns
    parts = []
    for at, step in enumerate((0, 10)):
        part = {name: values[at] + 0.01 * random.normal(size=rows) for name, values in base.items()}
        answers = (
            ["same"] * rows if columns.get("one_answer") and at else [f"answer {row}" for row in range(rows)]
        )
        parts.append(pd.DataFrame(part).assign(step=step, chat="1", prompt="p", answer=answers))
    samples = pd.concat(parts, ignore_index=True)
    means = samples.groupby("step").mean(numeric_only=True).reset_index()
    facts = {
        "method": "rl", "model": "m", "model_fingerprint": "f", "data": "d", "data_fingerprint": "g",
        "options": {}, "rows": 1, "held_out": 1, "weights": "all weights", "folder": ".", "seed": 0,
    }  # fmt: skip
    return PreferenceRun(means, samples, pd.DataFrame({"loss": [1.0]}), facts)


def test_an_honest_gain_is_not_called_hacking(tmp_path):
    check = check_hacking(made(1.0), judge=lambda prompts, answers: np.arange(len(answers), dtype=float))
    assert not check.hacked
    assert "Nothing says otherwise" in " ".join(check.findings())
    check.save(tmp_path)
    assert HackingCheck.load(tmp_path).to_frame().equals(check.to_frame())


@pytest.mark.parametrize(
    ("columns", "flag"),
    [
        ({"length": [5.0, 9.0]}, "length"),
        ({"repetition": [0.0, 0.4]}, "repetition"),
        ({"entropy": [1.0, 0.2]}, "entropy"),
        ({"one_answer": [0.0, 0.0]}, "variety"),
    ],
)
def test_what_rose_beside_the_reward_is_named(columns, flag):
    check = check_hacking(made(1.0, **columns))
    assert check.hacked
    assert check.table.loc[check.table["flag"], "measure"].tolist() == [flag]
    assert not check_hacking(made(-1.0, **columns)).hacked


def test_a_judge_that_falls_and_a_kl_over_budget_are_named():
    run = made(1.0)
    after = run.samples.index[run.samples["step"] == 10]
    run.samples.loc[after, "answer"] = [f"bad {row}" for row in range(len(after))]
    judge = lambda prompts, answers: [0.0 if "bad" in answer else 1.0 for answer in answers]  # noqa: E731
    check = check_hacking(run, judge, kl_budget=0.5)
    assert set(check.table.loc[check.table["flag"], "measure"]) == {"judge", "kl"}
    assert "the held-out judge fell" in " ".join(check.findings())
    with pytest.raises(DataError, match="no checkpoint at step 7"):
        check_hacking(run, step=7)
    with pytest.raises(DataError, match="finite"):
        check_hacking(run, lambda prompts, answers: [float("nan")] * len(answers))


def test_a_judge_that_falls_from_the_start_is_said_to():
    kl = np.array([0.0, 1.0, 4.0, 9.0, 16.0, 25.0])
    run = made(1.0)
    table = pd.DataFrame({"step": np.arange(6), "kl": kl, "reward": np.sqrt(kl), "judge": -0.2 * np.sqrt(kl)})
    found = frontier([PreferenceRun(table, run.samples, run.log, run.facts)], column="judge")
    assert found.fit.a_high < 0
    assert "falls from the start" in " ".join(found.findings())


def test_a_judge_is_kept_with_every_answer():
    run = made(1.0)
    scores = np.arange(len(run.samples), dtype=float)
    found = judged(run, lambda prompts, answers: scores)
    assert found.samples["judge"].tolist() == scores.tolist()
    assert found.table["judge"].tolist() == [scores[:40].mean(), scores[40:].mean()]
    assert "judge" not in run.table
    line = check_hacking(found).table.set_index("measure").loc["judge"]
    assert (line["before"], line["after"]) == tuple(found.table["judge"])
    with pytest.raises(DataError, match="as many finite numbers"):
        judged(run, lambda prompts, answers: [1.0])


def test_a_frontier_of_runs_is_saved_and_says_what_it_found(tmp_path):
    steps = np.arange(0, 110, 10)
    kl = (steps / 20.0) ** 2
    d = np.sqrt(kl)
    reward = 2 + d * (1.0 - 0.6 * np.log(np.where(d > 0, d, 1)))
    run = made(1.0)
    run = PreferenceRun(
        pd.DataFrame({"step": steps, "kl": kl, "reward": reward}), run.samples, run.log, run.facts
    )
    found = frontier({"one": run})
    assert (found.fit.a, found.fit.b) == pytest.approx((1.0, 0.6))
    assert "Over-optimised" in " ".join(found.findings())
    found.save(tmp_path)
    assert Frontier.load(tmp_path).fit == found.fit
    found.figure()
    with pytest.raises(InputError, match="unknown column"):
        frontier([run], column="judge")
    other = PreferenceRun(run.table, run.samples, run.log, {**run.facts, "model_fingerprint": "h"})
    with pytest.raises(DataError, match="different references"):
        frontier([run, other])
