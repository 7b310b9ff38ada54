"""Constitutional AI (Bai et al. 2022, arXiv 2212.08073): a model revises its answers and labels them itself.

Supervised stage: the model answers a red-team prompt, criticises the answer by a principle drawn from a file,
and writes it again, several times over; prompts with their revisions are data for supervised fine-tuning.
Feedback stage: it says which of two answers follows a principle better, and the pairs become preferences.
A comparison is made in both orders, and the two log-odds are averaged with the second turned round, so that
a liking for the letter A or B, which adds the same to both, cancels. Everything asked and written is in a
trace, from which a run that was killed goes on, and ends in the same bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from veridical.config import build, to_dict
from veridical.errors import ConfigError, DataError
from veridical.files import write_bytes
from veridical.preference.config import ConstitutionConfig
from veridical.preference.data import Preferences, load_preferences
from veridical.preference.dialogue import Speaker, Wording, turns
from veridical.preference.principles import Principle, Principles, load_principles
from veridical.preference.revised import ConstitutionalData
from veridical.preference.trace import Line, Trace, open_trace
from veridical.progress import bar
from veridical.provenance import fingerprint
from veridical.saved_result import RESULT
from veridical.tokens import Prompt

log = logging.getLogger(__name__)

TRACE, SFT, PREFERENCES = "trace.jsonl", "sft.jsonl", "preferences.jsonl"
LONG, NO_ANSWER, NO_REVISION = "too long", "empty answer", "empty revision"
SAME, NO_LETTER, NOT_FINITE = "same answers", "no letter", "not finite"


def constitutional_data(
    model: Any,
    prompts: Any,
    out: str | Path,
    principles: Any = "hhh",
    config: ConstitutionConfig | None = None,
    *,
    judge: Any = None,
    **options: Any,
) -> ConstitutionalData:
    """Answers, critiques, revisions and labels for red-team prompts; a stopped run goes on.

    Writes `out/sft.jsonl` (prompt, completion, group), `out/preferences.jsonl` (prompt, chosen, rejected,
    margin, probability, group) and `out/trace.jsonl`, beside the result.

    Args:
        model: A name or folder, a `HookedModel`, anything with its `generate` and `option_logprobs`, or a
            function from a list of prompts to a list of texts.
        prompts: What `load_red_team` takes.
        out: Folder of the run.
        principles: A YAML or JSON file, an embedded name, or `Principles`.
        config: Options; `options` win.
        judge: The model that labels; `model` itself when not given.
        **options: Fields of `ConstitutionConfig`.

    Raises:
        InputError: Prompts, principles, options or models that do not fit.
        StoreMismatchError: `out` holds a run of something else; names the first difference.
        DamagedFileError: The trace in `out` is not as it was written; names the line.
    """
    config = checked_constitution(build(ConstitutionConfig, config, **options))
    rules, out = load_principles(principles), Path(out)
    asked_of = load_red_team(prompts)
    kept = asked_of if config.limit is None else asked_of.limited(config.limit, config.seed)
    rows = [row.prompt for row in kept.rows]
    speaker = Speaker(_loaded(model))
    labeller = speaker if judge is None else Speaker(_loaded(judge))
    if config.labels and not labeller.judges:
        raise ConfigError(
            f"{labeller.name} is a function and gives no log-probabilities, so it cannot label; "
            "give judge=... or labels=False"
        )
    run = _Run(speaker, labeller, rules, config)
    head = _head(run, rows, asked_of.name)
    trace = open_trace(out / TRACE, head)
    if (out / RESULT).is_file():
        return ConstitutionalData.load(out)
    states = run.all(rows, trace)
    _write_rows(out / SFT, _revised(states, run.wording, config))
    if config.labels:
        _write_rows(out / PREFERENCES, _preferred(states, run.wording, config))
    found = ConstitutionalData.of([vars(state) for state in states], {**head, "seed": config.seed})
    found.save(out)
    log.info("  %s", found)
    return found


def load_red_team(source: Any) -> Preferences:
    """Prompts that are meant to bring out bad answers.

    Args:
        source: A text file with one prompt in each line, a list of texts or chats, or what `load_preferences`
            takes for prompts alone (a table with a column prompt, labelled pairs, hh-rlhf).

    Raises:
        DataError: No prompts.
    """
    if isinstance(source, str | Path) and Path(source).suffix.lower() == ".txt" and Path(source).is_file():
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{source} is not UTF-8 text (byte {error.start})") from error
        source = _named([line.strip() for line in lines if line.strip()], Path(source).stem)
    elif isinstance(source, Sequence) and not isinstance(source, str):
        source = _named(source, "prompts")
    found = load_preferences(source, need="prompt")
    for row in found.rows:
        if not isinstance(row.prompt, str) and row.prompt[-1]["role"] != "user":
            raise DataError(
                f"{found.name}: a prompt ends with the turn of {row.prompt[-1]['role']!r}; expected the "
                "user's, which is to be answered"
            )
    return found


def checked_constitution(config: ConstitutionConfig) -> ConstitutionConfig:
    """The options, after a check that they fit one another.

    Raises:
        ConfigError: They do not; says how.
    """
    if not config.rounds and config.labels and config.compare == "revision":
        raise ConfigError("rounds = 0 revises nothing; give compare = samples, or at least one round")
    if not config.rounds and not config.labels:
        raise ConfigError("rounds = 0 and no labels: nothing is asked for")
    if config.labels and config.compare == "samples" and not config.temperature:
        raise ConfigError("compare = samples needs a temperature above 0, else both answers are the same")
    return config


@dataclass
class _State:
    """What is known of one prompt so far."""

    number: int
    prompt: Prompt
    answers: list[str] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    other: str = ""
    fail: str = ""
    judged: dict[str, Any] = field(default_factory=dict)

    @property
    def pair(self) -> tuple[str, str, str]:
        """The two answers that are compared, and what the second is called."""
        if self.other:
            return self.answers[0], self.other, "second answer"
        return self.answers[0], self.answers[-1], "revision"


class _Run:
    """All stages, for one batch of prompts after the other."""

    def __init__(
        self, speaker: Speaker, labeller: Speaker, rules: Principles, config: ConstitutionConfig
    ) -> None:
        self.speaker, self.labeller, self.rules, self.config = speaker, labeller, rules, config
        shown = rules.examples if config.examples is None else rules.examples[: config.examples]
        style = speaker.style if config.style == "auto" else config.style
        judging = labeller.style if config.style == "auto" else config.style
        self.wording = Wording(style, rules, shown, config.system)
        self.judging = Wording(judging, rules)

    def all(self, rows: Sequence[Prompt], trace: Trace) -> list[_State]:
        """Every prompt through every stage; what the trace holds is not asked again."""
        states = [_State(number, prompt) for number, prompt in enumerate(rows)]
        step = 0
        if trace.steps:
            log.info("  goes on after %d steps", len(trace.steps))
        with bar(len(states), "prompts", "prompts", self.config.progress) as shown:
            for begin in range(0, len(states), self.config.batch):
                batch = states[begin : begin + self.config.batch]
                for ask, take in self._stages(batch):
                    live = [state for state in batch if not state.fail]
                    if not live:
                        break
                    lines = trace.step(step)
                    lines = trace.add(ask(live, step)) if lines is None else lines
                    for state, line in zip(live, lines, strict=True):
                        take(state, line)
                    step += 1
                shown.update(len(batch))
        return states

    def _stages(self, batch: list[_State]) -> Iterator[tuple[Callable[..., list[Line]], Callable[..., None]]]:
        """What is asked, and what is made of each line, in order."""
        config = self.config
        yield (
            self._writing("answer", 0, lambda state: (self.wording.answer(state.prompt), None)),
            _took_answer,
        )
        for number in range(1, config.rounds + 1):
            if config.critiques:
                yield self._writing("critique", number, self._critique(number)), _took_critique
            yield self._writing("revision", number, self._revision(number)), _took_revision
        if config.labels and config.compare == "samples":
            yield (
                self._writing("sample", 0, lambda state: (self.wording.answer(state.prompt), None)),
                _took_other,
            )
        if config.labels:
            yield self._judge, self._took_judgement

    def _drawn(self, stage: str, state: _State, number: int) -> Principle:
        return self.rules.draw("principle", self.config.seed, stage, state.number, number)

    def _critique(self, number: int) -> Callable[[_State], tuple[Prompt, Principle]]:
        def asked(state: _State) -> tuple[Prompt, Principle]:
            rule = self._drawn("revision", state, number)
            return self.wording.critique(state.prompt, state.answers[-1], rule), rule

        return asked

    def _revision(self, number: int) -> Callable[[_State], tuple[Prompt, Principle]]:
        def asked(state: _State) -> tuple[Prompt, Principle]:
            rule = self._drawn("revision", state, number)
            critique = state.rounds[-1]["critique"] if self.config.critiques else None
            return self.wording.revision(state.prompt, state.answers[-1], critique, rule), rule

        return asked

    def _writing(
        self, stage: str, number: int, asked: Callable[[_State], tuple[Prompt, Principle | None]]
    ) -> Callable[[list[_State], int], list[Line]]:
        """Asks the model for a text for each prompt of a batch."""

        def ask(live: list[_State], step: int) -> list[Line]:
            config = self.config
            seed = int(fingerprint([str(config.seed), stage, str(step)])[:8], 16)
            prompts, rules = zip(*(asked(state) for state in live))
            fits = [self.speaker.fits(prompt, config.max_new_tokens) for prompt in prompts]
            fitting = [prompt for prompt, fit in zip(prompts, fits) if fit]
            written = iter(
                self.speaker.write(fitting, config.max_new_tokens, config.temperature, seed)
                if fitting
                else []
            )
            lines = []
            for state, prompt, rule, fit in zip(live, prompts, rules, fits):
                line: Line = {"prompt": state.number, "stage": stage, "round": number}
                if rule is not None:
                    line["principle"] = rule.name
                line |= {"seed": seed, "asked": prompt}
                if fit:
                    made = next(written)
                    line |= {"raw": made.raw, "ended": made.ended, "text": self.wording.taken(made.raw)}
                lines.append(line if fit else {**line, "fail": LONG})
            return lines

        return ask

    def _judge(self, live: list[_State], step: int) -> list[Line]:
        """Asks the labeller about both orders, under each principle that is drawn."""
        asked: list[tuple[Prompt, list[str]]] = []
        lines: list[Line] = []
        places: list[tuple[Line, int]] = []
        for state in live:
            first, second, _ = state.pair
            line: Line = {"prompt": state.number, "stage": "judge", "votes": []}
            lines.append(line)
            if first == second:
                line["fail"] = SAME
                continue
            for vote in range(self.config.votes):
                rule = self._drawn("judge", state, vote)
                orders = [
                    self.judging.judgement(state.prompt, *pair, rule)
                    for pair in ((first, second), (second, first))
                ]
                if not all(self.labeller.fits(prompt, 8) for prompt, _ in orders):
                    line["fail"] = LONG
                    break
                line["votes"].append({"principle": rule.name, "asked": [prompt for prompt, _ in orders]})
                places.append((line, len(asked)))
                asked += orders
        found = self.labeller.choose(asked) if asked else []
        for line, place in places:
            vote = next(vote for vote in line["votes"] if "logprobs" not in vote)
            vote["logprobs"] = [[_number(value) for value in found[at]] for at in (place, place + 1)]
        return lines

    def _took_judgement(self, state: _State, line: Line) -> None:
        first, second, name = state.pair
        state.judged = {"fail": line.get("fail", ""), "preferred": "", **_probability(line, self.config)}
        if state.judged["fail"]:
            state.judged["preferred"] = "fail"
            return
        ahead = state.judged["probability"] - 0.5
        if abs(ahead) <= self.config.tie:
            state.judged["preferred"] = "tie"
            return
        state.judged["preferred"] = name if ahead > 0 else "first answer"
        state.judged["chosen"], state.judged["rejected"] = (second, first) if ahead > 0 else (first, second)


def _took_answer(state: _State, line: Line) -> None:
    state.fail = line.get("fail", "") or ("" if line["text"] else NO_ANSWER)
    if not state.fail:
        state.answers.append(line["text"])


def _took_critique(state: _State, line: Line) -> None:
    state.fail = line.get("fail", "")
    if not state.fail:
        state.rounds.append(
            {"round": line["round"], "principle": line["principle"], "critique": line["text"]}
        )


def _took_revision(state: _State, line: Line) -> None:
    state.fail = line.get("fail", "") or ("" if line["text"] else NO_REVISION)
    if state.fail:
        return
    if not state.rounds or state.rounds[-1]["round"] != line["round"]:
        state.rounds.append({"round": line["round"], "principle": line["principle"], "critique": ""})
    state.rounds[-1] |= {"revision": line["text"], "ended": line["ended"]}
    state.answers.append(line["text"])


def _took_other(state: _State, line: Line) -> None:
    state.fail = line.get("fail", "") or ("" if line["text"] else NO_ANSWER)
    state.other = line.get("text", "")


def _probability(line: Line, config: ConstitutionConfig) -> dict[str, Any]:
    """P(second answer is better), averaged over the votes, and what the two orders said."""
    if line.get("fail"):
        return {}
    values = np.array(
        [
            [[np.nan if at is None else at for at in pair] for pair in vote["logprobs"]]
            for vote in line["votes"]
        ],
        dtype=np.float64,
    )  # [vote, order, letter]
    if not np.isfinite(values).all():
        return {"fail": NOT_FINITE}
    coverage = float(np.minimum(1.0, np.exp(values).sum(-1)).mean())
    letter_a = values[..., 0] - values[..., 1]
    odds = (letter_a[:, 1] - letter_a[:, 0]) / 2
    said: dict[str, Any] = {
        "probability": float((1 / (1 + np.exp(-odds))).mean()),
        "orders_agree": float(((letter_a[:, 1] > 0) == (letter_a[:, 0] < 0)).mean()),
        "letter_bias": float(letter_a.mean()),
        "coverage": coverage,
        "judged_by": ", ".join(vote["principle"] for vote in line["votes"]),
    }
    return {**said, "fail": NO_LETTER} if coverage < config.min_coverage else said


def _revised(
    states: Sequence[_State], wording: Wording, config: ConstitutionConfig
) -> Iterator[Mapping[str, Any]]:
    """Rows for supervised fine-tuning."""
    for state in states:
        if state.fail and config.revisions == "last":
            continue
        taken = state.answers[1:] if config.revisions == "all" else state.answers[1:][-1:]
        for text in taken:
            completion = wording.completion(text)
            yield {"prompt": wording.kept(state.prompt), "completion": completion, "group": state.number}


def _preferred(
    states: Sequence[_State], wording: Wording, config: ConstitutionConfig
) -> Iterator[Mapping[str, Any]]:
    """Rows of preferences; ties and fails give none."""
    for state in states:
        judged = state.judged
        if "chosen" not in judged:
            continue
        sure = max(judged["probability"], 1 - judged["probability"])
        yield {
            "prompt": wording.kept(state.prompt),
            "chosen": wording.completion(judged["chosen"]),
            "rejected": wording.completion(judged["rejected"]),
            "margin": 2 * sure - 1,
            "probability": sure,
            "group": state.number,
        }


def _write_rows(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))


def _head(run: _Run, rows: Sequence[Prompt], name: str) -> dict[str, Any]:
    """What decides the outcome."""
    lasting = {key: value for key, value in to_dict(run.config).items() if key not in ("progress", "limit")}
    judge = None if run.labeller is run.speaker else run.labeller
    return {
        "model": run.speaker.name,
        "model_fingerprint": run.speaker.fingerprint,
        "judge": None if judge is None else judge.name,
        "judge_fingerprint": None if judge is None else judge.fingerprint,
        "data": name,
        "data_fingerprint": fingerprint(json.dumps(turns(row)) for row in rows),
        "prompts": len(rows),
        "principles": run.rules.name,
        "principles_fingerprint": run.rules.fingerprint,
        "style": run.wording.style,
        "options": lasting,
    }


def _named(prompts: Sequence[Any], name: str) -> Preferences:
    rows = [row if isinstance(row, Mapping) else {"prompt": row} for row in prompts]
    if not rows:
        raise DataError(f"{name}: there are no red-team prompts")
    found = load_preferences(rows, need="prompt")
    return Preferences(found.rows, name)


def _loaded(model: Any) -> Any:
    from veridical.models import load

    return load(str(model), check=False) if isinstance(model, str | Path) else model


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
