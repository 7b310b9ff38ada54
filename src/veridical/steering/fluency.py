"""How well what a steered model says reads: its likelihood under the plain model, repetition, length."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from veridical.tokens import Prompt, by_length

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

NEW_TOKENS = 32
GRAM = 3
BATCH_TOKENS = 4096


class Acting(Protocol):
    """Makes a context in which the model is steered."""

    def __call__(self) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Fluency:
    """Greedy answers to prompts.

    Attributes:
        texts: The answers.
        surprise: `[rows]`, mean negative log-likelihood of an answer's tokens under the plain model, nats;
            infinite for an empty answer.
        repetition: `[rows]`, share of an answer's runs of three tokens that occurred before in it.
        length: `[rows]`, tokens.
    """

    texts: list[str]
    surprise: np.ndarray
    repetition: np.ndarray
    length: np.ndarray

    def score(self, plain: Fluency) -> float:
        """From 0 to 2: 2 where answers are as likely, and repeat no more, than the plain model's own.

        `2 exp(-(surprise - plain surprise)) (1 - (repetition - plain repetition))`, differences below 0
        counted as 0, averaged over prompts.
        """
        worse = np.maximum(self.surprise - plain.surprise, 0)
        repeated = np.maximum(self.repetition - plain.repetition, 0)
        return float(2 * np.mean(np.exp(-worse) * (1 - repeated)))


def fluency(
    model: HookedModel, context: Acting, prompts: Sequence[Prompt], max_new_tokens: int = NEW_TOKENS
) -> Fluency:
    """Greedy answers of the steered model, judged by the plain one.

    Args:
        model: The model, plain.
        context: Makes a context in which it is steered.
        prompts: Texts or chats.
        max_new_tokens: Tokens of an answer at most.
    """
    from veridical.scoring import new_tokens

    plain = model.encode(prompts)
    new: list[list[int]] = [[] for _ in plain]
    with context():
        asked = model.encode(prompts)
        for batch in by_length([len(row.ids) + max_new_tokens for row in asked], BATCH_TOKENS):
            made = new_tokens(model, [asked[row] for row in batch], max_new_tokens).tolist()
            for row, tokens in zip(batch, made):
                new[row] = _until_end(model, tokens)
    surprise = np.full(len(plain), np.inf)
    whole = [[*row.ids, *tokens] for row, tokens in zip(plain, new)]
    for batch in by_length([len(row) for row in whole], BATCH_TOKENS):
        with torch.no_grad():
            logits = model.run(model.batch([whole[row] for row in batch])).logits
        for line, row in enumerate(batch):
            start, end = len(plain[row].ids), len(whole[row])
            if end > start:
                logs = logits[line, start - 1 : end - 1].float().log_softmax(-1)
                said = torch.tensor(new[row], device=logs.device)
                surprise[row] = -float(logs.gather(1, said[:, None]).mean())
    return Fluency(
        model.tokenizer.batch_decode(new, skip_special_tokens=True),
        surprise,
        np.array([repetition(tokens) for tokens in new]),
        np.array([len(tokens) for tokens in new]),
    )


def repetition(tokens: Sequence[int]) -> float:
    """Share of the runs of three tokens that occurred before; 0 for texts too short to have two."""
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _until_end(model: HookedModel, tokens: list[int]) -> list[int]:
    """An answer up to and with its end of sequence; what pads it behind is left off."""
    from veridical.comparison.samples import ends_of

    ends = ends_of(model)
    stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
