"""What every intervention is compared with: nothing, prompts, examples, a random direction of equal length.

All are interventions themselves: called with a model and a strength they give a context. Prompts and
examples act on every prompt that the model tokenises within it (`HookedModel.rewrite`), strength 0 leaves it
out, and any other puts it in whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from veridical.errors import DataError, InputError, unknown
from veridical.tokens import Prompt as Text

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.steering.vectors import SteeringVector

Where = Literal["system", "instead", "user"]


class Intervention(Protocol):
    """Anything that changes a model for a while."""

    def __call__(self, model: HookedModel, strength: float = 1.0) -> AbstractContextManager[Any]:
        """A context in which the model is changed."""
        ...


@dataclass(frozen=True)
class Nothing:
    """No change."""

    name: str = "no change"

    @contextmanager
    def __call__(self, model: HookedModel, strength: float = 1.0) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Prompt:
    """An instruction put into every prompt.

    Attributes:
        text: The instruction.
        where: "system": behind what the system message says, or as one where there is none; "instead" of the
            system message; "user": behind the last user message. Before a text that is no chat.
        name: In tables.
    """

    text: str
    where: Where = "system"
    name: str = "prompt"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InputError("the prompt is empty; give the instruction as text")
        if self.where not in get_args(Where):
            raise unknown("place of a prompt", self.where, get_args(Where))

    def __call__(self, model: HookedModel, strength: float = 1.0) -> AbstractContextManager[None]:
        """A context in which every prompt carries the instruction."""
        return rewriting(model, self.into if strength else None)

    def into(self, prompt: Text) -> Text:
        """A prompt with the instruction in it."""
        if isinstance(prompt, str):
            return f"{self.text}\n{prompt}"
        chat = [dict(message) for message in prompt]
        if self.where == "user":
            at = _last_user(chat)
            chat[at]["content"] = f"{chat[at]['content']} {self.text}"
            return chat
        if chat and chat[0]["role"] == "system":
            before = "" if self.where == "instead" else f"{chat[0]['content']} "
            return [{"role": "system", "content": before + self.text}, *chat[1:]]
        return [{"role": "system", "content": self.text}, *chat]


@dataclass(frozen=True)
class FewShot:
    """Answered examples, put in front of the last user message of every chat.

    Attributes:
        examples: User messages and the answers to them.
        name: In tables.
    """

    examples: tuple[tuple[str, str], ...]
    name: str = "few-shot"

    def __post_init__(self) -> None:
        if not self.examples:
            raise InputError("few-shot needs at least one example")

    @classmethod
    def of(
        cls, pairs: Pairs, count: int = 4, seed: int = 0, towards: int = 0, label: str = "label"
    ) -> FewShot:
        """Examples from pairs: right answers (wrong ones for towards 1) of questions, or the completions of
        the wanted label; one of a pair at most.

        Raises:
            DataError: No row has an answer to show.
        """
        order = np.random.default_rng([seed, 10]).permutation(len(pairs))
        found: dict[Any, tuple[str, str]] = {}
        rows, groups = pairs.dataset, pairs.groups
        for at in order.tolist():
            answer = _answer(rows[at], towards, label)
            if answer and groups[at] not in found:
                found[groups[at]] = (_asked(rows[at]["prompt"]), answer)
            if len(found) == count:
                break
        if not found:
            raise DataError(f"no row of {pairs.name} has an answer that could be shown as an example")
        return cls(tuple(found.values()))

    def __call__(self, model: HookedModel, strength: float = 1.0) -> AbstractContextManager[None]:
        """A context in which every prompt carries the examples."""
        return rewriting(model, self.into if strength else None)

    def into(self, prompt: Text) -> Text:
        """A prompt with the examples in it."""
        if isinstance(prompt, str):
            shown = "\n\n".join(f"{user}\n{answer}" for user, answer in self.examples)
            return f"{shown}\n\n{prompt}"
        turns = [
            {"role": role, "content": said}
            for example in self.examples
            for role, said in zip(("user", "assistant"), example)
        ]
        at = _last_user(prompt)
        return [*prompt[:at], *turns, *prompt[at:]]


def engineered_prompt(
    model: HookedModel,
    pairs: Pairs,
    candidates: Sequence[str | Prompt],
    *,
    wheres: Sequence[Where] = ("system", "instead", "user"),
    towards: int = 0,
    label: str = "label",
    count: int = 48,
    seed: int = 0,
) -> Prompt:
    """The candidate, and its place, that changes the behaviour of `pairs` most; choose on validation pairs.

    Args:
        model: The model.
        pairs: Rows, as for `target_of`.
        candidates: Instructions; prompts keep their own place.
        wheres: Places that each text is tried in.
        towards: The label that is wanted.
        label: Its column.
        count: Rows at most.
        seed: Of their draw.
    """
    from veridical.steering.behaviour import fewer, target_of, wanted

    target = fewer(target_of(pairs, towards, label), count, seed)
    tried = [
        one if isinstance(one, Prompt) else Prompt(one, where)
        for one in candidates
        for where in (wheres[:1] if isinstance(one, Prompt) else wheres)
    ]
    if not tried:
        raise InputError("no candidate for an engineered prompt was given")
    scores = []
    for prompt in tried:
        with prompt(model):
            scores.append(wanted(target, model))
    return replace(tried[int(np.argmax(scores))], name="engineered prompt")


def random_like(vector: SteeringVector, seed: int = 0) -> SteeringVector:
    """A vector of the same lengths at the same sites and tokens, in directions drawn at random.

    Raises:
        InputError: An eraser, which has no length.
    """
    if vector.erasers:
        raise InputError("a random direction of equal length needs a vector that is added, not an eraser")
    random = np.random.default_rng([seed, 11])
    drawn = {}
    for site, norm in vector.norms.items():
        values = random.normal(size=len(vector.vectors[site]))
        drawn[site] = values * norm / np.linalg.norm(values)
    return replace(vector, vectors=drawn, method="random direction", calibrated={})


@contextmanager
def rewriting(model: HookedModel, act: Callable[[Text], Text] | None) -> Iterator[None]:
    """Every prompt that `model` tokenises goes through `act`, and then through what did so before."""
    before = model.rewrite
    if act is not None:
        model.rewrite = act if before is None else lambda prompt: before(act(prompt))
    try:
        yield
    finally:
        model.rewrite = before


def _last_user(chat: Sequence[Any]) -> int:
    found = [at for at, message in enumerate(chat) if message["role"] == "user"]
    if not found:
        raise DataError("a chat without a user message can't be given an instruction or examples")
    return found[-1]


def _asked(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[_last_user(prompt)]["content"])


def _answer(row: dict[str, Any], towards: int, label: str) -> str:
    """The answer that shows the wanted side; "" where the row has none."""
    if row.get("options") and row.get("correct") is not None:
        options, right = list(row["options"]), int(row["correct"])
        return str(options[right] if towards == 0 else options[(right + 1) % len(options)])
    return str(row.get("completion") or "") if row.get(label) == towards else ""
