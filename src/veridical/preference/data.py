"""Preferences: prompts with a chosen and a rejected answer, from pairs or from tables, as TRL reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from veridical.errors import DataError, unknown
from veridical.pairs.splits import assign
from veridical.provenance import fingerprint
from veridical.tokens import Prompt, encode

if TYPE_CHECKING:
    from veridical.pairs import Pairs

Need = Literal["both", "chosen", "prompt"]
COLUMNS: dict[str, tuple[str, ...]] = {
    "both": ("prompt", "chosen", "rejected"),
    "chosen": ("prompt", "chosen"),
    "prompt": ("prompt",),
}
"""Columns that a table has to have, by what is needed of it; `completion` is taken for `chosen`."""


@dataclass(frozen=True)
class Preference:
    """One prompt with a better and a worse answer.

    Attributes:
        prompt: Text, or chat messages up to the user's turn.
        chosen: The better answer.
        rejected: The worse one.
        margin: By how much the better one should be ahead in reward (reward models only).
        group: What is never parted between training and test.
        split: "train" or another name for what is held out; "" where the data do not say.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    group: Any = None
    split: str = ""


@dataclass(frozen=True)
class Preferences:
    """Preferences with a name, for training and for what is held out."""

    rows: tuple[Preference, ...]
    name: str = "preferences"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Digest of the content, the same wherever it was loaded from."""
        return fingerprint(
            json.dumps([row.prompt, row.chosen, row.rejected, row.margin, row.split]) for row in self.rows
        )

    def parted(self, fraction: float, seed: int) -> tuple[Preferences, Preferences]:
        """(training, held out), whole groups on one side; what the rows say about their split wins.

        The second has no rows where nothing is held out.

        Raises:
            DataError: Nothing is left to train on.
        """
        if any(row.split for row in self.rows):
            train = [row.split in ("train", "") for row in self.rows]
        else:
            groups = np.array([str(row.group) for row in self.rows], dtype=object)
            drawn = assign(groups, {"train": 1 - fraction, "test": fraction}, seed) if fraction else None
            train = [True] * len(self.rows) if drawn is None else [part == "train" for part in drawn]
        sides = [tuple(r for r, kept in zip(self.rows, train) if kept == side) for side in (True, False)]
        if not sides[0]:
            raise DataError(f"{self.name} has no rows to train on; their split column says {self._splits()}")
        return Preferences(sides[0], self.name), Preferences(sides[1], self.name)

    def limited(self, count: int, seed: int) -> Preferences:
        """At most `count` rows, drawn with the seed, in their order."""
        if len(self) <= count:
            return self
        kept = np.random.default_rng(seed).choice(len(self), count, replace=False)
        return Preferences(tuple(self.rows[at] for at in sorted(kept.tolist())), self.name)

    def _splits(self) -> str:
        return ", ".join(sorted({row.split for row in self.rows}))


def load_preferences(source: Any, preferred: int | None = None, need: Need = "both") -> Preferences:
    """Preferences from `Pairs`, from a table with prompt, chosen and rejected, or from a file of either.

    Of `Pairs`, rows of one pair that share their prompt and differ in `label` are set against each other.

    Args:
        source: `Preferences`, `Pairs`, rows (mappings), a data frame, or what `Pairs.load` takes. Answers may
            be texts, an assistant's message as TRL writes it, whole chats that share all but the last message
            (without a column prompt), or the dialogues of hh-rlhf.
        preferred: The label that is preferred in `Pairs`. There is no default: in some data 1 is the better
            answer, in others the worse.
        need: "both" answers, the "chosen" one (supervised fine-tuning), or the "prompt" alone (rl).

    Raises:
        DataError: No such rows; the message names the first bad one.
        UnknownNameError: A column is missing; gives the nearest.
    """
    from veridical.pairs import Pairs

    if isinstance(source, Preferences):
        return source
    if isinstance(source, str | Path):
        rows = _table(str(source))
        if rows is not None and not _transcripts(rows):
            return _from_rows(rows, Path(source).stem, need)
        if rows is not None and preferred is None:
            preferred = 1  # of hh-rlhf, whose reader labels what was chosen so
        source = Pairs.load(source)
    if isinstance(source, Pairs):
        if need == "prompt":
            return _prompts(source)
        return _from_pairs(source, preferred, need)
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        source = source.to_dict("records")
    return _from_rows(list(source), "preferences", need)


def conversational(rows: Iterable[Preference]) -> list[dict[str, Any]]:
    """Rows as TRL reads them: chats with an answer as an assistant's message, or plain texts."""

    def answer(row: Preference, text: str) -> Any:
        return text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]

    return [
        {
            "prompt": row.prompt,
            "chosen": answer(row, row.chosen),
            "rejected": answer(row, row.rejected),
        }
        for row in rows
    ]


def ended(tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each prompt with its answer and, as the last token, the tokenizer's end of sequence.

    This is the one tokenisation that reward models are trained and scored with; the reward is read at that
    last token.

    Raises:
        DataError: A tokenizer without an end token, an empty answer, a chat without a template.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-sequence token, where a reward is read; set eos_token")
    for row, answer in enumerate(answers):
        if not answer:
            raise DataError(f"row {row}: the answer is empty")
    return [(*item.ids, end) for item in encode(tokenizer, list(prompts), list(answers))]


def refuse_long(tokenizer: Any, rows: Sequence[Preference], longest: int | None) -> None:
    """Refuses rows that are longer than the model takes; TRL would cut or drop them without a word.

    Raises:
        DataError: Names the first, and how many there are.
    """
    chats = [not isinstance(row.prompt, str) for row in rows]
    if len(set(chats)) > 1:
        at = chats.index(not chats[0])
        raise DataError(f"row 0 and row {at} differ in kind: prompts are all texts or all chats")
    prompts = [row.prompt for row in rows]
    chosen = encode(tokenizer, prompts, [row.chosen for row in rows])
    rejected = encode(tokenizer, prompts, [row.rejected for row in rows])
    lengths = [1 + max(len(one.ids), len(other.ids)) for one, other in zip(chosen, rejected)]
    if longest is None:
        return
    over = [row for row, length in enumerate(lengths) if length > longest]
    if over:
        raise DataError(
            f"row {over[0]} has {lengths[over[0]]} tokens with its answer, {len(over)} of {len(rows)} rows "
            f"have more than {longest}; shorten them or set max_length"
        )


def _table(source: str) -> list[Mapping[str, Any]] | None:
    """The rows of a file or a hub data set of preferences; None where it holds no column `chosen`."""
    from veridical.organisms import PAIRS
    from veridical.pairs.loaders import from_hub, read_rows

    path = Path(source).expanduser()
    if source in PAIRS or path.is_dir():
        return None
    rows = read_rows(path) if path.is_file() else from_hub(source)
    columns = set(rows[0]) if rows else set()
    mine = "chosen" in columns or ({"prompt", "completion"} <= columns and "label" not in columns)
    return list(rows) if mine else None


def _transcripts(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the answers stand at the end of whole dialogues in one text, as in hh-rlhf."""
    answer = rows[0].get("chosen")
    return "prompt" not in rows[0] and isinstance(answer, str) and answer.lstrip().startswith("Human:")


def _parted(row: Mapping[str, Any], at: int, name: str) -> Mapping[str, Any]:
    """A row whose answers are whole chats, as TRL's implicit prompts: what both begin with is the prompt.

    Raises:
        DataError: Chats that part before their last message.
    """
    sides = [row.get(side) for side in ("chosen", "rejected")]
    chats = [list(side) for side in sides if isinstance(side, list | tuple | np.ndarray) and len(side) > 1]
    if "prompt" in row or len(chats) < 2:
        return row
    if chats[0][:-1] != chats[1][:-1]:
        raise DataError(
            f"{name}, row {at}: the chats of chosen and rejected part before their last message; expected "
            "one prompt with two answers"
        )
    return {**row, "prompt": chats[0][:-1], "chosen": chats[0][-1:], "rejected": chats[1][-1:]}


def _from_rows(rows: Sequence[Mapping[str, Any]], name: str, need: Need) -> Preferences:
    if not rows:
        raise DataError(f"{name} has no rows")
    columns = list(rows[0])
    rows = [_parted(row, at, name) for at, row in enumerate(rows)]
    rows = [{**row, "chosen": row["completion"]} if "completion" in row else row for row in rows]
    for column in COLUMNS[need]:
        if column not in rows[0]:
            raise unknown(f"column of {name}:", column, columns, f"Needed are {', '.join(COLUMNS[need])}")
    made = []
    for at, row in enumerate(rows):
        group = row.get("group", row.get("pair"))
        made.append(
            Preference(
                _prompt(row["prompt"], at, name),
                _answer(row["chosen"], "chosen", at, name) if need != "prompt" else "",
                _answer(row["rejected"], "rejected", at, name) if need == "both" else "",
                _margin(row.get("margin"), at, name),
                at if group is None else group,
                str(row.get("split") or ""),
            )
        )
    return _checked(made, name, need)


def _prompts(pairs: Pairs) -> Preferences:
    """Each different prompt once."""
    split = pairs["split"].tolist() if "split" in pairs else [""] * len(pairs)
    groups = pairs.groups.tolist()
    rows = {
        json.dumps(prompt): Preference(prompt, "", "", 0.0, groups[at], str(split[at] or ""))
        for at, prompt in reversed(list(enumerate(pairs.prompts)))
    }
    return Preferences(tuple(reversed(rows.values())), pairs.name)


def _from_pairs(pairs: Pairs, preferred: int | None, need: Need) -> Preferences:
    name = pairs.name
    if preferred is None:
        raise DataError(
            f"{name} has labels and no column chosen: say which label is preferred "
            "(preferred=1 or preferred=0)"
        )
    labels = pairs.labels().tolist()
    if preferred not in labels:
        raise DataError(f"no row of {name} has the label {preferred}; there are {sorted(set(labels))}")
    answers = pairs.completions
    if answers is None:
        raise DataError(f"{name} has no completions, so there is nothing to prefer")
    sides: dict[str, tuple[list[int], list[int]]] = {}
    groups, prompts = pairs.groups.tolist(), pairs.prompts
    for at, label in enumerate(labels):
        key = json.dumps([str(groups[at]), prompts[at]])
        sides.setdefault(key, ([], []))[label != preferred].append(at)
    split = pairs["split"].tolist() if "split" in pairs else [""] * len(pairs)
    made = [
        Preference(
            prompts[good], answers[good], "" if bad is None else answers[bad], 0.0, groups[good],
            str(split[good] or ""),
        )
        for chosen, rejected in sides.values()
        for good in chosen
        for bad in (rejected if need == "both" else [None])
    ]  # fmt: skip
    if not made:
        raise DataError(
            f"no two rows of {name} share a pair and a prompt and differ in their label and completion, so "
            "nothing can be set against each other; give a table with prompt, chosen and rejected"
        )
    return _checked(made, name, need)


def _checked(rows: list[Preference], name: str, need: Need) -> Preferences:
    for at, row in enumerate(rows):
        for side, text in (("chosen", row.chosen), ("rejected", row.rejected)):
            if not text and side in COLUMNS[need]:
                raise DataError(f"{name}, row {at}: the {side} answer is empty")
        if need == "both" and row.chosen == row.rejected:
            raise DataError(f"{name}, row {at}: chosen and rejected are the same: {row.chosen[:60]!r}")
    return Preferences(tuple(rows), name)


def _prompt(value: Any, at: int, name: str) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list | tuple | np.ndarray) and len(value):
        messages = [dict(message) if isinstance(message, Mapping) else {} for message in value]
        if all({"role", "content"} <= set(message) for message in messages):
            return messages
    raise DataError(f"{name}, row {at}: the prompt is {value!r}; expected text or chat messages")


def _answer(value: Any, side: str, at: int, name: str) -> str:
    """The text of an answer; an answer as TRL writes it (one assistant message) is taken too."""
    if isinstance(value, list | tuple | np.ndarray) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise DataError(
            f"{name}, row {at}: {side} is {value!r}; expected the answer's text or one assistant message"
        )
    return value


def _margin(value: Any, at: int, name: str) -> float:
    if value is None:
        return 0.0
    if not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise DataError(f"{name}, row {at}: the margin is {value!r}; expected a number")
    return float(value)
