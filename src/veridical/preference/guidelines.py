"""Label guidelines as data: criteria, ranked completions, and the preferences that follow from them.

A labeller ranks the completions of a prompt under a criterion: 1 is best, equal ranks are ties, and None is a
fail (unusable, such as off topic or cut short). Rankings become preferences: of every two completions the
better ranked wins, a fail loses to whatever did not fail, ties and two fails say nothing. Several labellers
vote; the margin of a pair is the share of the votes that were for it less the share against. How far they
agree is in `agreement`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
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
WIDE, LONG = ("prompt", "completions", "ranks"), ("prompt", "completion", "rank")
"""Columns of a file of rankings: a row for each ranking, or for each completion."""


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
        weight = value.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < np.inf:
            raise DataError(f"{path}: the weight of {name} is {weight!r}; expected a number from 0 up")
        made.append(Criterion(name, value["question"], float(weight)))
    if not made:
        raise DataError(f"{path} holds no criteria")
    return tuple(made)


def load_rankings(source: str | Path) -> tuple[Ranking, ...]:
    """Rankings from a csv, tsv, json, jsonl or parquet file.

    Either one row for each ranking, with `prompt`, `completions` and `ranks` (lists; JSON text in a csv), or
    one row for each completion, with `prompt`, `completion` and `rank`. `labeller`, `criterion` and `group`
    are optional. A fail is an empty rank, or the word fail.

    Raises:
        DataError: A row that is no ranking; names it.
        UnknownNameError: A column is missing; gives the nearest.
    """
    from veridical.pairs.loaders import read_rows

    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"no file of rankings at {source}")
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{source} has no rows")
    needed = LONG if "completion" in rows[0] or "rank" in rows[0] else WIDE
    for column in needed:
        if column not in rows[0]:
            raise unknown("column", column, rows[0], f"Needed are {', '.join(WIDE)}, or {', '.join(LONG)}")
    if needed is LONG:
        rows = _gathered(rows)
    made = []
    for at, row in enumerate(rows):
        try:
            made.append(_ranking(row))
        except DataError as error:
            raise DataError(f"{path.name}, ranking {at}: {error}") from error
    return tuple(made)


def votes(rankings: Iterable[Ranking], criteria: Sequence[Criterion] = HHH) -> pd.DataFrame:
    """The votes of all labellers under all criteria, one line for each two completions of a prompt.

    Columns: `prompt`, `group`, `one`, `other`, `lead` (weighted votes for `one` less those for `other`),
    `cast` (weight of all votes, ties among them) and `outcome`: "preferred", "tie" (every vote is one),
    "level" (as many for either) or "fail" (nobody said anything: both failed).

    Raises:
        UnknownNameError: A ranking under a criterion that is not there.
    """
    weights = {criterion.name: criterion.weight for criterion in criteria}
    tallies: dict[tuple[str, str, str], list[float]] = {}
    prompts: dict[str, Ranking] = {}
    for ranking in rankings:
        if ranking.criterion and ranking.criterion not in weights:
            raise unknown("criterion", ranking.criterion, weights)
        weight = weights.get(ranking.criterion, 1.0)
        prompts.setdefault(ranking.key, ranking)
        for one, other in itertools.combinations(sorted(ranking.completions), 2):
            tallies.setdefault((ranking.key, one, other), [0.0, 0.0, 0.0])
        for (one, other), verdict in ranking.verdicts().items():
            tally = tallies[ranking.key, one, other]
            tally[0] += weight * verdict
            tally[1] += weight
            tally[2] += weight * abs(verdict)
    lines = []
    for (key, one, other), (lead, cast, sided) in tallies.items():
        held = prompts[key]
        outcome = "fail" if not cast else "preferred" if lead else "level" if sided else "tie"
        group = key if held.group is None else held.group
        lines.append((held.prompt, group, one, other, lead, cast, outcome))
    return pd.DataFrame(lines, columns=["prompt", "group", "one", "other", "lead", "cast", "outcome"])


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
    rows = []
    for prompt, group, one, other, lead, cast, outcome in votes(rankings, criteria).itertuples(index=False):
        if outcome == "preferred":
            chosen, rejected = (one, other) if lead > 0 else (other, one)
            rows.append(Preference(prompt, chosen, rejected, abs(lead) / cast, group))
    if not rows:
        raise DataError(f"{name}: every pair is a tie or a fail on both sides; nothing is preferred")
    return Preferences(tuple(rows), name)


def _gathered(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one completion each, as rankings: those of one prompt, labeller and criterion together."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        shared = {name: row.get(name) for name in ("prompt", "labeller", "criterion", "group")}
        held = found.setdefault(json.dumps(shared, default=str), {**shared, "completions": [], "ranks": []})
        held["completions"].append(row["completion"])
        held["ranks"].append(row["rank"])
    return list(found.values())


def _ranking(row: Mapping[str, Any]) -> Ranking:
    completions, ranks = (_listed(row[name], name) for name in ("completions", "ranks"))
    for text in completions:
        if not isinstance(text, str) or not text:
            raise DataError(f"a completion is {text!r}; expected a text")
    return Ranking(
        _prompt_of(row["prompt"]), tuple(completions), tuple(map(_rank, ranks)),
        str(row.get("labeller") or ""), str(row.get("criterion") or ""), row.get("group"),
    )  # fmt: skip


def _prompt_of(value: Any) -> Prompt:
    """A text, a chat, or a chat as the JSON text of a csv."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list | tuple | np.ndarray) and len(value):
        messages = [dict(message) if isinstance(message, Mapping) else {} for message in value]
        if all({"role", "content"} <= set(message) for message in messages):
            return messages
    raise DataError(f"the prompt is {value!r}; expected text or chat messages")


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list | tuple | np.ndarray):
        raise DataError(f"{name} is {value!r}; expected a list")
    return list(value)


def _rank(value: Any) -> Any:
    """A rank as files hold it: whole numbers also as 1.0 or "1"; nothing, NaN or "fail" for a fail."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "fail")):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value  # refused by name when the ranking is made
    if np.isnan(number):
        return None
    return int(number) if number.is_integer() else value
