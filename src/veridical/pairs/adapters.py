"""Known file layouts, and what each becomes as pairs.

An adapter is a function from the rows of a file (mappings of the file's own columns) to rows of the schema.
To add one, write the function and register it with the columns by which it is recognised; the first that fits
wins.

By default prompts are plain text, which every model reads; `chat=True` makes them chat messages. A completion
of a text prompt starts with its own space, since prompt and completion are joined as they are.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veridical.errors import DataError, unknown
from veridical.pairs import subjects

Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class Adapter:
    """A known layout: how it is called, recognised and read."""

    name: str
    read: Callable[..., Rows]
    columns: frozenset[str]
    fits: Callable[[Rows], bool]

    @property
    def options(self) -> list[str]:
        """Names of the options that its function takes."""
        return [
            name
            for name, parameter in inspect.signature(self.read).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "source"
        ]


ADAPTERS: dict[str, Adapter] = {}
"""Every known layout by name, in the order in which they are tried."""


def recognise(rows: Rows) -> Adapter | None:
    """The first adapter whose columns the rows have."""
    columns = set(rows[0])
    for adapter in ADAPTERS.values():
        if adapter.columns <= columns and adapter.fits(rows):
            return adapter
    return None


def adapt(rows: Rows, name: str, source: Path | None = None, **options: Any) -> Rows:
    """Rows of the schema from the rows of a file, by the adapter called `name`.

    Raises:
        UnknownNameError: No such adapter, or an option that it does not have.
        DataError: A column that it needs is missing.
    """
    if name not in ADAPTERS:
        raise unknown("adapter", name, ADAPTERS)
    adapter = ADAPTERS[name]
    for option in options:
        if option not in adapter.options:
            raise unknown(f"option of the adapter {name!r}", option, adapter.options)
    missing = sorted(adapter.columns - set(rows[0]))
    if missing:
        raise DataError(
            f"the adapter {name!r} needs the columns {', '.join(missing)}; there are: {', '.join(rows[0])}"
        )
    if "source" in inspect.signature(adapter.read).parameters:
        options["source"] = source
    return adapter.read(rows, **options)


def register(*columns: str, fits: Callable[[Rows], bool] = lambda rows: True) -> Callable:
    """Registers a function as the adapter of files that have these columns, under its own name."""

    def add(read: Callable[..., Rows]) -> Callable[..., Rows]:
        ADAPTERS[read.__name__] = Adapter(read.__name__, read, frozenset(columns), fits)
        return read

    return add


Answers = Literal["best", "all"]


@register("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
def truthfulqa(rows: Rows, *, answers: Answers = "best", chat: bool = False) -> Rows:
    """TruthfulQA.csv (Lin et al. 2022): a question, its best answer, and correct and incorrect ones parted by
    ";".

    Every row is a question with one of its answers, `label` 1 when the answer is true; the answers of a
    question share `pair`. `question`, `options` (best answer first, then the incorrect ones) and `correct`
    stand beside them, so that `check_beliefs` can ask the same questions.

    Args:
        rows: Rows of the file.
        answers: `best` takes the best answer and the first incorrect one, so that labels are balanced; `all`
            takes every answer.
        chat: Whether prompts are chat messages.
    """
    adapted = []
    for number, row in enumerate(rows):
        true = _unique([row["Best Answer"], *_listed(row["Correct Answers"])])
        false = _unique(_listed(row["Incorrect Answers"]))
        adapted += _answered(
            number, row["Question"], true, false, answers, chat, category=row.get("Category")
        )
    return adapted


@register("question", "mc1_targets", "mc2_targets")
def truthfulqa_mc(rows: Rows, *, answers: Answers = "best", chat: bool = False) -> Rows:
    """TruthfulQA's mc_task.json: a question with `mc1_targets` and `mc2_targets`, answer to 1 (true) or 0.

    Rows as in `truthfulqa`. The options are those of mc1, of which one is true.
    """
    adapted = []
    for number, row in enumerate(rows):
        single, several = row["mc1_targets"], row["mc2_targets"]
        true = [answer for answer, value in single.items() if value]
        false = [answer for answer, value in single.items() if not value]
        more_true = _unique([*true, *(answer for answer, value in several.items() if value)])
        adapted += _answered(number, row["question"], more_true, false, answers, chat)
    return adapted


@register("prompt", "correct_full_text", "incorrect_full_text")
def caa_quiz(rows: Rows, *, chat: bool = False) -> Rows:
    """CAA's multiple-choice tests (mmlu.json, truthful_qa.json; Rimsky et al. 2024) with one right and one
    wrong answer.

    The choices that the file writes into the prompt are taken out again; rows as in `truthfulqa`.
    """
    adapted = []
    for number, row in enumerate(rows):
        question = row["prompt"].split("\n\nChoices:")[0]
        question = question.removeprefix("Please help me answer the following question.\n")
        true, false = [row["correct_full_text"]], [row["incorrect_full_text"]]
        adapted += _answered(number, question, true, false, "best", chat, category=row.get("category"))
    return adapted


@register("question", "answer_matching_behavior", "answer_not_matching_behavior")
def caa(rows: Rows, *, chat: bool = False) -> Rows:
    """CAA's A/B files (Rimsky et al. 2024): a question that shows its choices, and the letters of two
    answers.

    Each question becomes two rows that share `pair`: `label` 1 with the answer that shows the behaviour
    ("(A)"), 0 with the one that does not.
    """
    adapted = []
    for number, row in enumerate(rows):
        for label, column in ((1, "answer_matching_behavior"), (0, "answer_not_matching_behavior")):
            adapted.append(
                {"pair": number, **_turn(row["question"], row[column].strip(), chat), "label": label}
            )
    return adapted


@register("chosen", "rejected", fits=lambda rows: isinstance(rows[0]["chosen"], str))
def hh_rlhf(rows: Rows, *, chat: bool = True) -> Rows:
    """Anthropic's hh-rlhf (Bai et al. 2022): two dialogues that part at the assistant's last reply.

    `label` 1 is the chosen reply. `dialogue` numbers the file's lines. Dialogues with the same opening turn
    share `pair`, because people opened several with the same words; a dialogue with an empty reply is left
    out, since it has no answer to read. A few dialogues part earlier; each side then keeps its own prompt.
    """
    adapted, openings = [], {}
    for number, row in enumerate(rows):
        sides = [_dialogue(row[side], number) for side in ("chosen", "rejected")]
        if any(not turns[-1]["content"] for turns in sides):
            continue
        pair = openings.setdefault(sides[0][0]["content"], len(openings))
        for label, turns in zip((1, 0), sides):
            reply = turns[-1]["content"]
            prompt = turns[:-1] if chat else _transcript(turns[:-1])
            completion = reply if chat else f" {reply}"
            adapted.append(
                {"pair": pair, "dialogue": number, "prompt": prompt, "completion": completion, "label": label}
            )
    return adapted


@register("prompt", "completion", "final_label", "type")
def xstest_completions(rows: Rows, *, chat: bool = False) -> Rows:
    """XSTest's judged replies (Röttger et al. 2024): `final_label` says whether the model complied or
    refused.

    `label` 1 is a refusal, whole or in part; `refusal` keeps the file's own word, `unsafe` says whether the
    request was harmful. A type and its `contrast_` type go in parallel, so that the n-th of both share
    `pair`.
    """
    adapted = []
    for row, pair in zip(rows, _xstest_pairs(rows)):
        adapted.append(
            {
                "pair": pair,
                **_turn(row["prompt"], row["completion"], chat, "{}\n\n"),
                "label": int(not row["final_label"].startswith("1")),
                "unsafe": int(row["type"].startswith("contrast_")),
                "refusal": row["final_label"],
                "type": row["type"],
            }
        )
    return adapted


@register("prompt", "type", "label", "focus")
def xstest(rows: Rows, *, chat: bool = False) -> Rows:
    """XSTest's prompts (Röttger et al. 2024): harmless requests, and harmful ones in nearly the same words.

    `label` 1 is harmful. A harmful and a harmless request about the same `focus` in a type and its
    `contrast_` type share `pair`; where the file names no focus, the n-th of both do. The discrimination
    prompts about things instead of people have no counterpart and stand alone.
    """
    adapted = []
    for row, pair in zip(rows, _xstest_pairs(rows)):
        label = int(_harmful_word(row["label"]))
        adapted.append(
            {"pair": pair, **_turn(row["prompt"], None, chat), "label": label, "type": row["type"]}
        )
    return adapted


HARMFUL = ("unsafe", "harmful", "toxic", "malicious")
HARMLESS = ("safe", "harmless", "benign", "nontoxic")


@register(
    "prompt", "label", fits=lambda rows: {str(row["label"]).lower() for row in rows} <= {*HARMFUL, *HARMLESS}
)
def harmful(rows: Rows, *, chat: bool = False) -> Rows:
    """Requests labelled in words, harmful or harmless (also unsafe/safe); `label` 1 is harmful.

    A `pair` column is kept; without one every request is its own group.
    """
    return [
        {
            **row,
            **_turn(row["prompt"], row.get("completion"), chat),
            "label": int(_harmful_word(row["label"])),
        }
        for row in rows
    ]


@register("comment", "toxic")
def toxicity(rows: Rows, *, chat: bool = False) -> Rows:
    """Comments with a `toxic` flag, such as Wikipedia talk pages (Dixon et al. 2018); `label` 1 is toxic.

    Rows of one `rev_id`, the revision that a comment is from, share `pair`: the fuzzed set changes names in
    the comments of the other set, so that a comment and its fuzzed twin agree when both are read.
    """
    return [
        {
            "pair": row.get("rev_id", number),
            **_turn(row["comment"], None, chat),
            "label": int(_truth(row["toxic"], number)),
        }
        for number, row in enumerate(rows)
    ]


@register("statement", "label")
def statements(rows: Rows, *, group: str | None = None, chat: bool = False) -> Rows:
    """True and false statements (Azaria and Mitchell 2023; Levinstein and Herrmann 2024; RepE's facts).

    `label` 1 is true. Statements about the same subject share `pair`, a statement and its negation among
    them; see `veridical.pairs.subjects` for why, and for what that cannot see.

    Args:
        rows: Rows of the file.
        group: Column that says what a statement is about, to group by instead.
        chat: Whether prompts are chat messages.
    """
    if group is not None and group not in rows[0]:
        raise unknown("column", group, rows[0])
    texts = [str(row["statement"]).strip() for row in rows]
    about = [row[group] for row in rows] if group else subjects.groups(texts)
    return [
        {"pair": pair, **_turn(text, None, chat), "label": int(_truth(row["label"], number))}
        for number, (row, text, pair) in enumerate(zip(rows, texts, about))
    ]


@register("scenario", "emotion")
def emotions(
    rows: Rows, *, target: str | None = None, seed: int = 0, chat: bool = False, source: Path | None = None
) -> Rows:
    """RepE's emotion scenarios (Zou et al. 2023): a folder of JSON lists of sentences, one list for each
    emotion.

    `label` 1 is the emotion `target`; as many scenarios of the other emotions, drawn at random and evenly,
    are 0. `emotion` keeps the name. Mixed emotions (`happiness_fear`) and the model outputs in the folder are
    left out.

    Args:
        rows: Scenarios with their emotion.
        target: The emotion; that of the file, or the first of the folder.
        seed: Draw of the other scenarios.
        chat: Whether prompts are chat messages.
        source: The file or folder that was read.
    """
    rows = [row for row in rows if "_" not in row["emotion"]]
    found = sorted({row["emotion"] for row in rows})
    target = target or (source.stem if source is not None and source.is_file() else found[0] if found else "")
    if target not in found:
        raise unknown("emotion", target, found)
    texts = list(dict.fromkeys(row["scenario"] for row in rows if row["emotion"] == target))
    adapted = [{**_turn(text, None, chat), "label": 1, "emotion": target} for text in texts]
    others = [name for name in found if name != target]
    if not others:
        raise DataError(
            f"only the emotion {target!r} is there; its folder needs lists of others to compare with"
        )
    draw = random.Random(seed)
    for place, name in enumerate(others):
        pool = sorted({row["scenario"] for row in rows if row["emotion"] == name} - set(texts))
        share = len(texts) // len(others) + (place < len(texts) % len(others))
        for text in draw.sample(pool, min(share, len(pool))):
            adapted.append({**_turn(text, None, chat), "label": 0, "emotion": name})
    return adapted


TEXT_COLUMNS = ("text", "sentence", "question", "comment", "statement", "content", "scenario")


@register(fits=lambda rows: any(isinstance(rows[0].get(name), str) for name in TEXT_COLUMNS))
def texts(rows: Rows, *, chat: bool = False) -> Rows:
    """Any table with a column of text (text, sentence, question, ...); other columns are kept as they are."""
    column = next(name for name in TEXT_COLUMNS if isinstance(rows[0].get(name), str))
    adapted = []
    for row in rows:
        others = {name: value for name, value in row.items() if name != column}
        adapted.append({**others, **_turn(row[column], None, chat)})
    return adapted


# Helpers


def _turn(text: str, reply: str | None, chat: bool, template: str = "{}") -> Row:
    """Prompt and, where there is a reply, completion, as text or as chat."""
    prompt = [{"role": "user", "content": text}] if chat else template.format(text)
    if reply is None:
        return {"prompt": prompt}
    glued = chat or not prompt or str(prompt)[-1].isspace()
    return {"prompt": prompt, "completion": reply if glued else f" {reply}"}


def _answered(
    number: int, question: str, true: list[str], false: list[str], answers: Answers, chat: bool, **more: Any
) -> Rows:
    """Rows of one question, a true and a false answer at a time."""
    if answers not in ("best", "all"):
        raise unknown("choice of answers", answers, ("best", "all"))
    if not true or not false:
        raise DataError(f"question {number} has no {'incorrect' if true else 'correct'} answer: {question!r}")
    kept = (true[:1], false[:1]) if answers == "best" else (true, false)
    shared = {"question": question, "options": [true[0], *false], "correct": 0, "form": "choice", **more}
    template = "{}" if chat else "Q: {}\nA:"
    return [
        {"pair": number, **_turn(question, answer, chat, template), "label": label, **shared}
        for label, side in zip((1, 0), kept)
        for answer in side
    ]


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(";") if part.strip()]


def _unique(answers: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(answer.strip() for answer in answers))


_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _dialogue(text: str, number: int) -> list[dict[str, str]]:
    """Messages of a dialogue; neighbouring turns of one speaker are joined, as templates want it."""
    before, *parts = _TURN.split(text)
    if before.strip() or not parts or parts[0] != "Human" or parts[-2] != "Assistant":
        raise DataError(f"dialogue {number} is not Human and Assistant in turn: {text[:60]!r}")
    turns: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2]):
        if turns and turns[-1]["role"] == _ROLES[speaker]:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{said.strip()}".strip()
        else:
            turns.append({"role": _ROLES[speaker], "content": said.strip()})
    return turns


def _transcript(turns: Sequence[Mapping[str, str]]) -> str:
    names = {role: name for name, role in _ROLES.items()}
    said = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
    return f"{said}\n\nAssistant:"


_XSTEST_CONTRAST = {
    "real_group_nons_discr": "contrast_discr",
    "privacy_public": "contrast_privacy",
    "privacy_fictional": "contrast_privacy",
}
_XSTEST_ALONE = ("nons_group_real_discr",)


def _xstest_pairs(rows: Rows) -> list[str]:
    """Pair id of each XSTest row: type family, then focus or, without one, place within the type."""
    seen: dict[str, int] = {}
    pairs = []
    for row in rows:
        kind = row["type"]
        place = seen[kind] = seen.get(kind, -1) + 1
        family = (
            kind if kind in _XSTEST_ALONE else str(_XSTEST_CONTRAST.get(kind, kind)).removeprefix("contrast_")
        )
        pairs.append(f"{family}: {row.get('focus') or place}")
    return pairs


def _harmful_word(word: Any) -> bool:
    known = str(word).strip().lower()
    if known not in (*HARMFUL, *HARMLESS):
        raise unknown("harm label", word, (*HARMFUL, *HARMLESS))
    return known in HARMFUL


def _truth(value: Any, row: int) -> bool:
    """A flag in any of the usual spellings."""
    word = str(value).strip().lower()
    if word in ("1", "1.0", "true", "yes"):
        return True
    if word in ("0", "0.0", "false", "no"):
        return False
    raise DataError(f"row {row}: the label {value!r} is neither 1/0 nor true/false")
