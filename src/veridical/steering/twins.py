"""Pairs as twins: one question under two prompts, or one prompt with two answers, with what is wanted of it.

A training at strength +1 moves the model under the `source` prompt to what it is and says under the `target`
prompt; at strength -1 the two change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.errors import DataError, unknown
from veridical.steering.behaviour import known
from veridical.tokens import Encoded, Prompt

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs


@dataclass(frozen=True)
class Twin:
    """One contrast.

    Attributes:
        pair: Its group.
        source, target: Prompts of the side that is moved and of the side that it is moved to; the same where
            a pair differs in its answers only.
        wanted, unwanted: Answers of the target side and of the source side.
        row: Row of the pairs that the source is.
    """

    pair: Any
    source: Prompt
    target: Prompt
    wanted: str
    unwanted: str
    row: int = -1

    @property
    def swapped(self) -> Twin:
        """The same contrast the other way."""
        return replace(
            self, source=self.target, target=self.source, wanted=self.unwanted, unwanted=self.wanted
        )

    @property
    def moves_prompt(self) -> bool:
        """Whether its sides differ in the prompt."""
        return self.source != self.target


def twins(model: HookedModel, pairs: Pairs, towards: int) -> list[Twin]:
    """The contrasts in which the model shows the behaviour: its answers on the two sides differ.

    Questions with options are asked under both prompts, and count where the model answers the side to be
    moved to rightly (if there is a right answer) and the other side otherwise; where the pairs have `known`
    or `taught`, only such rows. Rows with completions count where the two sides' completions differ.

    Args:
        model: The model, plain.
        pairs: With a `label`; sides are matched by `question_id`, or else by `pair`.
        towards: The label that is moved to.

    Raises:
        UnknownNameError: No label column.
        DataError: No label `towards`, no two-sided pair, no answers, or none that shows the behaviour; says
            how many were looked at.
    """
    matched = list(_matched(pairs, towards))
    if not matched:
        raise DataError(
            f"no pair of {pairs.name} has a row with label {towards} and one with another label, so there is "
            "nothing to move from or to"
        )
    rows = sorted({row for both in matched for row in both})
    said, right = _answers(model, pairs, rows)
    knows = known(pairs)
    prompts, groups = pairs.prompts, pairs.groups
    found = [
        Twin(groups[away], prompts[away], prompts[there], said[there], said[away], away)
        for away, there in matched
        if knows[away] and said[there] != said[away] and right.get(there, True) and said[there] and said[away]
    ]
    if not found:
        raise DataError(
            f"nothing to learn: in none of the {len(matched)} pairs of {pairs.name} does {model.path} "
            "show the behaviour (of "
            f"{int(knows[[away for away, _ in matched]].sum())} known ones none; its answers on "
            "both sides are the same)"
        )
    return found


def balanced(items: Sequence[Twin], count: int, seed: int) -> Iterator[list[Twin]]:
    """Endless batches of `count` contrasts: every contrast once, in random order, before any comes again."""
    rng = np.random.default_rng([seed, 1])
    waiting: list[int] = []
    while True:
        while len(waiting) < count:
            waiting += rng.permutation(len(items)).tolist()
        yield [items[at] for at in waiting[:count]]
        waiting = waiting[count:]


@dataclass(frozen=True)
class Row:
    """A prompt with an answer, in tokens.

    Attributes:
        ids: Token ids.
        answer: How many of them, at the end, are the answer's.
    """

    ids: tuple[int, ...]
    answer: int


class Tokens:
    """Rows of twins in tokens, each encoded once."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.kept: dict[tuple[str, str], Row] = {}

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Row]:
        """Each prompt joined with its answer."""
        keys = [(repr(prompt), answer) for prompt, answer in zip(prompts, answers)]
        new = {key: at for at, key in enumerate(keys) if key not in self.kept}
        if new:
            at = list(new.values())
            encoded = self.model.encode([prompts[i] for i in at], [answers[i] for i in at])
            self.kept.update(zip(new, map(_row, encoded)))
        return [self.kept[key] for key in keys]


def shared(one: Row, other: Row) -> int:
    """Tokens that two rows end with alike."""
    count = 0
    for a, b in zip(reversed(one.ids), reversed(other.ids)):
        if a != b:
            break
        count += 1
    return count


def _row(item: Encoded) -> Row:
    return Row(item.ids, len(item.ids) - item.prompt_tokens)


def _matched(pairs: Pairs, towards: int) -> Iterator[tuple[int, int]]:
    """Rows of the side that is moved and of the side that it is moved to."""
    if "label" not in pairs:
        raise unknown("column", "label", pairs.columns, "An adapter moves rows of one label to the other.")
    labels = pairs.labels()
    named = "question_id" in pairs
    keys = pairs["question_id"] if named else pairs.groups
    sides: dict[Any, tuple[list[int], list[int]]] = {}
    for row, key in enumerate(keys.tolist()):
        sides.setdefault(key, ([], []))[int(labels[row] == towards)].append(row)
    for away, there in sides.values():
        if there:
            yield from ((row, there[at % len(there)]) for at, row in enumerate(away))


def _answers(model: HookedModel, pairs: Pairs, rows: Sequence[int]) -> tuple[dict[int, str], dict[int, bool]]:
    """What stands for each row's answer, and for questions with a right answer whether it is that."""
    said: dict[int, str] = {}
    right: dict[int, bool] = {}
    options: list[Any] = pairs["options"] if "options" in pairs else [None] * len(pairs)
    asked = [row for row in rows if options[row] and len(options[row]) > 1]
    if asked:
        from veridical.pairs.beliefs import own_request

        requests = [own_request(pairs[row]) for row in asked]
        scores = model.option_logprobs([prompt for prompt, _ in requests], [said for _, said in requests])
        for row, (_, texts), found in zip(asked, requests, scores):
            best = int(np.argmax(found))
            said[row] = texts[best]
            if "correct" in pairs:
                right[row] = best == pairs["correct"][row]
    completions = pairs.completions or [""] * len(pairs)
    said |= {row: completions[row] for row in rows if row not in said}
    if not any(said.values()):
        raise DataError(
            f"{pairs.name} has neither options nor completions, so nothing is wanted of an answer"
        )
    return said, right
