"""The reference's probes on the policy and back, retrained, and what a gap between the two comes from.

A probe's site is read in both models at the probe's own token, in the one pass. The label is the data's, the
same for both models, and figures are on the held-out pairs of a split as `fit_probes` makes it (a split
column wins). The gap between what the probe reaches on the reference and on the policy is then taken apart,
each step with more freedom than the one before, and only the last of them seeing labels:

- shift: the policy's vectors moved by the difference of the two models' means, then read by the probe;
- rotation: read through the Procrustes map of the policy's vectors onto the reference's (`model_transfer`);
- other linear change: read through a ridge map, or by a probe that was trained anew on the policy;
- loss: what a probe trained anew on the policy lacks to one trained anew on the reference.

Maps are fitted on the fitted pairs alone. The null of a gap exchanges the two models' scores pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.activations.select import Row, Selection, selection
from veridical.comparison.resampling import by_row, exchanged
from veridical.config import ProbeConfig
from veridical.errors import VeridicalError
from veridical.probes import evaluate
from veridical.probes.base import LinearProbe
from veridical.probes.crossfit import fold_numbers
from veridical.probes.data import Source, Task, choose_rows
from veridical.probes.duplicates import without_copies
from veridical.probes.model_transfer import procrustes_map, ridge_map
from veridical.probes.origin import Origin
from veridical.probes.result import SiteResult
from veridical.probes.sequence import SequenceProbe
from veridical.probes.sweep import run_sweep
from veridical.probes.texts import read_texts
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.comparison.duo import Duo
    from veridical.comparison.resampling import Resampling
    from veridical.comparison.rows import Rows
    from veridical.comparison.streaming import Step

SHUFFLES = 20
FOLDS = 5
ON_REFERENCE, ON_POLICY, SHIFTED, TURNED, MAPPED = (
    "reference's probe on the reference",
    "reference's probe on the policy",
    "reference's probe on the policy, shifted",
    "reference's probe on the policy, rotated",
    "reference's probe on the policy, mapped",
)
ANEW, ANEW_REFERENCE, BACK = (
    "trained anew on the policy",
    "trained anew on the reference",
    "policy's probe on the reference",
)
TEXT, SHUFFLED, RANDOM, UNPAIRED = (
    "control: text alone",
    "control: shuffled labels, on the policy",
    "control: random directions, on the policy",
    "control: mapped by shuffled pairs",
)
STEPS = ("shift", "rotation", "other linear change", "loss")
COLUMNS = [
    "probe", "reading", "site", "auroc", "low", "high", "accuracy", "accuracy_low", "accuracy_high", "pairs",
]  # fmt: skip
GAP_COLUMNS = ["probe", "gap", "measure", "value", "low", "high", "p", "explained", "share", *STEPS]


@dataclass(frozen=True)
class Wanted:
    """A probe that can be read on both models, and where.

    Attributes:
        name: What it is called in tables.
        probe: The probe.
        site: Short name of its site.
        tokens: Tokens that it reads.
    """

    name: str
    probe: LinearProbe
    site: str
    tokens: Selection


def usable(probes: Sequence[Any], duo: Duo, data: Any, rows: Rows) -> tuple[list[Wanted], dict[str, str]]:
    """The probes that can be read on both models, and why the others can't, by name."""
    found, missing = [], {}
    for number, probe in enumerate(probes):
        origin = getattr(probe, "origin_", Origin())
        site, target, tokens = origin.site, origin.target, origin.tokens
        name = f"probe for {target} at {Site.parse(site).short}" if site else f"probe {number}"
        if name in missing or any(name == each.name for each in found):
            name = f"{name} (number {number})"
        why = ""
        if not duo.applies("probes"):
            why = duo.not_applicable["probes"]
        elif not isinstance(probe, LinearProbe) or isinstance(probe, SequenceProbe):
            why = "it reads more than one vector"
        elif site is None or target is None or tokens is None:
            why = "it does not say which site, token and label it was fitted on"
        elif not rows.encoded or not hasattr(data, "groups"):
            why = "the data are not pairs with labels"
        elif target not in data:
            why = f"the data have no column {target}"
            why += " (vd.check_beliefs adds it)" if target in ("lied", "confused", "known") else ""
        if why or site is None:
            missing[name] = why
        else:
            found.append(Wanted(name, probe, Site.parse(site).short, selection(str(tokens))))
    return found, missing


class ProbeRows:
    """Keeps the vectors that probes read: those of their sites and tokens, of both models.

    Memory grows with the labelled rows, by the site's width for each token that is read.

    Args:
        wanted: The probes.
        rows: What is read, with its encodings.
        data: The pairs, for prompts and spans.
    """

    def __init__(self, wanted: Sequence[Wanted], rows: Rows, data: Any) -> None:
        self.places = {(each.site, each.tokens.name): each.tokens for each in wanted}
        self.rows, self.data = rows, data
        there = {"span_start", "span_end"} <= set(data.columns)
        self.spans = (data["span_start"], data["span_end"]) if there else None
        self.taken: dict[tuple[str, str], list[tuple[np.ndarray, Tensor, Tensor]]] = {
            key: [] for key in self.places
        }

    def add(self, step: Step) -> None:
        starts = np.cumsum([0, *step.counts.long().tolist()])
        for key, tokens in self.places.items():
            at, lines = [], []
            for line, number in enumerate(step.numbers.tolist()):
                picked = tokens.positions(self.rows.encoded[number], self._row(number))
                at += (starts[line] + picked).tolist()
                lines += [line] * len(picked)
            index = torch.tensor(at, dtype=torch.long, device=step.row.device)
            sides = [side[index].flatten(1) for side in step.streams[key[0]]]
            if tokens.pooled:
                onto = torch.tensor(lines, device=step.row.device)
                counts = torch.bincount(onto, minlength=len(step))[:, None]
                sides = [by_row(onto, len(step), side) / counts for side in sides]
                lines = range(len(step))
            owners = step.numbers[np.asarray(lines, dtype=np.int64)]
            self.taken[key].append((owners, sides[0].cpu(), sides[1].cpu()))

    def _row(self, number: int) -> Row:
        span = None if self.spans is None else (self.spans[0][number], self.spans[1][number])
        completion = self.data.completions is not None and bool(self.data.completions[number])
        return Row(number, self.data.prompts[number], completion, span)

    def sources(self, each: Wanted, duo: Duo) -> tuple[Source, Source]:
        """What was read for a probe of reference and policy, row after row, with all label columns."""
        parts = self.taken[each.site, each.tokens.name]
        units = np.concatenate([owner for owner, *_ in parts])
        order = np.argsort(units, kind="stable")
        units, data = units[order], self.data
        columns = {name: _column(data[name], units) for name in data.columns}
        texts, notes = read_texts(columns, each.tokens.name)
        made = []
        policy, reference = torch.cat([x for _, x, _ in parts]), torch.cat([y for _, _, y in parts])
        for model, taken in ((duo.reference, reference), (duo.policy, policy)):
            vectors = taken[torch.from_numpy(order)]
            facts = {
                "tokens": each.tokens.name,
                "model": model.path,
                "model_fingerprint": model.fingerprint(),
            }
            made.append(
                Source(
                    (each.site,), lambda _, rows, v=vectors: v[torch.as_tensor(rows)],
                    {each.site: tuple(vectors.shape[1:])}, columns, data.groups[units], units, texts,
                    {**facts, "data_fingerprint": data.fingerprint}, notes,
                )
            )  # fmt: skip
        return made[0], made[1]


def _column(values: Any, units: np.ndarray) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values[units]
    made = np.empty(len(units), dtype=object)
    made[:] = [values[unit] for unit in units]
    return made


def transferred(
    wanted: Sequence[Wanted], kept: ProbeRows, duo: Duo, resampling: Resampling, missing: Mapping[str, str]
) -> dict[str, pd.DataFrame]:
    """Tables "probes" (`COLUMNS`), "probe gaps" (`GAP_COLUMNS`) and "probes left out" (`probe`, `why`).

    Gaps, each with its 95 % interval and the `p` of exchanging the two models within pairs: "to the policy"
    (what the reference's probe loses there), "back" (what the policy's probe loses on the reference), and
    "trained anew" (what a probe trained on the policy lacks to one trained on the reference). Of the first,
    `explained` names the step that recovers most of it, `share` how much, and the columns of `STEPS` the
    share of each; empty and NaN where there is no gap to explain.
    """
    lines, gaps, left = [], [], dict(missing)
    for each in wanted:
        reference, policy = kept.sources(each, duo)
        try:
            found = Transfer.of(each, reference, policy, resampling)
        except VeridicalError as error:
            left[each.name] = str(error)
            continue
        lines += found.lines()
        gaps += found.gaps()
    return {
        "probes": pd.DataFrame(lines, columns=COLUMNS),
        "probe gaps": pd.DataFrame(gaps, columns=GAP_COLUMNS),
        "probes left out": pd.DataFrame(list(left.items()), columns=["probe", "why"]),
    }


@dataclass(frozen=True)
class Transfer:
    """One probe's readings of the held-out rows.

    Attributes:
        wanted: The probe.
        scores: By reading, decision values `[test]`.
        control: Decision values by the map of shuffled pairs, `[test, shuffles]`.
        anew, anew_reference: Probes trained anew on policy and reference, with their own controls.
        text: Figures of the text-only baseline; None without texts.
        truth, groups: Of the held-out rows.
        weights: `[resamples, test]`.
        seed: Of the null.
    """

    wanted: Wanted
    scores: Mapping[str, np.ndarray]
    control: np.ndarray
    anew: SiteResult
    anew_reference: SiteResult
    text: Mapping[str, evaluate.Estimate] | None
    truth: np.ndarray
    groups: np.ndarray
    weights: np.ndarray
    seed: int

    @classmethod
    def of(cls, wanted: Wanted, reference: Source, policy: Source, resampling: Resampling) -> Transfer:
        """Reads and trains on the same rows of both.

        Raises:
            VeridicalError: Rows that no probe can be trained and tested on.
        """
        probe, origin = wanted.probe, wanted.probe.origin_
        strengths = (float(getattr(probe, "C", 1.0)),)
        seed = resampling.seed if origin.seed is None else origin.seed
        config = ProbeConfig(
            target=str(origin.target), where=tuple(origin.where), seed=seed, folds=FOLDS, shuffles=SHUFFLES,
            strengths=strengths, bootstrap=resampling.count, progress=False,
        )  # fmt: skip
        reference = without_copies(reference)
        policy = replace(policy, groups=reference.groups)
        task = choose_rows(reference, config, config.where)
        sweeps = [run_sweep(side, task, config, probe.at(strengths[0])) for side in (reference, policy)]
        x, y = (side.vectors(wanted.site, np.arange(len(side))) for side in (reference, policy))
        scores, control = _readings(probe, x, y, task, reference.groups, seed)
        anew_reference, anew = (sweep[sweep.best_site] for sweep in sweeps)
        scores |= {
            ANEW: anew.test_scores,
            ANEW_REFERENCE: anew_reference.test_scores,
            BACK: anew.probe.decision_function(x[task.test]),
        }
        groups = reference.groups[task.test]
        weights = evaluate.resample_weights(groups, resampling.count, seed)
        return cls(
            wanted, {name: evaluate.settled(s[:, None])[:, 0] for name, s in scores.items()}, control, anew,
            anew_reference, sweeps[1].text, task.positive[task.test], groups, weights, seed,
        )  # fmt: skip

    def lines(self) -> list[dict[str, Any]]:
        """One line per reading and control."""
        measured = {
            name: evaluate.measure(scores, self.truth, self.weights) for name, scores in self.scores.items()
        }
        if self.text is not None:
            measured[TEXT] = dict(self.text)
        mapped = evaluate.auroc(evaluate.settled(self.control), self.truth)
        for name, draws in ((SHUFFLED, self.anew.control), (RANDOM, self.anew.random), (UNPAIRED, mapped)):
            if len(draws):
                low, high = np.quantile(draws, [0.025, 0.975])
                measured[name] = {"auroc": evaluate.Estimate(float(np.mean(draws)), float(low), float(high))}
        return [self._line(name, figures) for name, figures in measured.items()]

    def _line(self, reading: str, figures: Mapping[str, evaluate.Estimate]) -> dict[str, Any]:
        nothing = evaluate.Estimate(np.nan, np.nan, np.nan)
        auroc, accuracy = (figures.get(name, nothing) for name in ("auroc", "accuracy"))
        values = (auroc.value, auroc.low, auroc.high, accuracy.value, accuracy.low, accuracy.high)
        pairs = len(np.unique(self.groups))
        return dict(zip(COLUMNS, (self.wanted.name, reading, self.wanted.site, *values, pairs)))

    def gaps(self) -> list[dict[str, Any]]:
        """One line per gap and measure."""
        return [
            self._gap(gap, measure, before, after)
            for gap, before, after in (
                ("to the policy", ON_REFERENCE, ON_POLICY),
                ("back", ANEW, BACK),
                ("trained anew", ANEW_REFERENCE, ANEW),
            )
            for measure in ("auroc", "accuracy")
        ]

    def _gap(self, gap: str, measure: str, before: str, after: str) -> dict[str, Any]:
        first, second = self.scores[before], self.scores[after]
        ones = np.ones((1, len(self.truth)))

        def change(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
            both = [
                evaluate.weighted_metrics(side, self.truth, weights, ("auroc", "accuracy"))[measure]
                for side in (a, b)
            ]
            return both[1] - both[0]

        value = float(change(first, second, ones)[0])
        found = evaluate.estimate(value, change(first, second, self.weights))
        p = exchanged(value, lambda a, b: float(change(a, b, ones)[0]), first, second, self.groups, self.seed)
        line = dict.fromkeys(GAP_COLUMNS, float("nan")) | {
            "probe": self.wanted.name, "gap": gap, "measure": measure, "value": value, "low": found.low,
            "high": found.high, "p": p, "explained": "",
        }  # fmt: skip
        return line | (self._explained(measure) if gap == "to the policy" and value < 0 else {})

    def _explained(self, measure: str) -> dict[str, Any]:
        reached = {
            name: float(
                evaluate.weighted_metrics(
                    scores, self.truth, np.ones((1, len(scores))), ("auroc", "accuracy")
                )[measure][0]
            )
            for name, scores in self.scores.items()
        }
        return explained(reached)


def explained(reached: Mapping[str, float]) -> dict[str, Any]:
    """Shares of `STEPS` in a gap, from what each reading reaches; `explained` names the largest.

    A step's part is what it adds to the best reading before it; what nothing recovers and a new probe lacks
    is the loss.
    """
    best, parts = reached[ON_POLICY], []
    for readings in ((SHIFTED,), (TURNED,), (MAPPED, ANEW)):
        further = max(best, *(reached[reading] for reading in readings))
        parts.append(further - best)
        best = further
    # No more than the gap can be recovered.
    room = max(reached[ON_REFERENCE] - reached[ON_POLICY], 0.0)
    parts = [min(part, max(room - sum(parts[:at]), 0.0)) for at, part in enumerate(parts)]
    parts.append(max(0.0, reached[ANEW_REFERENCE] - reached[ANEW]))
    whole = sum(parts)
    if not whole > 0:
        return {}
    shares = {name: part / whole for name, part in zip(STEPS, parts)}
    largest = max(shares, key=lambda name: shares[name])
    return {"explained": largest, "share": shares[largest], **shares}


def _readings(
    probe: LinearProbe, x: Tensor, y: Tensor, task: Task, groups: np.ndarray, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Decision values of the reference's probe on the held-out rows, and those by maps of shuffled pairs.

    Args:
        probe: The probe.
        x, y: Vectors of reference and policy, `[n, d]` float64.
        task: Fitted and held-out rows.
        groups: `[n]`, pair of each row.
        seed: Of folds and shuffles.
    """
    fit, test = task.fit, task.test
    coefficients, intercept = torch.from_numpy(probe.coef_[0]).to(x), float(probe.intercept_[0])
    wanted = x[fit] @ coefficients + intercept
    random = np.random.default_rng([seed, 6])
    shuffles = [torch.from_numpy(random.permutation(len(fit))) for _ in range(SHUFFLES)]
    folds = fold_numbers(groups[fit], FOLDS, seed, np.zeros(len(fit)))
    mapped = ridge_map(y[fit], torch.stack([wanted, *(wanted[s] for s in shuffles)], 1), folds)
    turned, shift = procrustes_map(y[fit], x[fit], coefficients, intercept)
    moved = y[test] + (x[fit].mean(0) - y[fit].mean(0))
    through = (y[test] @ mapped.coefficients.T + mapped.intercepts).numpy()
    scores = {
        ON_REFERENCE: probe.decision_function(x[test]),
        ON_POLICY: probe.decision_function(y[test]),
        SHIFTED: probe.decision_function(moved),
        TURNED: (y[test] @ turned + shift).numpy(),
        MAPPED: through[:, 0],
    }
    return scores, through[:, 1:]
