"""What the policy says by itself: answers sampled from it, in the tokens that it chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from veridical.comparison.rows import Rows, sampled_rows
from veridical.errors import DataError
from veridical.scoring import new_tokens

if TYPE_CHECKING:
    from veridical.comparison.duo import Duo

BATCH = 32
"""Prompts that are answered together."""


def sample(
    duo: Duo,
    data: Any,
    *,
    count: int = 64,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    on_long: Literal["error", "truncate"] = "error",
    seed: int = 0,
) -> Rows:
    """Answers of the policy to prompts, each prompt once, up to its end of sequence.

    Sampling is from the whole distribution (no top-k, no top-p, whatever the model's own defaults), since the
    mean KL on samples estimates KL(policy || reference) of whole answers only then. Token ids are kept as
    they were drawn; a text that is tokenised again may have others.

    Args:
        duo: Models of one vocabulary.
        data: `Pairs` or a list of texts or chats.
        count: Prompts, drawn at random without repetition where there are more.
        max_new_tokens: Tokens of an answer at most.
        temperature: Of the distribution that is sampled from.
        on_long: What to do with a prompt that leaves no room for an answer within the context.
        seed: Of the draw of prompts and of the samples; torch's own random state is left as it was.

    Raises:
        DataError: No prompts that can be continued (such as chats that end with an answer).
    """
    pairs = hasattr(data, "prompts") and hasattr(data, "groups")
    prompts = list(data.prompts) if pairs else list(data)
    codes = np.unique(data.groups, return_inverse=True)[1].reshape(-1) if pairs else np.arange(len(prompts))
    rows = open_rows(prompts)
    if not rows:
        raise DataError("no prompt can be continued: every chat ends with the assistant's answer")
    if len(rows) > count:
        rows = sorted(np.random.default_rng([seed, 4]).choice(rows, size=count, replace=False).tolist())
    policy, longest = duo.policy, duo.context_length
    limit: dict[str, Any] = {"max_length": longest - max_new_tokens} if longest else {}
    before, _ = duo.encode([prompts[row] for row in rows], on_long=on_long, **limit)
    ends = ends_of(policy)
    given, new = [], []
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in range(0, len(rows), BATCH):
            part = before[start : start + BATCH]
            made = new_tokens(
                policy, part, max_new_tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0
            )
            given += [item.ids for item in part]
            new += [_until_end(row, ends) for row in made.tolist()]
    return sampled_rows(given, new, codes[rows].astype(np.int64))


def open_rows(prompts: Sequence[Any]) -> list[int]:
    """Where each prompt that can be continued (a text, or a chat without its answer) first stands."""
    first: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        if can_go_on(prompt):
            first.setdefault(repr(prompt), row)
    return list(first.values())


def can_go_on(prompt: Any) -> bool:
    """Whether a prompt is a text, or a chat without its answer."""
    return isinstance(prompt, str) or prompt[-1]["role"] != "assistant"


def ends_of(model: Any) -> set[int]:
    """Ids after which an answer has ended."""
    settings = getattr(model.model, "generation_config", None)
    found: Any = getattr(settings, "eos_token_id", None)
    found = getattr(model.tokenizer, "eos_token_id", None) if found is None else found
    found = found if isinstance(found, list | tuple) else [found]
    return {int(token) for token in found if token is not None}


def _until_end(row: list[int], ends: set[int]) -> tuple[int, ...]:
    """The row up to and with its first end of sequence."""
    stop = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
    return tuple(row[: stop + 1])
