"""Asking: questions under system prompts and orders of options, scored by log-probability."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from veridical.config import BeliefConfig
from veridical.errors import DataError, NonFiniteError
from veridical.pairs import prompts
from veridical.pairs.prompts import SystemPrompt
from veridical.pairs.schema import Prompt
from veridical.pairs.show import flat, shorten
from veridical.progress import bar

CHUNK = 128
Request = tuple[Prompt, list[str]]
"""A prompt, and the completions that stand for its options."""


@dataclass(frozen=True)
class Question:
    """A question apart from how it is asked."""

    pair: Any
    text: str
    options: tuple[str, ...]
    correct: int
    form: str

    @property
    def key(self) -> tuple:
        """What makes it the same question, in whatever order its options stand."""
        return (self.pair, self.text, tuple(sorted(self.options)), self.form)


@dataclass(frozen=True)
class Belief:
    """What the askings of one question came to; probabilities follow the question's own order of options."""

    question: Question
    probabilities: np.ndarray
    agreement: float
    coverage: float
    askings: int

    @property
    def best(self) -> int:
        """Place of the believed option."""
        return int(np.argmax(self.probabilities))

    @property
    def right(self) -> bool:
        """Whether the believed option is the right one."""
        return self.best == self.question.correct


@dataclass
class Asker:
    """Puts questions to the model, each different prompt once."""

    model: Any
    config: BeliefConfig
    chat: bool
    style: str
    system_role: bool = True
    seen: dict[Any, tuple[np.ndarray, float]] = field(default_factory=dict)
    first: list[bool] = field(default_factory=list)
    askings: float = 0.0

    @property
    def first_option_share(self) -> float | None:
        """How often the option shown first was believed, over askings that show options in several orders."""
        return float(np.mean(self.first)) if self.first else None

    def beliefs(self, questions: Sequence[Question], systems: Sequence[SystemPrompt]) -> dict[tuple, Belief]:
        """The belief behind each question, by its key: every system prompt and order of options."""
        asked: list[tuple[Question, list[int]]] = []
        requests: list[Request] = []
        for number, question in enumerate(questions):
            draw = random.Random(f"orders {self.config.seed} {number}")
            orders = _orders(
                len(question.options), self.config.orders if question.form != "open" else 1, draw
            )
            for system in systems:
                for order in orders:
                    shown = [question.options[place] for place in order]
                    asked.append((question, order))
                    requests.append(self.request(system, question.text, shown, question.form))
        self.askings = round(len(requests) / max(1, len(questions)), 1)
        found: dict[tuple, list[tuple[np.ndarray, float]]] = {}
        for (question, order), (shares, coverage) in zip(asked, self.score(requests, "beliefs")):
            if question.form == "choice" and self.config.orders > 1:
                self.first.append(int(np.argmax(shares)) == 0)
            found.setdefault(question.key, []).append((shares[np.argsort(order)], coverage))
        return {question.key: _summed(question, found[question.key]) for question in questions}

    def request(self, system: SystemPrompt, question: str, shown: Sequence[str], form: str) -> Request:
        """A prompt that asks `question`, and the completions that stand for its options."""
        lettered = self.style == "letters" and form == "choice"
        user = prompts.letters(question, shown) if lettered else prompts.ask(question, shown, form)
        said = prompts.letter_answers(shown) if lettered else list(shown)
        if self.chat and self.system_role:
            return prompts.chat(system, user), said
        if self.chat:
            return prompts.chat("", f"{system.text}\n\n{user}".strip()), said
        text = "\n\n".join(part for part in (system.text, f"Question: {user}\nAnswer:") if part)
        return text, [f" {option}" for option in said]

    def score(self, requests: Sequence[Request], what: str) -> list[tuple[np.ndarray, float]]:
        """Probability of each option among the options, and their raw probability together, per request."""
        keys = [(repr(prompt), tuple(said)) for prompt, said in requests]
        new = {key: request for key, request in zip(keys, requests) if key not in self.seen}
        # Prompts of one length go together, so that little of a batch is padding.
        order = sorted(new, key=lambda key: len(key[0]))
        with bar(len(order), what, "prompts", self.config.progress) as shown:
            for start in range(0, len(order), CHUNK):
                part = order[start : start + CHUNK]
                found = self._logprobs([new[key] for key in part])
                for key, logprobs in zip(part, found, strict=True):
                    self.seen[key] = _normalised(np.asarray(logprobs, dtype=np.float64), key)
                shown.update(len(part))
        return [self.seen[key] for key in keys]

    def _logprobs(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Log-probabilities of the options of each request; an error names the prompt that it is about."""
        size = self.config.batch_tokens
        try:
            return self.model.option_logprobs(
                [prompt for prompt, _ in requests], [said for _, said in requests], batch_tokens=size
            )
        except DataError:
            # The row that the error counts is one of this chunk, which says nothing to the caller.
            for prompt, said in requests:
                try:
                    self.model.option_logprobs([prompt], [said], batch_tokens=size)
                except DataError as error:
                    raise DataError(f"while asking {shorten(flat(prompt), 80)!r}: {error}") from error
            raise


def _normalised(logprobs: np.ndarray, key: tuple[str, tuple[str, ...]]) -> tuple[np.ndarray, float]:
    if np.isnan(logprobs).any() or not np.isfinite(logprobs.max()):
        raise NonFiniteError(
            f"the model gives {logprobs} as log-probabilities of {key[1]} after {key[0][:80]}"
        )
    shares = np.exp(logprobs - logprobs.max())
    # An option that begins another ("Niger", "Nigeria") contains its probability, hence the cap.
    return shares / shares.sum(), min(1.0, float(np.exp(logprobs).sum()))


def _summed(question: Question, askings: list[tuple[np.ndarray, float]]) -> Belief:
    shares = np.stack([shares for shares, _ in askings])
    mean = shares.mean(axis=0)
    agreement = float((shares.argmax(axis=1) == mean.argmax()).mean())
    return Belief(
        question, mean, agreement, float(np.mean([coverage for _, coverage in askings])), len(askings)
    )


def _orders(n: int, count: int, draw: random.Random) -> list[list[int]]:
    """At most `count` different orders of `n` options, both orders of two.

    They are a random order turned by equal steps, so that each option stands in different places.
    """
    base = list(range(n))
    draw.shuffle(base)
    step = max(1, n // count)
    orders: list[list[int]] = []
    for number in range(count):
        if number and number * step % n == 0:
            draw.shuffle(base)
        turn = number * step % n
        order = base[turn:] + base[:turn]
        if order not in orders:
            orders.append(order)
    return orders
