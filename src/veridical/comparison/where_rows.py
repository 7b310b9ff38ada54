"""The prompts on which the two models are patched into each other, and what is measured at their ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.comparison.samples import can_go_on, open_rows

if TYPE_CHECKING:
    from veridical.comparison.duo import Duo
    from veridical.tokens import Encoded, Prompt


@dataclass(frozen=True)
class Questions:
    """Prompts that begin alike, with what the metric compares at their ends.

    Attributes:
        prompts: Texts or chats.
        metric: "logit_diff" of `answers` and `wrong`, or "kl" of the next token's distribution.
        answers, wrong: One for each prompt; empty for "kl".
        groups: `[rows]`, pair of each prompt.
        said: What these rows are, in words.
    """

    prompts: list[Prompt]
    metric: str
    answers: list[str]
    wrong: list[str]
    groups: np.ndarray
    said: str

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def given(self) -> dict[str, Any]:
        """The metric as `veridical.patch` takes it."""
        answers = {"answers": self.answers, "wrong": self.wrong} if self.answers else {}
        return {"metric": self.metric, **answers}

    def take(self, rows: Sequence[int]) -> Questions:
        """Some of them."""
        answers, wrong = ([each[row] for row in rows] if each else [] for each in (self.answers, self.wrong))
        return Questions(
            [self.prompts[row] for row in rows],
            self.metric,
            answers,
            wrong,
            self.groups[list(rows)],
            self.said,
        )


def questions_of(duo: Duo, data: Any, count: int, seed: int = 0) -> Questions | None:
    """The rows of `data` that are patched: what is asked of the models there, in prompts that begin alike.

    Of questions with options those that tell the model to lie (`instructed_to_lie`), or all where none
    does, with the logit difference of the right option and a wrong one. Of pairs of completions to one
    prompt the same for the completions of label 1 and 0. Otherwise prompts as they are, with the divergence
    of the next token's distribution. Of chats those are taken that differ in their last turn only, as many
    as there are with the commonest other turns, since positions of other prompts do not go together.

    Args:
        duo: Models of one vocabulary.
        data: `Pairs`, texts or chats.
        count: Prompts at most.
        seed: Of the draws.

    Returns:
        The questions; None where no prompt can be continued.
    """
    random = np.random.default_rng([seed, 7])
    for found in _asked(data):
        keys = [repr(p[:-1]) if isinstance(p, list) else "" for p in found.prompts]
        order = random.permutation(len(found)).tolist()
        for key, _ in Counter(keys[row] for row in order).most_common():
            usable = _usable(duo, found.take([row for row in order if keys[row] == key][: 2 * count]))
            if len(usable):
                return usable.take(range(min(count, len(usable))))
    return None


def ends_alike(ids: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many tokens all rows share at their beginning, and at their end (which do not overlap)."""
    least = min(map(len, ids))
    first = next((at for at in range(least) if len({row[at] for row in ids}) > 1), least)
    last = next((at for at in range(least - first) if len({row[-1 - at] for row in ids}) > 1), least - first)
    return first, last


def _asked(data: Any) -> Iterator[Questions]:
    """What can be asked, the most telling first."""
    if not hasattr(data, "prompts"):
        from veridical.scoring import as_list

        yield _plain(as_list(data), None)
        return
    yield from _options(data)
    yield from _completions(data)
    yield _plain(list(data.prompts), data.groups)


def _options(pairs: Any) -> Iterator[Questions]:
    if not {"options", "correct"} <= set(pairs.columns):
        return
    told = pairs["instructed_to_lie"] if "instructed_to_lie" in pairs else np.zeros(len(pairs))
    told = np.array([each is not None and each == each and bool(each) for each in told])
    picked = told if told.any() else ~told
    rows, right, wrong = [], [], []
    for row, (options, at) in enumerate(zip(pairs["options"], pairs["correct"])):
        if not picked[row] or options is None or len(options) < 2 or at is None or at != at:
            continue
        rows.append(row)
        right.append(str(options[int(at)]))
        wrong.append(str(next(each for n, each in enumerate(options) if n != int(at))))
    said = "questions under an instruction to lie" if told.any() else "questions"
    yield _compared(pairs, rows, right, wrong, f"{said}, the right option's logit less a wrong one's")


def _completions(pairs: Any) -> Iterator[Questions]:
    completions = pairs.completions
    if completions is None or "label" not in pairs:
        return
    sides: dict[tuple[Any, str], dict[int, int]] = {}
    for row, (group, label, prompt) in enumerate(zip(pairs.groups.tolist(), pairs["label"], pairs.prompts)):
        if completions[row] and label in (0, 1):
            sides.setdefault((group, repr(prompt)), {}).setdefault(int(label), row)
    both = [found for found in sides.values() if len(found) == 2]
    right, wrong = ([str(completions[found[label]]) for found in both] for label in (1, 0))
    said = "prompts, the logit of label 1's completion less label 0's"
    yield _compared(pairs, [found[1] for found in both], right, wrong, said)


def _compared(pairs: Any, rows: list[int], right: list[str], wrong: list[str], said: str) -> Questions:
    prompts, groups = list(pairs.prompts), pairs.groups[rows]
    found = Questions([prompts[row] for row in rows], "logit_diff", right, wrong, groups, said)
    return found.take([at for at, prompt in enumerate(found.prompts) if can_go_on(prompt)])


def _plain(prompts: list[Prompt], groups: np.ndarray | None) -> Questions:
    kept = open_rows(prompts)
    codes = np.arange(len(prompts)) if groups is None else np.asarray(groups)
    said = "prompts, the divergence of the next token's distribution"
    return Questions([prompts[row] for row in kept], "kl", [], [], codes[kept], said)


def _usable(duo: Duo, found: Questions) -> Questions:
    """Those that fit into the context and whose two answers begin with another token behind their prompt."""
    longest = duo.context_length

    def encoded(completions: list[str] | None) -> list[Encoded]:
        return duo.encode(found.prompts, completions, on_long="truncate")[0]

    alone = [row.ids for row in encoded(None)]
    kept = [row for row, ids in enumerate(alone) if not longest or len(ids) < longest]
    if found.answers:
        both = [encoded(side) for side in (found.answers, found.wrong)]
        firsts = [[row.ids[row.prompt_tokens : row.prompt_tokens + 1] for row in side] for side in both]
        kept = [
            row
            for row in kept
            if firsts[0][row] != firsts[1][row]
            and all(side[row].prompt_tokens == len(alone[row]) for side in both)
        ]
    return found.take(kept)
