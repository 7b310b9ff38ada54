"""Label guidelines as data: criteria, ranked completions, and how far labellers agree.

A labeller ranks the completions of a prompt under a criterion: 1 is best, equal ranks are ties, and None is a
fail (unusable, such as off topic or cut short). Rankings become preferences: of every two completions the
better ranked wins, a fail loses to whatever did not fail, ties and two fails say nothing. Several labellers
vote; the margin of a pair is the share of the votes that were for it less the share against.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from veridical.config import load_recipe
from veridical.errors import DataError, unknown
from veridical.preference.data import Preference, Preferences
from veridical.provenance import fingerprint
from veridical.tokens import Prompt

BETTER, TIE, WORSE = 1, 0, -1


@dataclass(frozen=True)
class Criterion:
    """What a labeller judges.

    Attributes:
        name: Short name, such as "honest".
        question: What is asked of the labeller.
        weight: Weight of its votes where several criteria are joined.
    """

    name: str
    question: str
    weight: float = 1.0


HHH: tuple[Criterion, ...] = (
    Criterion("helpful", "Which answer does more of what the user asked for, clearly and completely?"),
    Criterion("honest", "Which answer says what is true and what the assistant has reason to believe?"),
    Criterion("harmless", "Which answer does less harm, to the user or to others?"),
)
"""Helpful, honest, harmless (Askell et al. 2021, arXiv 2112.00861)."""


@dataclass(frozen=True)
class Ranking:
    """One labeller's ranking of the completions of one prompt under one criterion.

    Attributes:
        prompt: Text or chat messages.
        completions: The answers.
        ranks: Rank of each, 1 best, equal ranks for ties; None for a fail.
        labeller: Who ranked.
        criterion: Name of the criterion.
        group: What is never parted between training and test; the prompt where not given.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int | None, ...]
    labeller: str = ""
    criterion: str = ""
    group: Any = None

    def __post_init__(self) -> None:
        if len(self.completions) != len(self.ranks):
            raise DataError(
                f"{len(self.completions)} completions and {len(self.ranks)} ranks; give one for each"
            )
        if len(self.completions) < 2:
            raise DataError(f"a ranking of {len(self.completions)} completions; at least two are compared")
        if len(set(self.completions)) < len(self.completions):
            raise DataError(f"the same completion stands twice in one ranking: {self.completions}")
        for rank in self.ranks:
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
                raise DataError(f"a rank is {rank!r}; expected 1 (best), 2, ... or None for a fail")

    @property
    def key(self) -> str:
        """What makes it the same prompt."""
        return fingerprint([str(self.prompt)])

    def verdicts(self) -> dict[tuple[str, str], int]:
        """`BETTER`, `TIE` or `WORSE` for every two completions, in alphabetical order of the two.

        Two fails are left out: nothing is said of them.
        """
        found = {}
        ranked = sorted(zip(self.completions, self.ranks), key=lambda item: item[0])
        for (one, first), (other, second) in itertools.combinations(ranked, 2):
            if first is None and second is None:
                continue
            worst = 1 + max(rank for rank in (first, second) if rank is not None)
            a, b = (worst if rank is None else rank for rank in (first, second))
            found[one, other] = BETTER if a < b else WORSE if a > b else TIE
        return found


def load_criteria(path: str | Path) -> tuple[Criterion, ...]:
    """Criteria from a YAML file: names as keys, each with `question` and, where wanted, `weight`."""
    made = []
    for name, value in load_recipe(path).items():
        value = {"question": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping) or not isinstance(value.get("question"), str):
            raise DataError(f"{path}: {name} needs a question")
        for key in value:
            if key not in ("question", "weight"):
                raise unknown(f"key of {name}", key, ("question", "weight"))
        made.append(Criterion(name, value["question"], float(value.get("weight", 1.0))))
    if not made:
        raise DataError(f"{path} holds no criteria")
    return tuple(made)


def preferences_from(
    rankings: Iterable[Ranking], criteria: Sequence[Criterion] = HHH, name: str = "rankings"
) -> Preferences:
    """Preferences from the votes of all labellers under all criteria.

    A pair whose weighted votes are level is left out. The margin is the votes for less the votes against,
    over all votes cast on it, ties among them: 1 where all agree.

    Args:
        rankings: Rankings; one without a criterion counts with weight 1.
        criteria: Their weights.
        name: Name of the data.

    Raises:
        UnknownNameError: A ranking under a criterion that is not there.
        DataError: No pair is left.
    """
    weights = {criterion.name: criterion.weight for criterion in criteria}
    votes: dict[tuple[str, str, str], list[float]] = {}
    prompts: dict[str, Ranking] = {}
    for ranking in rankings:
        if ranking.criterion and ranking.criterion not in weights:
            raise unknown("criterion", ranking.criterion, weights)
        weight = weights.get(ranking.criterion, 1.0)
        prompts.setdefault(ranking.key, ranking)
        for (one, other), verdict in ranking.verdicts().items():
            tally = votes.setdefault((ranking.key, one, other), [0.0, 0.0])
            tally[0] += weight * verdict
            tally[1] += weight
    rows = []
    for (key, one, other), (lead, cast) in votes.items():
        if lead == 0 or cast == 0:
            continue
        chosen, rejected = (one, other) if lead > 0 else (other, one)
        held = prompts[key]
        group = key if held.group is None else held.group
        rows.append(Preference(held.prompt, chosen, rejected, abs(lead) / cast, group))
    if not rows:
        raise DataError(f"{name}: every pair is a tie or a fail on both sides; nothing is preferred")
    return Preferences(tuple(rows), name)


@dataclass(frozen=True)
class Agreement:
    """How far labellers agree on pairs of completions.

    Attributes:
        table: One line per criterion and statistic: `kappa`, `agreed` (share of equal verdicts), `pairs`,
            `labellers`, `statistic` ("Cohen" for two labellers, "Fleiss" for more).
    """

    table: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table


def agreement(rankings: Iterable[Ranking]) -> Agreement:
    """Agreement between labellers beyond chance, for every criterion, on better, tie or worse.

    Of two labellers Cohen's kappa (1960), of more Fleiss' kappa (1971) over the pairs that all of them
    judged. 1 is full agreement, 0 what chance gives.

    Raises:
        DataError: Only one labeller, or no pair that all have judged.
    """
    by_criterion: dict[str, dict[tuple[str, str, str], dict[str, int]]] = {}
    for ranking in rankings:
        for (one, other), verdict in ranking.verdicts().items():
            judged = by_criterion.setdefault(ranking.criterion, {}).setdefault((ranking.key, one, other), {})
            if ranking.labeller in judged:
                raise DataError(f"labeller {ranking.labeller!r} judged one pair twice: {one!r}, {other!r}")
            judged[ranking.labeller] = verdict
    if not by_criterion:
        raise DataError("there are no rankings")
    return Agreement(pd.DataFrame([_agreed(name, judged) for name, judged in by_criterion.items()]))


def _agreed(criterion: str, judged: Mapping[Any, Mapping[str, int]]) -> dict[str, Any]:
    labellers = sorted({name for verdicts in judged.values() for name in verdicts})
    if len(labellers) < 2:
        raise DataError(
            f"{criterion or 'the rankings'}: only {labellers[0]!r} has labelled; agreement needs two"
        )
    shared = [[v[name] for name in labellers] for v in judged.values() if len(v) == len(labellers)]
    if not shared:
        raise DataError(f"{criterion or 'the rankings'}: no pair was judged by all of {', '.join(labellers)}")
    verdicts = np.array(shared)
    two = len(labellers) == 2
    statistic: Callable[[np.ndarray], float] = cohen if two else fleiss
    pairwise = itertools.combinations(range(len(labellers)), 2)
    return {
        "criterion": criterion,
        "kappa": statistic(verdicts),
        "agreed": float(np.mean([(verdicts[:, a] == verdicts[:, b]).mean() for a, b in pairwise])),
        "pairs": len(verdicts),
        "labellers": len(labellers),
        "statistic": "Cohen" if two else "Fleiss",
    }


def cohen(verdicts: np.ndarray) -> float:
    """Cohen's kappa of two labellers, from verdicts [pairs, 2]; 1 where both only ever say one thing."""
    from sklearn.metrics import cohen_kappa_score

    if len(np.unique(verdicts)) == 1:
        return 1.0
    return float(cohen_kappa_score(verdicts[:, 0], verdicts[:, 1]))


def fleiss(verdicts: np.ndarray) -> float:
    """Fleiss' kappa of any number of labellers, from verdicts [pairs, labellers]."""
    counts = np.stack([(verdicts == value).sum(1) for value in np.unique(verdicts)], axis=1).astype(
        np.float64
    )
    raters = verdicts.shape[1]
    within = ((counts**2).sum(1) - raters) / (raters * (raters - 1))
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return 1.0 if chance == 1 else float((within.mean() - chance) / (1 - chance))
