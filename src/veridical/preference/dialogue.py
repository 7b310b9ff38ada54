"""How a model is asked for answers, critiques, revisions and judgements, and how its text is taken.

A model with a chat template gets turns: the prompt, its own answer, the critique request, its critique, the
revision request. One without gets the transcript of Bai et al. 2022 (arXiv 2212.08073, appendix), "Human:",
"Assistant:", "Critique Request:" and so on, and what it writes is cut where it begins a turn of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from veridical.errors import ConfigError, DataError, InputError, ModelError
from veridical.preference.principles import Example, Principle, Principles
from veridical.tokens import Prompt

Messages = list[dict[str, str]]
Style = Literal["chat", "transcript"]
HEADINGS = ("Human", "Assistant", "Critique Request", "Critique", "Revision Request", "Revision")
_TURN = re.compile(rf"\n\s*(?:{'|'.join(HEADINGS)}):")
_THOUGHTS = re.compile(r"^\s*<think>.*?(</think>|$)", re.DOTALL)
LETTERS = ("A", "B")


@runtime_checkable
class ChatModel(Protocol):
    """What writes: a `HookedModel`, or anything with the same two methods."""

    path: str

    def generate(self, prompts: Any, max_new_tokens: int = 32, **options: Any) -> Any:
        """A text for each prompt."""
        ...

    def option_logprobs(self, prompts: Any, options: Any) -> Any:
        """For each prompt the log-probability of each option, in nats."""
        ...


@dataclass(frozen=True)
class Written:
    """What a model wrote: the text as it came, and whether it ended by itself (None where nobody knows)."""

    raw: str
    ended: bool | None


class Speaker:
    """A model as the generator uses it.

    Args:
        model: A `ChatModel`, or a function from a list of prompts to a list of texts (which then gives no
            judgements, and has its own way of drawing).

    Raises:
        InputError: Neither.
    """

    def __init__(self, model: Any) -> None:
        from veridical.hooked import HookedModel

        self.model = model
        self.hooked = isinstance(model, HookedModel)
        self.judges = hasattr(model, "option_logprobs")
        if not self.judges and not callable(model):
            raise InputError(f"a {type(model).__name__} writes nothing; expected a chat model or a function")
        if self.hooked and model.kind != "causal":
            raise InputError(f"{model.path} is a model of kind {model.kind!r}; expected one that writes")

    @property
    def name(self) -> str:
        """What the model is called."""
        return str(getattr(self.model, "path", None) or getattr(self.model, "__name__", "a function"))

    @property
    def fingerprint(self) -> str:
        """Digest of its weights; its name where it has none to show."""
        found = getattr(self.model, "fingerprint", None)
        return str(found()) if callable(found) else self.name

    @property
    def style(self) -> Style:
        """How it is spoken to, unless somebody says otherwise."""
        if not self.hooked:
            return "chat"
        return "chat" if getattr(self.model.tokenizer, "chat_template", None) else "transcript"

    def fits(self, prompt: Prompt, room: int) -> bool:
        """Whether the prompt and `room` new tokens are within the model's context."""
        if not self.hooked or not self.model.context_length:
            return True
        try:
            tokens = len(self.model.encode([prompt])[0].ids)
        except DataError as error:
            if "over the limit" in str(error):
                return False
            raise
        return tokens + room <= self.model.context_length

    def write(self, prompts: list[Prompt], room: int, temperature: float, seed: int) -> list[Written]:
        """A text for each prompt, the same for the same prompts and seed.

        Args:
            prompts: Texts or chats.
            room: Most new tokens.
            temperature: Of the draw from the whole distribution; 0 takes the likeliest token.
            seed: Of the draw; a function draws in its own way, with torch's generator set to it.

        Raises:
            ModelError: Something else than one text for each prompt came back.
        """
        import torch

        options: dict[str, Any] = {}
        if temperature:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        devices = [self.model.device] if self.hooked and self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            if self.hooked:
                return self._write_hooked(prompts, room, options)
            if self.judges:
                texts = self.model.generate(prompts, max_new_tokens=room, **options)
            else:
                texts = self.model(prompts)
        if len(texts) != len(prompts) or not all(isinstance(text, str) for text in texts):
            raise ModelError(
                f"{self.name} gave {texts!r:.80} for {len(prompts)} prompts; expected as many texts"
            )
        return [Written(text, None) for text in texts]

    def _write_hooked(self, prompts: list[Prompt], room: int, options: dict[str, Any]) -> list[Written]:
        from veridical.scoring import new_tokens

        tokenizer = self.model.tokenizer
        rows = new_tokens(self.model, self.model.encode(prompts), room, **options).tolist()
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        ends = _ends(self.model)
        return [Written(text, any(token in ends for token in row)) for text, row in zip(texts, rows)]

    def choose(self, asked: Sequence[tuple[Prompt, list[str]]]) -> list[np.ndarray]:
        """Log-probability of each option behind its prompt."""
        found = self.model.option_logprobs([prompt for prompt, _ in asked], [said for _, said in asked])
        return [np.asarray(values, dtype=np.float64) for values in found]


@dataclass(frozen=True)
class Wording:
    """Prompts for every stage.

    Attributes:
        style: Turns of a chat, or one transcript.
        principles: For the worked examples.
        examples: Those that are shown.
        system: System message for the first answers; none when empty.
    """

    style: Style
    principles: Principles
    examples: tuple[Example, ...] = ()
    system: str = ""

    def kept(self, prompt: Prompt) -> Prompt:
        """The prompt as it stands in the data that come out."""
        messages = turns(prompt)
        return messages if self.style == "chat" else f"{_transcript(messages)}\n\nAssistant:"

    def answer(self, prompt: Prompt) -> Prompt:
        """Asks for the first answer."""
        messages = turns(prompt)
        if self.system:
            if messages[0]["role"] == "system":
                raise ConfigError(
                    "system is for prompts without a system message of their own; one has its own"
                )
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages if self.style == "chat" else f"{_transcript(messages)}\n\nAssistant:"

    def critique(self, prompt: Prompt, answer: str, rule: Principle) -> Prompt:
        """Asks for what is wrong with the answer by `rule`."""
        begun = [*self._shown(), *turns(prompt), _said(answer), _asked(rule.critique, "Critique Request")]
        return self._opened(begun, "Critique")

    def revision(self, prompt: Prompt, answer: str, critique: str | None, rule: Principle) -> Prompt:
        """Asks to write the answer again, after the critique where there is one."""
        begun = [*self._shown(critique is not None), *turns(prompt), _said(answer)]
        if critique is not None:
            begun += [_asked(rule.critique, "Critique Request"), _said(critique, "Critique")]
        return self._opened([*begun, _asked(rule.revision, "Revision Request")], "Revision")

    def judgement(self, prompt: Prompt, first: str, second: str, rule: Principle) -> tuple[Prompt, list[str]]:
        """Asks which of two answers is better by `rule`, and the options, first and second."""
        text = (
            f"Here is a conversation between a human and an assistant.\n\n{_transcript(turns(prompt))}\n\n"
            f"{rule.question}\n\n(A) {first}\n\n(B) {second}\n\n"
        )
        if self.style == "chat":
            return [{"role": "user", "content": f"{text}Answer with A or B only."}], list(LETTERS)
        return f"{text}The better answer is:", [f" ({letter})" for letter in LETTERS]

    def taken(self, raw: str) -> str:
        """The text of what the model wrote, without its thoughts and the turns that it wrote for others."""
        raw = _THOUGHTS.sub("", raw)
        return (_TURN.split(raw)[0] if self.style == "transcript" else raw).strip()

    def completion(self, text: str) -> str:
        """An answer as it follows `kept`."""
        return text if self.style == "chat" else f" {text}"

    def _shown(self, with_critique: bool = True) -> list[dict[str, str]]:
        shown = []
        for example in self.examples:
            rule = self.principles[example.principle]
            shown += [{"role": "user", "content": example.prompt}, _said(example.answer)]
            if with_critique:
                shown += [_asked(rule.critique, "Critique Request"), _said(example.critique, "Critique")]
            shown += [_asked(rule.revision, "Revision Request"), _said(example.revision, "Revision")]
        return shown

    def _opened(self, begun: list[dict[str, str]], heading: str) -> Prompt:
        if self.style == "chat":
            # A system message may stand at the start alone, so that of the prompt goes before the examples.
            systems = [message for message in begun if message["role"] == "system"]
            others = [message for message in begun if message["role"] != "system"]
            return [{name: message[name] for name in ("role", "content")} for message in [*systems, *others]]
        return f"{_transcript(begun)}\n\n{heading}:"


def turns(prompt: Prompt) -> Messages:
    """A prompt as messages; a text is the user's turn."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def last_turn(prompt: Prompt) -> str:
    """What the prompt ends with, for a table."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _said(text: str, heading: str = "Assistant") -> dict[str, str]:
    return {"role": "assistant", "content": text, "heading": heading}


def _asked(text: str, heading: str) -> dict[str, str]:
    return {"role": "user", "content": text, "heading": heading}


def _transcript(messages: Sequence[dict[str, str]]) -> str:
    named = {"user": "Human", "assistant": "Assistant", "system": "System"}
    parts = []
    for message in messages:
        heading = message.get("heading") or named.get(message["role"], message["role"].capitalize())
        parts.append(f"{heading}: {message['content']}")
    return "\n\n".join(parts)


def _ends(model: Any) -> set[int]:
    """Tokens that end what the model writes."""
    config = getattr(model.model, "generation_config", None)
    found = [getattr(model.tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)]
    flat = [token for one in found for token in (one if isinstance(one, list | tuple) else [one])]
    return {token for token in flat if token is not None}
