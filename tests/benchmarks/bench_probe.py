"""A probe sweep against the same fits by scikit-learn in a loop, in one run on the same cores.

    python tests/benchmarks/bench_probe.py            # prints
    python tests/benchmarks/bench_probe.py --write    # also updates results/probe.md and probe.json

Ours is `fit_probes` end to end (selection, refits, controls, bootstraps). Theirs is the fits of the
selection and the refits alone: `LogisticRegression` for every site, label set (true and shuffled), fold and
strength, on data standardised once per site. Both solve the same objective; the run stops with an error if
ours ends above theirs. Both get the same number of threads: torch's, and those of BLAS and OpenMP. A machine
that is busy with something else distorts the ratio, since idle BLAS threads wait for cores that others hold.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from veridical import fit_probes
from veridical.config import ProbeConfig
from veridical.pairs.splits import assign, folds
from veridical.probes.evaluate import permute_over_pairs
from veridical.probes.solver import Design, solve
from veridical.provenance import versions

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs the comparison and prints or writes it."""
    options = read_options()
    torch.set_num_threads(options.threads)
    acts, labels, pairs = planted(options)
    config = ProbeConfig(
        shuffles=options.shuffles, folds=options.folds, text_baseline=False, bootstrap=500, progress=False
    )
    fit_probes({"warm": acts["site0"][:200]}, config, target=labels[:200], groups=pairs[:200])
    ours, theirs = [], []
    with threadpool_limits(options.threads):
        for _ in range(options.repeats):
            ours.append(timed(lambda: fit_probes(acts, config, target=labels, groups=pairs)))
            theirs.append(timed(lambda: loop(acts, labels, pairs, config)))
    excess = objective_excess(acts["site0"], labels, config)
    if excess > 1e-6:
        sys.exit(f"ours ends {excess:.2e} above scikit-learn's objective: the comparison is not fair")
    fits = len(acts) * (1 + options.shuffles) * (options.folds * len(config.strengths) + 1)
    result = {
        "sites": len(acts),
        "rows": options.rows,
        "width": options.width,
        "fits": fits,
        "veridical_s": round(statistics.median(ours), 2),
        "sklearn_s": round(statistics.median(theirs), 2),
        "ratio": round(statistics.median(theirs) / statistics.median(ours), 1),
        "repeats": options.repeats,
        "objective_excess": excess,
        "threads": options.threads,
    }
    text = table(result)
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        facts = {"machine": platform.processor() or platform.machine(), "versions": versions()}
        (RESULTS / "probe.json").write_text(json.dumps({**result, **facts}, indent=2) + "\n")
        (RESULTS / "probe.md").write_text(text)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--shuffles", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


def planted(options: argparse.Namespace) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Correlated features whose spectrum falls as real ones' do, with one direction of signal a site."""
    random = np.random.default_rng(0)
    labels, pairs = np.tile([0, 1], options.rows // 2), np.repeat(np.arange(options.rows // 2), 2)
    acts = {}
    for number in range(options.sites):
        mix = random.normal(size=(options.width, options.width)) * np.arange(1, options.width + 1) ** -0.5
        x = random.normal(size=(len(labels), options.width)) @ mix.T
        direction = random.normal(size=options.width)
        acts[f"site{number}"] = x + 0.3 * number * (labels - 0.5)[:, None] * direction
    return acts, labels, pairs


def loop(acts: dict[str, np.ndarray], labels: np.ndarray, pairs: np.ndarray, config: ProbeConfig) -> None:
    """Every fit of the sweep, one by one."""
    positive = labels == 1
    shares = {"rest": 1 - config.test_fraction, "test": config.test_fraction}
    rest = np.flatnonzero(assign(pairs, shares, config.seed, positive) == "rest")
    random = np.random.default_rng(config.seed)
    truth, groups = positive[rest], pairs[rest]
    sets = [truth] + [permute_over_pairs(truth, groups, rest, random) for _ in range(config.shuffles)]
    splits = folds(groups, config.folds, config.seed, truth)
    for x in acts.values():
        x = x[rest]
        x = (x - x.mean(0)) / x.std(0)
        for y in sets:
            for strength in config.strengths:
                for train, held in splits:
                    fitted(x[train], y[train], strength).decision_function(x[held])
            fitted(x, y, config.strengths[0])


def fitted(x: np.ndarray, y: np.ndarray, strength: float) -> LogisticRegression:
    """scikit-learn with its default solver and tolerance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(C=strength, max_iter=1000).fit(x, y)


def objective_excess(x: np.ndarray, labels: np.ndarray, config: ProbeConfig) -> float:
    """How far above scikit-learn's our objective ends, at most over the strengths, relative to it."""
    design = Design.of(torch.from_numpy(x))
    y = torch.from_numpy(labels.astype(float))[:, None]
    standard = (x - x.mean(0)) / x.std(0)
    worst = -np.inf
    for strength in config.strengths:
        c = torch.tensor([strength], dtype=torch.float64)
        w = solve(design, y, torch.ones_like(y), c, tol=1e-4).weights[:, 0].numpy()
        model = fitted(standard, labels, strength)
        values = [
            value(design.rows.numpy() @ w, w[:-1], labels, strength),
            value(model.decision_function(standard), model.coef_[0], labels, strength),
        ]
        worst = max(worst, (values[0] - values[1]) / values[1])
    return float(worst)


def value(scores: np.ndarray, w: np.ndarray, labels: np.ndarray, strength: float) -> float:
    """The objective of both."""
    return strength * np.logaddexp(0, (1 - 2 * labels) * scores).sum() + w @ w / 2


def timed(run) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(result: dict) -> str:
    """The result as Markdown."""
    head = "| sites | rows x width | fits | veridical, whole sweep | scikit-learn, fits only | ratio |"
    line = (
        f"| {result['sites']} | {result['rows']} x {result['width']} | {result['fits']} | "
        f"{result['veridical_s']} s | {result['sklearn_s']} s | {result['ratio']} |"
    )
    said = (
        f"Median of {result['repeats']} alternating repeats, {result['threads']} threads; our objective ends "
        f"{result['objective_excess']:+.1e} (relative) from scikit-learn's.\n\n"
        "Command: `python tests/benchmarks/bench_probe.py --write`"
    )
    return f"# Probe sweep\n\n{head}\n| --- | --- | --- | --- | --- | --- |\n{line}\n\n{said}\n"


if __name__ == "__main__":
    main()
