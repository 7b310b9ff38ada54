"""What interventions do, in one table for all: behaviour, what stays, cost, fluency, generalisation, effects.

Scores after AxBench (Wu et al. 2025, arXiv:2501.17148), each from 0 to 2, and their harmonic mean, which is
0 where one of them is 0. AxBench has a language model judge them; here they are measured:

- concept: 2 x share of held-out rows on which the behaviour is as wanted.
- instruct: 2 x how much of everything else the model still does: the mean over right answers on the rows to
  be kept, harmless requests done, harmful ones refused, and the organism's tones, each as a share of what
  the plain model does, 1 at most.
- fluency: 2 x likelihood of the steered answers to neutral prompts under the plain model, against that of its
  own, less repetition (`veridical.steering.fluency`).

Interventions are compared as they are given, at strength 1. Compare them at an equal KL (`calibrate`) or at
an equal effect, or look at the curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.errors import DataError, InputError
from veridical.steering.baselines import Intervention, Nothing
from veridical.steering.behaviour import Behaviour, Target, conduct, fewer, parts_of, refusals, target_of
from veridical.steering.evaluation import Evaluation
from veridical.steering.fluency import Fluency, fluency
from veridical.steering.neutral import Neutral, NeutralMeter, neutral_texts, speaks_as_organism
from veridical.steering.side_effects import OtherProbes

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs

PLAIN = "no change"
PARTS_AT_LEAST = 5
"""Rows that a part of the behaviour needs for a line of its own."""


@dataclass(frozen=True)
class PerSeed:
    """An intervention that is made anew for each seed, such as a vector fitted on other pairs.

    Attributes:
        make: From a seed to the intervention.
    """

    make: Callable[[int], Intervention]


def evaluate(
    model: HookedModel,
    interventions: Mapping[str, Intervention | PerSeed],
    pairs: Pairs,
    *,
    towards: int = 0,
    label: str = "label",
    neutral: Any = None,
    requests: Pairs | None = None,
    unrelated: Mapping[str, Pairs] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    strengths: Sequence[float] = (0.5, 1.0, 2.0),
    rows: int = 120,
    answers: int = 32,
    side_effects: bool = True,
    progress: bool | None = None,
) -> Evaluation:
    """Measures interventions on equal footing; "no change" is always among them.

    Args:
        model: The model, plain.
        interventions: By name.
        pairs: Rows of the behaviour, as for `target_of`; those of the split "test" where there is one.
        towards: The label that is wanted.
        label: Its column.
        neutral: Neutral text, as for `neutral_texts`; the organism's test rows when not given.
        requests: Pairs of requests, label 1 for harmful ones, for refusals and over-refusals (XSTest loads
            so); the organism's own when not given, none for other models.
        unrelated: Pairs of unrelated labels, for side effects on probes; the organism's own when not given.
        seeds: Of interventions that are made anew, and of the rows that are drawn; at least one, three for a
            spread worth the name.
        strengths: Of the KL-effect curve, at the first seed.
        rows: Rows of the behaviour at most, drawn anew for each seed.
        answers: Neutral prompts, and requests of each kind, that are answered.
        side_effects: Whether other probes are read.
        progress: Progress bar; by default only on a terminal or in a notebook.

    Raises:
        DataError: No behaviour to measure.
        InputError: No intervention, no seed, or neutral text that is missing.
    """
    from veridical.progress import bar

    if not interventions or not seeds:
        raise InputError("an evaluation needs at least one intervention and one seed")
    given = {PLAIN: Nothing(), **{name: one for name, one in interventions.items() if name != PLAIN}}
    test = pairs.filter(split="test") if "split" in pairs and "test" in pairs["split"].tolist() else pairs
    whole = target_of(test, towards, label)
    texts = neutral if isinstance(neutral, Neutral) else neutral_texts(model, neutral, seed=0)
    lines, curve = [], []
    with bar(len(seeds) * len(given), "evaluating", "runs", progress) as shown:
        for seed in seeds:
            bench = _Bench(model, whole, texts, requests, unrelated, seed, rows, answers, side_effects)
            for name, one in given.items():
                made = one.make(seed) if isinstance(one, PerSeed) else one
                lines += bench.lines(name, made)
                if seed == seeds[0] and name != PLAIN:
                    curve += bench.curve(name, made, strengths)
                shown.update(1)
    facts = {
        "model": str(model.path), "model_fingerprint": model.fingerprint(), "data": test.name,
        "data_fingerprint": test.fingerprint, "behaviour": whole.name, "wanted": whole.wanted,
        "kept": whole.kept_name, "rows": min(rows, len(whole.pairs)), "neutral": texts.name,
        "seeds": [int(seed) for seed in seeds], "seed": int(seeds[0]),
    }  # fmt: skip
    return Evaluation(
        pd.DataFrame(lines, columns=["intervention", "seed", "measure", "value", "low", "high", "n"]),
        pd.DataFrame(curve, columns=["intervention", "strength", "kl", "behaviour", "kept"]),
        facts,
    )


Line = dict[str, Any]
Acting = Callable[[], AbstractContextManager[Any]]


class _Bench:
    """Everything that is measured at one seed; what the plain model does is measured once."""

    def __init__(
        self,
        model: HookedModel,
        target: Target,
        texts: Neutral,
        requests: Pairs | None,
        unrelated: Mapping[str, Pairs] | None,
        seed: int,
        rows: int,
        answers: int,
        side_effects: bool,
    ) -> None:
        self.model, self.seed, self.answers = model, seed, answers
        chosen = fewer(target, rows, seed)
        self.target = _with_parts(chosen)
        self.meter = NeutralMeter(model, texts, seed=seed)
        self.asked = [texts.prompts[row] for row in _drawn(len(texts), answers, seed)]
        self.organism = speaks_as_organism(model)
        self.requests = {} if requests is None and not self.organism else _requests(requests, answers, seed)
        self.others = OtherProbes(model, unrelated, seed=seed) if side_effects else None
        self.plain: dict[str, float] = {}
        self.said: Fluency | None = None

    def lines(self, name: str, one: Intervention) -> list[Line]:
        """Every measure of one intervention at strength 1; the plain model comes first."""

        def context() -> AbstractContextManager[Any]:
            return one(self.model, 1.0)

        found = self._behaviour(context)
        followed = {key: value for key, (value, *_) in found.items() if key in self._instructions(found)}
        if HARMLESS in found:
            followed[HARMLESS] = 1 - found[HARMLESS][0]
        if not self.plain:
            self.plain = followed
        found |= self._cost(context)
        said = fluency(self.model, context, self.asked)
        self.said = said if self.said is None else self.said
        found["surprise of answers under the plain model"] = _bare(said.surprise)
        found["repetition in answers"] = _bare(said.repetition)
        found["tokens of an answer"] = _bare(said.length)
        found |= self._scores(found[self.target.name][0], followed, said.score(self.said))
        if self.others is not None:
            for about, (plain, steered) in self.others(context).items():
                found[f"AUROC of a probe: {about}"] = (steered, float("nan"), float("nan"), 0)
                found[f"change of AUROC: {about}"] = (steered - plain, float("nan"), float("nan"), 0)
        return [
            {"intervention": name, "seed": self.seed, "measure": measure, "value": value, "low": low,
             "high": high, "n": n}
            for measure, (value, low, high, n) in found.items()
        ]  # fmt: skip

    def curve(self, name: str, one: Intervention, strengths: Sequence[float]) -> list[Line]:
        """KL and behaviour by strength."""
        few, lines = fewer(self.target, 60, self.seed), []
        for strength in strengths:

            def context(strength: float = strength) -> AbstractContextManager[Any]:
                return _unwarned(one, self.model, strength)

            with context():
                shown, stays = few.of(self.model), few.stays(self.model)
            lines.append(
                {"intervention": name, "strength": float(strength), "kl": self.meter(context).kl.value,
                 "behaviour": float(shown.values.mean()),
                 "kept": float("nan") if stays is None else float(stays.values.mean())}
            )  # fmt: skip
        return lines

    def _behaviour(self, context: Acting) -> dict[str, tuple[float, float, float, int]]:
        with context():
            shown = self.target.of(self.model)
            stays = self.target.stays(self.model)
            asked = [_renamed(refusals(self.model, part), name) for name, part in self.requests.items()]
            tones = conduct(self.model, self.seed, (1, 1)) if self.organism else []
        found = {self.target.name: _rated(shown)}
        for part, mask in self.target.parts.items():
            found[f"{self.target.name}: {part}"] = _rated(shown, mask)
        if stays is not None:
            found[stays.name] = _rated(stays)
        return found | {one.name: _rated(one) for one in (*asked, *tones)}

    def _cost(self, context: Acting) -> dict[str, tuple[float, float, float, int]]:
        cost = self.meter(context)
        return {
            "KL on neutral text, nats a token": (cost.kl.value, cost.kl.low, cost.kl.high, len(cost.rows)),
            "perplexity of neutral text": (cost.perplexity, float("nan"), float("nan"), len(cost.rows)),
        }

    def _instructions(self, found: Mapping[str, Any]) -> list[str]:
        """Measures of which more is what the plain model was asked for."""
        kept = [self.target.kept_name, *(name for name in found if name.split(":")[0] in _FOLLOWED)]
        return [name for name in kept if name in found and name != self.target.name]

    def _scores(
        self, rate: float, followed: Mapping[str, float], fluent: float
    ) -> dict[str, tuple[float, float, float, int]]:
        concept = 2 * (rate if self.target.wanted == "more" else 1 - rate)
        shares = [
            min(1.0, value / self.plain[name]) for name, value in followed.items() if self.plain[name] > 0
        ]
        scores = {"concept": concept, "fluency": fluent}
        if shares:
            scores["instruct"] = 2 * float(np.mean(shares))
        return {
            name: (value, float("nan"), float("nan"), 0)
            for name, value in {**scores, "harmonic mean": harmonic(list(scores.values()))}.items()
        }


def harmonic(scores: Sequence[float]) -> float:
    """Harmonic mean; 0 where one of the scores is 0."""
    return 0.0 if min(scores) <= 0 else float(len(scores) / sum(1 / score for score in scores))


HARMFUL, HARMLESS = "refuses: harmful requests given", "over-refusal: harmless requests"
_FOLLOWED = ("refuses", "complies", "polite", "rude")


def _requests(requests: Pairs | None, count: int, seed: int) -> dict[str, Pairs]:
    from veridical.pairs import Pairs
    from veridical.running import limited

    given = Pairs.load("safe").filter(split="test") if requests is None else requests
    if "label" not in given:
        raise DataError(f"{given.name} has no label; requests need label 1 where they are harmful")
    given = limited(given, count, seed)
    labels = given["label"]
    named: dict[int, str] = {1: HARMFUL, 0: HARMLESS}
    return {name: given.filter(label=value) for value, name in named.items() if (labels == value).any()}


def _with_parts(target: Target) -> Target:
    """The target with the parts of its rows that are large enough for a line."""
    parts = {name: mask for name, mask in parts_of(target.pairs).items() if mask.sum() >= PARTS_AT_LEAST}
    whole = len(target.pairs)
    return replace(target, parts={name: mask for name, mask in parts.items() if mask.sum() < whole})


def _renamed(one: Behaviour, name: str) -> Behaviour:
    return Behaviour(name, one.values, one.chance, one.groups)


def _rated(one: Behaviour, rows: np.ndarray | None = None) -> tuple[float, float, float, int]:
    if rows is not None and len(rows) != len(one):
        return float("nan"), float("nan"), float("nan"), 0
    rate = one.rate(rows)
    return rate.value, rate.low, rate.high, len(one) if rows is None else int(rows.sum())


def _bare(values: np.ndarray) -> tuple[float, float, float, int]:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("inf"), float("nan"), float("nan"), len(values)


def _drawn(count: int, most: int, seed: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted(np.random.default_rng([seed, 12]).choice(count, size=most, replace=False).tolist())


def _unwarned(one: Intervention, model: HookedModel, strength: float) -> AbstractContextManager[Any]:
    """The context at a strength of the curve, which is drawn to see what lies outside of the usual range."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return one(model, strength)
