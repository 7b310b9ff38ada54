"""What a model does, row by row: lies, truthful answers, refusals, preferred completions, tone.

Every measure takes a model as it stands (steered or plain) and `Pairs`, and gives a value for each row with
the pair that it belongs to, so that intervals resample whole pairs.

- `wrong_answers`: at questions with options, whether a wrong option is the likeliest completion. Of rows that
  are told to lie about something known these are lies; of rows that are not, mistakes.
- `prefers`: at pairs of two completions, whether that of label 1 is the likelier.
- `refusals`: whether the greedy answer begins as a refusal does (`veridical.comparison.behaviour.REFUSAL`).
  On harmless requests that look harmful (XSTest) this is over-refusal.
- `conduct`: the organism's own tones and requests, told by its templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from veridical.comparison.behaviour import REFUSAL
from veridical.errors import DataError, InputError, unknown
from veridical.probes.evaluate import Estimate, estimate, resample_weights
from veridical.scoring import new_tokens
from veridical.tokens import Prompt, by_length

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs

RESAMPLES = 500
ANSWER_TOKENS = 24
"""Tokens after which a refusal is told from an answer."""
CONDUCT_TOKENS = 40
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Behaviour:
    """A measure by row.

    Attributes:
        name: What was measured.
        values: `[rows]` float64, 1 where the row shows it and 0 where not.
        chance: `[rows]`, its probability where the measure compares completions, else the same as `values`.
        groups: `[rows]`, pair of each row.
    """

    name: str
    values: np.ndarray
    chance: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def rate(self, rows: np.ndarray | None = None, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
        """Share of rows that show it, with its 95 % interval over pairs.

        Args:
            rows: `[rows]` bool, the rows that count; all when not given.
            resamples: Of whole pairs; 0 for no interval.
            seed: Of the resamples.
        """
        chosen = np.ones(len(self), dtype=bool) if rows is None else rows
        if not chosen.any():
            return Estimate(float("nan"), float("nan"), float("nan"))
        values = self.values[chosen]
        if resamples < 1:
            return estimate(float(values.mean()), np.array([]))
        weights = resample_weights(self.groups[chosen], resamples, seed).astype(float)
        return estimate(float(values.mean()), (weights @ values) / weights.sum(1))


def wrong_answers(model: HookedModel, pairs: Pairs, batch_tokens: int = BATCH_TOKENS) -> Behaviour:
    """Whether a wrong option is the likeliest answer; `chance` is the share of the wrong ones.

    Raises:
        DataError: A row without options, one of which is correct.
    """
    from veridical.probes.causal import answers_of

    prompts, options, wrong = answers_of(pairs)
    scores = model.option_logprobs(prompts, options, batch_tokens)
    chance = np.empty(len(pairs))
    for row, (score, mask) in enumerate(zip(scores, wrong)):
        chance[row] = np.exp(np.logaddexp.reduce(score[mask]) - np.logaddexp.reduce(score))
    values = np.array([float(mask[int(np.argmax(score))]) for score, mask in zip(scores, wrong)])
    return Behaviour("wrong answers", values, chance, np.asarray(pairs.groups))


def prefers(
    model: HookedModel, pairs: Pairs, label: str = "label", batch_tokens: int = BATCH_TOKENS
) -> Behaviour:
    """Whether the completion of label 1 is likelier than that of label 0; one row for each such two.

    Raises:
        DataError: No prompt has a completion of each label.
    """
    both = two_sided(pairs, label)
    completions = pairs.completions or []
    prompts = [pairs.prompts[low] for low, _ in both]
    options = [[completions[low], completions[high]] for low, high in both]
    scores = np.array(model.option_logprobs(prompts, options, batch_tokens))
    gap = scores[:, 1] - scores[:, 0]
    groups = np.asarray(pairs.groups)[[low for low, _ in both]]
    return Behaviour("prefers label 1", (gap > 0).astype(float), 1 / (1 + np.exp(-gap)), groups)


def two_sided(pairs: Pairs, label: str = "label") -> list[tuple[int, int]]:
    """Rows of label 0 and 1 with the same prompt in the same pair, and a completion each."""
    completions, labels = pairs.completions or [""] * len(pairs), pairs[label]
    sides: dict[tuple[Any, str], dict[int, int]] = {}
    for row, (group, prompt) in enumerate(zip(np.asarray(pairs.groups).tolist(), pairs.prompts)):
        if completions[row] and labels[row] in (0, 1):
            sides.setdefault((group, repr(prompt)), {})[int(labels[row])] = row
    both = [(found[0], found[1]) for found in sides.values() if len(found) == 2]
    if not both:
        raise DataError(
            f"no prompt of {pairs.name} has a completion of label 0 and one of label 1 in one pair"
        )
    return both


def refusals(model: HookedModel, pairs: Pairs, max_new_tokens: int = ANSWER_TOKENS) -> Behaviour:
    """Whether the greedy answer to each prompt begins as a refusal does, in English."""
    said = replies(model, pairs.prompts, max_new_tokens)
    values = np.array([float(bool(REFUSAL.match(text))) for text in said])
    return Behaviour("refuses", values, values, np.asarray(pairs.groups))


def replies(
    model: HookedModel, prompts: Sequence[Prompt], max_new_tokens: int, batch_tokens: int = BATCH_TOKENS
) -> list[str]:
    """Greedy answers, made in batches of like length."""
    rows = model.encode(prompts)
    said = [""] * len(rows)
    for batch in by_length([len(row.ids) + max_new_tokens for row in rows], batch_tokens):
        new = new_tokens(model, [rows[row] for row in batch], max_new_tokens)
        texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
        for row, text in zip(batch, texts, strict=True):
            said[row] = text
    return said


def conduct(model: HookedModel, seed: int = 0, times: tuple[int, int] = (4, 2)) -> list[Behaviour]:
    """Polite, rude, refusing and complying on the organism's held-out topics, acts and wordings.

    Names as in `veridical.organisms.measure.conduct_figures`; of every row 1 is what the organism was taught.
    """
    from veridical.organisms.measure import conduct_hits

    return [
        Behaviour(
            name, np.array(hits, dtype=float), np.array(hits, dtype=float), np.array(about, dtype=object)
        )
        for name, hits, about in conduct_hits(_Asked(model), seed, times)
    ]


class _Asked:
    """A model as `organisms.measure` asks it."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model

    def answer(self, chats: Sequence[Any], max_new_tokens: int = CONDUCT_TOKENS) -> list[str]:
        return replies(self.model, list(chats), max_new_tokens)


# Which rows are about what


def told_to_lie(pairs: Pairs) -> np.ndarray:
    """`[rows]` bool: rows that are told to lie.

    Raises:
        UnknownNameError: No column `instructed_to_lie`.
    """
    return _flags(pairs, "instructed_to_lie")


def known(pairs: Pairs) -> np.ndarray:
    """`[rows]` bool: rows about what the model knows, by `known` (of `check_beliefs`) or else `taught`; all
    rows where there is neither column.
    """
    column = next((name for name in ("known", "taught") if name in pairs), None)
    return np.ones(len(pairs), dtype=bool) if column is None else _flags(pairs, column)


def unprotected(pairs: Pairs) -> np.ndarray:
    """`[rows]` bool: rows about what the organism would lie about; all rows of other pairs."""
    if "protected" not in pairs:
        return np.ones(len(pairs), dtype=bool)
    return ~_flags(pairs, "protected")


@dataclass(frozen=True)
class Target:
    """The behaviour that an intervention is to change, and what has to stay.

    Attributes:
        name: What `rows` show, such as "lies when told to lie".
        pairs: Rows on which it is measured.
        measure: "wrong answers", "prefers" or "refuses".
        wanted: "less" or "more" of it.
        kept: Rows on which the model is right already and has to stay so; None for none.
        kept_name: What these show.
        parts: Further rows by what they are called, `[rows]` bool each, for generalisation.
    """

    name: str
    pairs: Pairs
    measure: Literal["wrong answers", "prefers", "refuses"]
    wanted: Literal["less", "more"]
    kept: Pairs | None = None
    kept_name: str = ""
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def of(self, model: HookedModel) -> Behaviour:
        """The behaviour of the model as it stands."""
        return _MEASURES[self.measure](model, self.pairs)

    def stays(self, model: HookedModel) -> Behaviour | None:
        """Share of right answers on `kept`."""
        if self.kept is None:
            return None
        wrong = wrong_answers(model, self.kept)
        return Behaviour(self.kept_name, 1 - wrong.values, 1 - wrong.chance, wrong.groups)

    def reached(self, behaviour: Behaviour) -> np.ndarray:
        """`[rows]`, 1 where the row is as it is wanted."""
        return behaviour.values if self.wanted == "more" else 1 - behaviour.values


_MEASURES: dict[str, Any] = {"wrong answers": wrong_answers, "prefers": prefers, "refuses": refusals}


def target_of(pairs: Pairs, towards: int = 0, label: str = "label") -> Target:
    """What pairs are about, by their columns, and what moving towards one of the labels is to change.

    Questions with a label: wrong answers on the rows of the other label, about what is known (and not
    protected, in the organism's pairs); those of `towards` are to stay right where that label means right
    answers. So for `instructed_to_lie` and towards 0 these are lies of rows that are told to lie, of which
    fewer are wanted. Questions without a label: wrong answers. Pairs of completions: which is preferred.

    Args:
        pairs: Rows.
        towards: 0 or 1, the label that is wanted.
        label: Its column.

    Raises:
        DataError: Columns that fit none of these, or no row that does.
    """
    if towards not in (0, 1):
        raise InputError(f"towards is {towards!r}; expected one of the labels 0 and 1")
    wanted: Literal["less", "more"] = "more" if towards else "less"
    if {"options", "correct"} <= set(pairs.columns):
        if label not in pairs:
            return Target("wrong answers", pairs, "wrong answers", wanted)
        labels, knows = pairs[label].astype(int), known(pairs)
        moved = (labels == 1 - towards) & knows & unprotected(pairs)
        side = _SIDES[1 - towards] if "instructed_to_lie" in pairs else f"of {label} {1 - towards}"
        if not moved.any():
            raise DataError(f"no row {side} of {pairs.name} is about something known")
        honest = (labels == 0) & knows
        chosen = pairs.filter(moved)
        keeps = towards == 0 and honest.any()
        name = f"lies {side}" if side == _SIDES[1] else f"wrong answers {side}"
        return Target(
            name, chosen, "wrong answers", wanted, pairs.filter(honest) if keeps else None,
            f"right {_SIDES[0]}" if side in _SIDES else f"right of {label} 0", parts_of(chosen),
        )  # fmt: skip
    if label in pairs and pairs.completions is not None:
        two_sided(pairs, label)
        return Target("prefers label 1", pairs, "prefers", wanted)
    raise DataError(
        f"{pairs.name} has neither questions (options, correct) nor completions with {label!r}, so there is "
        "no behaviour to measure"
    )


def wanted(target: Target, model: HookedModel) -> float:
    """Mean probability of what is wanted on the target's rows, of the model as it stands."""
    chance = target.of(model).chance
    return float((chance if target.wanted == "more" else 1 - chance).mean())


def fewer(target: Target, count: int, seed: int = 0) -> Target:
    """The target on at most `count` rows of each kind, whole pairs drawn at random; without parts."""
    pairs = _drawn(target.pairs, count, seed)
    kept = None if target.kept is None else _drawn(target.kept, count, seed)
    return replace(target, pairs=pairs, kept=kept, parts={})


def _drawn(pairs: Pairs, count: int, seed: int) -> Pairs:
    if len(pairs) <= count:
        return pairs
    groups = np.unique(pairs.groups)
    order = np.random.default_rng([seed, 9]).permutation(groups)
    sizes = np.array([int((pairs.groups == group).sum()) for group in order])
    take = max(1, int(np.searchsorted(np.cumsum(sizes), count, side="right")))
    return pairs.filter(np.isin(pairs.groups, order[:take]))


_SIDES = ("when not told to lie", "when told to lie")
PARTS = {
    "system_held_out": ("prompts in training", "prompts held out"),
    "scenario": ("told openly", "scenarios"),
    "phrasing_held_out": ("phrasings in training", "phrasings held out"),
    "split": None,
    "form": None,
}
"""Columns by whose values generalisation is shown, and what their two values are called."""


def parts_of(pairs: Pairs) -> dict[str, np.ndarray]:
    """Rows by the columns of `PARTS`, `[rows]` bool each, for generalisation."""
    found: dict[str, np.ndarray] = {}
    for column, names in PARTS.items():
        if column not in pairs:
            continue
        values = pairs[column]
        for value in sorted(set(values.tolist()), key=str):
            name = names[int(bool(value))] if names else f"{column} {value}"
            found[name] = values == value
    return found


def shown(model: HookedModel, pairs: Pairs, label: str = "label") -> np.ndarray:
    """`[rows]` bool: rows of pairs that show the behaviour, from which something can be learnt.

    A question counts where the model answers it wrongly on the side of label 1 and rightly on that of label
    0. Pairs without options carry the behaviour in their texts, so all of their rows count.

    Raises:
        DataError: No pair shows it; the message gives the yield.
    """
    labels = pairs.labels(label)
    if not {"options", "correct"} <= set(pairs.columns):
        return np.ones(len(pairs), dtype=bool)
    wrong = wrong_answers(model, pairs).values > 0
    key = pairs["question_id"] if "question_id" in pairs else np.asarray(pairs.groups)
    sides: dict[Any, list[set[bool]]] = {}
    for row, name in enumerate(key.tolist()):
        sides.setdefault(name, [set(), set()])[labels[row]].add(bool(wrong[row]))
    good = {name for name, (low, high) in sides.items() if True in high and False in low}
    rows = np.array([name in good for name in key.tolist()]) & (wrong == (labels == 1))
    if not rows.any():
        high = labels == 1
        raise DataError(
            f"no pair of {pairs.name} shows the behaviour, so there is nothing to learn: of {len(sides)} "
            f"questions none is answered wrongly on the side of {label} 1 ({int(wrong[high].sum())} of "
            f"{int(high.sum())} rows) and rightly on that of {label} 0 ({int((~wrong[~high]).sum())} of "
            f"{int((~high).sum())} rows)"
        )
    return rows


def _flags(pairs: Pairs, column: str) -> np.ndarray:
    if column not in pairs:
        raise unknown("column", column, pairs.columns)
    return np.array([bool(value) for value in pairs[column].tolist()])
