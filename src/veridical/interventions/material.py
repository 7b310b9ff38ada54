"""The clean and corrupt rows of `veridical patch`: texts, a table, or questions that are asked twice."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from veridical.hooked import HookedModel
    from veridical.interventions.verbs import PatchVerb
    from veridical.pairs import Pairs
    from veridical.tokens import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """Rows to compare.

    Attributes:
        clean: Texts or chats.
        corrupt: The same, row by row.
        answers: Right answer of each row; None where none is known.
        wrong: Wrong answer of each row, likewise.
        name: What to call the data.
        groups: Which rows belong together when they are resampled; None for each alone.
    """

    clean: list[Prompt]
    corrupt: list[Prompt]
    answers: list[str] | None
    wrong: list[str] | None
    name: str
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.clean)

    def take(self, rows: Sequence[int]) -> Material:
        """Some of the rows."""
        answers, wrong = (
            [each[row] for row in rows] if each else None for each in (self.answers, self.wrong)
        )
        clean, corrupt = ([side[row] for row in rows] for side in (self.clean, self.corrupt))
        groups = None if self.groups is None else self.groups[list(rows)]
        return Material(clean, corrupt, answers, wrong, self.name, groups)


def material(options: PatchVerb) -> Material:
    """The rows that the options name, all of them.

    Raises:
        ConfigError: Nothing to compare, or several ways of saying it at once.
        DataError: Columns or counts that do not fit.
    """
    ways = {"--clean": options.clean or options.corrupt, "--prompts": options.prompts, "--data": options.data}
    given = [name for name, value in ways.items() if value]
    if len(given) != 1:
        raise ConfigError(
            f"patch takes its rows from one of --clean with --corrupt, --prompts, or --data; "
            f"{' and '.join(given) if given else 'none'} arrived; see veridical patch --help"
        )
    if options.limit is not None and not options.data:
        raise ConfigError("--limit draws pairs of --data; keep fewer rows with --examples")
    if options.clean or options.corrupt:
        _refuse_systems(options, "--clean and --corrupt are whole texts")
        return _answered(options, list(options.clean), list(options.corrupt), None, None, "texts")
    if options.prompts:
        from veridical.pairs.prompts import chat

        systems = _systems(options)
        sides: Any = [[chat(system, user) for user in options.prompts] for system in systems]
        return _answered(options, sides[0], sides[1], None, None, "prompts")
    return _of_data(options)


def evenly_long(model: HookedModel, rows: Material, most: int, *, aligned: bool) -> Material:
    """At most `most` rows; those of the commonest token count, unless they are to be aligned.

    Raises:
        DataError: No row has as many tokens clean as corrupt.
    """
    if aligned:
        return rows.take(range(min(most, len(rows))))
    lengths = [[len(row.ids) for row in model.encode(side)] for side in (rows.clean, rows.corrupt)]
    even = [row for row, (a, b) in enumerate(zip(*lengths)) if a == b]
    if not even:
        raise DataError(
            f"no row has as many tokens clean as corrupt (row 0: {lengths[0][0]} and {lengths[1][0]}); word "
            "them to equal length, or match their tokens with --align token"
        )
    usual = Counter(lengths[0][row] for row in even).most_common(1)[0][0]
    kept = [row for row in even if lengths[0][row] == usual][:most]
    log.info("  %d of %d rows, all of %d tokens", len(kept), len(rows), usual)
    return rows.take(kept)


def _of_data(options: PatchVerb) -> Material:
    from veridical.pairs.loaders import read_rows
    from veridical.running import load_pairs

    path = Path(str(options.data)).expanduser()
    if path.is_file():
        rows = read_rows(path)
        if rows and {"clean", "corrupt"} <= set(rows[0]):
            _refuse_systems(options, f"{path.name} has whole rows in clean and corrupt")
            for name, value in (("--where", options.where), ("--limit", options.limit)):
                if value:
                    raise ConfigError(
                        f"{name} is for questions; of a table of clean and corrupt rows, --examples of one "
                        "length are taken"
                    )
            clean, corrupt = ([row[name] for row in rows] for name in ("clean", "corrupt"))
            answers, wrong = (
                [str(row.get(name)) for row in rows] if rows[0].get(name) else None
                for name in ("answer", "wrong")
            )
            return _answered(options, clean, corrupt, answers, wrong, path.stem)
    pairs = _questions(load_pairs(options, options.seed), options.where)
    rows = asked_twice(pairs, *_systems(options))
    return _answered(options, rows.clean, rows.corrupt, rows.answers, rows.wrong, rows.name)


def asked_twice(pairs: Pairs, clean: str, corrupt: str) -> Material:
    """Each row's question under two system prompts, with its options as answers where it has any."""
    from veridical.pairs.prompts import chat

    users = _users(pairs)
    sides: Any = [[chat(system, user) for user in users] for system in (clean, corrupt)]
    answers, wrong = _of_options(pairs)
    return Material(sides[0], sides[1], answers, wrong, pairs.name, pairs.groups)


def _questions(pairs: Pairs, where: Sequence[str]) -> Pairs:
    """The rows that meet the conditions, the first of each question."""
    import numpy as np

    from veridical.probes.data import Source, meets

    frame = pairs.to_pandas()
    columns = {str(name): frame[name].to_numpy() for name in frame}
    source = Source((), lambda site, rows: None, {}, columns, pairs.groups, np.arange(len(pairs)), None)  # type: ignore[arg-type, return-value]
    kept = np.flatnonzero(meets(source, where))
    asked = frame["question_id"] if "question_id" in frame else frame["prompt"].map(_last_turn)
    firsts = ~asked.iloc[kept].duplicated().to_numpy()
    return pairs.select(kept[firsts])


def _users(pairs: Pairs) -> list[str]:
    """The user's turn of each row: the question with its options, where they are told apart; else the last
    turn, which loses options that the row's own system prompt gave."""
    from veridical.pairs.prompts import FORMS, ask

    if not {"question", "options", "form"} <= set(pairs.columns):
        return [_last_turn(prompt) for prompt in pairs.prompts]
    parts = zip(pairs["question"], pairs["options"], pairs["form"], pairs.prompts)
    return [
        ask(str(question), [str(option) for option in options], form)
        if form in FORMS and options is not None
        else _last_turn(prompt)
        for question, options, form, prompt in parts
    ]


def _of_options(pairs: Pairs) -> tuple[list[str] | None, list[str] | None]:
    """Right and wrong answers, where the rows have options and say which is correct."""
    if not {"options", "correct"} <= set(pairs.columns):
        return None, None
    options, correct = pairs["options"], pairs["correct"]
    if any(each is None or len(each) < 2 or right is None for each, right in zip(options, correct)):
        return None, None
    right = [str(each[int(at)]) for each, at in zip(options, correct)]
    return right, [str(next(one for one in each if str(one) != said)) for each, said in zip(options, right)]


def _systems(options: PatchVerb) -> tuple[str, str]:
    if options.clean_system is None or options.corrupt_system is None:
        raise ConfigError(
            "questions need --clean-system and --corrupt-system: the two runs differ in nothing else"
        )
    if options.clean_system == options.corrupt_system:
        raise ConfigError("--clean-system and --corrupt-system are the same: there is nothing to find")
    return options.clean_system, options.corrupt_system


def _answered(
    options: PatchVerb,
    clean: list[Prompt],
    corrupt: list[Prompt],
    answers: list[str] | None,
    wrong: list[str] | None,
    name: str,
) -> Material:
    if not clean or len(clean) != len(corrupt):
        raise DataError(f"{len(clean)} clean rows and {len(corrupt)} corrupt ones; expected one for each")
    said = []
    for what, ours, flags in (("answers", answers, options.answers), ("wrong", wrong, options.wrong)):
        if flags and len(flags) not in (1, len(clean)):
            raise DataError(f"{len(flags)} {what} for {len(clean)} rows; give one for all or one for each")
        said.append(list(flags) * (len(clean) // len(flags)) if flags else ours)
    return Material(clean, corrupt, said[0], said[1], name)


def _refuse_systems(options: PatchVerb, why: str) -> None:
    if options.clean_system is not None or options.corrupt_system is not None:
        raise ConfigError(f"--clean-system and --corrupt-system are for questions; {why}")


def _last_turn(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return next(str(turn["content"]) for turn in reversed(prompt) if turn["role"] == "user")
