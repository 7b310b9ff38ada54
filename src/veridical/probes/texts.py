"""The text that a model had read at each vector, for the text-only baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WHOLE = ("last", "-1", "all", "mean", "answer")
"""Selections after whose last token the text is read to its end."""


def read_texts(
    columns: Mapping[str, np.ndarray], tokens: str | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Prompt and completion of each vector's row up to the last token that was read from it.

    Vectors of one row share that text, so with several tokens a row the baseline knows at least as much as
    the probe did.

    Args:
        columns: Label columns with `prompt` (text or chat messages) and perhaps `completion`, or `text`.
        tokens: The selection that the vectors were read with.

    Returns:
        Texts `[n]` or None when the rows hold none, and notes on texts that could not be cut exactly.
    """
    prompts = columns.get("prompt", columns.get("text"))
    if prompts is None:
        return None, ()
    prompt_texts = [as_text(prompt) for prompt in prompts]
    if tokens == "prompt_last":
        return np.array(prompt_texts, dtype=object), ()
    completions = columns.get("completion")
    said = [c if isinstance(c, str) else "" for c in completions] if completions is not None else None
    whole = prompt_texts if said is None else [_joined(p, c) for p, c in zip(prompt_texts, said)]
    notes: tuple[str, ...] = ()
    if tokens == "span" and "span_end" in columns:
        whole = [
            _cut(p, c, end) for p, c, end in zip(prompt_texts, said or [""] * len(whole), columns["span_end"])
        ]
    elif tokens is not None and tokens not in WHOLE:
        notes = (
            f"The text baseline saw the whole text, which may go on after the token that was read "
            f"(tokens={tokens}).",
        )
    return np.array(whole, dtype=object), notes


def as_text(prompt: Any) -> str:
    """A prompt as plain text; of chat messages the roles and contents in order."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence | np.ndarray):
        return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return str(prompt)


def _joined(prompt: str, completion: str) -> str:
    return f"{prompt}\n{completion}" if completion else prompt


def _cut(prompt: str, completion: str, end: Any) -> str:
    """Spans count characters of the completion where there is one, else of the text."""
    if end is None or end != end:
        return _joined(prompt, completion)
    return _joined(prompt, completion[: int(end)]) if completion else prompt[: int(end)]
