"""Prompts to tokens and tokens to batches, with the border between prompt and completion known exactly.

- A prompt is text, or a chat (a list of messages with `role` and `content`), which the tokenizer's own chat
  template turns into text up to where the assistant's answer begins. A chat that ends with an assistant
  message is taken as complete.
- Prompt and completion are joined as text and tokenised once, as the model would read them. The completion
  begins with the first token that reaches past the prompt's last character: a token that straddles the
  border belongs to the completion.
- Plain text gets the special tokens that the tokenizer adds by itself; a chat gets none besides those that
  its template holds, so no begin-of-sequence token is doubled. An end-of-sequence token that a tokenizer
  would add behind a causal model's text is left off, since the text is there to be continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from veridical.errors import DataError, InputError

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Encoded:
    """A tokenised prompt, with its completion if it has one.

    Attributes:
        ids: Token ids.
        text: The exact text that was tokenised; "" for token input.
        offsets: Span of each token in characters of `text`, (0, 0) for special tokens that stand for no
            character; None without a fast tokenizer.
        prompt_chars: `text[:prompt_chars]` is the prompt, the rest the completion.
        prompt_tokens: Index of the completion's first token; `len(ids)` without a completion.
    """

    ids: tuple[int, ...]
    text: str
    offsets: tuple[tuple[int, int], ...] | None
    prompt_chars: int
    prompt_tokens: int


def encode(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[str | None] | None = None,
    *,
    max_length: int | None = None,
    on_long: Literal["error", "truncate"] = "error",
    drop_end: bool = True,
) -> list[Encoded]:
    """Tokenises prompts, each joined with its completion.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: Texts or chats.
        completions: One for each prompt; None or "" for none.
        max_length: Longest row in tokens, completion included.
        on_long: "error", or "truncate", which drops tokens from the start of the prompt and keeps a leading
            special token, the end of the prompt, and the whole completion.
        drop_end: Leave off an end-of-sequence token that the tokenizer adds by itself.

    Raises:
        DataError: An empty or overlong prompt, a chat without a template, counts that differ; names the row.
    """
    prompts = _listed(prompts)
    if completions is not None and len(completions) != len(prompts):
        raise DataError(
            f"{len(prompts)} prompts but {len(completions)} completions; give one for each prompt"
        )
    if on_long not in ("error", "truncate"):
        raise InputError(f"on_long is {on_long!r}; expected 'error' or 'truncate'")
    rendered = [render(tokenizer, prompt, row) for row, prompt in enumerate(prompts)]
    texts = [text + _completion(completions, row, prompts[row]) for row, text in enumerate(rendered)]
    tokenised = _tokenise(tokenizer, texts, [not isinstance(prompt, str) for prompt in prompts], drop_end)
    encoded = []
    for row, (text, prompt, (ids, offsets)) in enumerate(zip(texts, rendered, tokenised)):
        if not ids:
            raise DataError(f"row {row}: the prompt has no tokens")
        chat = not isinstance(prompts[row], str)
        border = _border(tokenizer, text, prompt, ids, offsets, chat, drop_end, row)
        item = Encoded(tuple(ids), text, offsets, len(prompt), border)
        encoded.append(_fitted(item, max_length, on_long, tokenizer, row))
    return encoded


def render(tokenizer: Any, prompt: Prompt, row: int = 0) -> str:
    """The text of a prompt; of a chat, what the tokenizer's template makes of it, up to the answer.

    Raises:
        DataError: An empty prompt, a malformed chat, no chat template, or a chat that the template refuses.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise DataError(f"row {row}: the prompt is empty")
        return prompt
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(message, dict) for message in prompt):
        raise DataError(f"row {row}: a prompt is text or a list of messages, not a {type(prompt).__name__}")
    if not prompt:
        raise DataError(f"row {row}: the chat has no messages")
    if any(not {"role", "content"} <= set(message) for message in prompt):
        raise DataError(f"row {row}: each message of a chat needs 'role' and 'content'")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"row {row} is a chat, but this tokenizer has no chat template; give the prompts as text, "
            "or set tokenizer.chat_template"
        )
    opened = prompt[-1]["role"] != "assistant"
    try:
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=opened)
    except Exception as error:
        said = " ".join(str(error).split())
        raise DataError(f"row {row}: the chat template refused the chat ({said})") from error
    return str(text)


def pad(
    encoded: Sequence[Encoded | Sequence[int]],
    pad_id: int,
    padding_side: Literal["right", "left"] = "right",
    positions: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """One batch: `input_ids`, `attention_mask`, and with `positions` `position_ids`, each [rows, pos].

    Positions count real tokens from 0, on either side of padding, so that a batch gives each row the
    numbers that it has alone.
    """
    if padding_side not in ("right", "left"):
        raise InputError(f"padding_side is {padding_side!r}; expected 'right' or 'left'")
    rows = [list(item.ids) if isinstance(item, Encoded) else list(item) for item in encoded]
    if not rows:
        raise DataError("an empty batch; give at least one prompt")
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if padding_side == "right" else slice(width - len(row), width)
        ids[index, where] = torch.tensor(row, dtype=torch.long)
        mask[index, where] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if positions:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def pad_id(tokenizer: Any, config: Any) -> int:
    """The id to pad with: the tokenizer's or the config's padding, else its end of sequence, else 0."""
    for holder in (tokenizer, config):
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(holder, name, None)
            found = found[0] if isinstance(found, (list, tuple)) and found else found
            if isinstance(found, int) and found >= 0:
                return found
    return 0


def _listed(prompts: Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        raise DataError("expected a list of prompts, not one text; put it in a list")
    listed = list(prompts)
    if not listed:
        raise DataError("there are no prompts")
    if all(isinstance(prompt, dict) for prompt in listed):
        raise DataError("expected a list of prompts, not one chat; put it in a list")
    return listed


def _completion(completions: Sequence[str | None] | None, row: int, prompt: Prompt) -> str:
    completion = (completions[row] if completions is not None else None) or ""
    if not isinstance(completion, str):
        raise DataError(f"row {row}: the completion is a {type(completion).__name__}; expected text")
    if completion and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(
            f"row {row}: the chat already ends with the assistant's answer, and a completion came too"
        )
    return completion


Tokenised = tuple[list[int], tuple[tuple[int, int], ...] | None]


def _tokenise(tokenizer: Any, texts: list[str], chats: list[bool], drop_end: bool) -> list[Tokenised]:
    found: list[Tokenised | None] = [None] * len(texts)
    for chat in (False, True):
        rows = [row for row, is_chat in enumerate(chats) if is_chat == chat]
        if rows:
            for row, item in zip(
                rows, _tokenise_alike(tokenizer, [texts[row] for row in rows], chat, drop_end)
            ):
                found[row] = item
    return [item for item in found if item is not None]


def _tokenise_alike(tokenizer: Any, texts: list[str], chat: bool, drop_end: bool) -> list[Tokenised]:
    fast = bool(getattr(tokenizer, "is_fast", False))
    out = tokenizer(
        texts,
        add_special_tokens=not chat,
        return_offsets_mapping=fast,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    spans: Any = out["offset_mapping"] if fast else [None] * len(texts)
    tokenised = []
    for text, ids, offsets in zip(texts, out["input_ids"], spans):
        ids = list(ids)
        if drop_end and not chat and _ends_by_itself(tokenizer, text, ids, offsets):
            ids, offsets = ids[:-1], offsets[:-1] if offsets is not None else None
        tokenised.append((ids, None if offsets is None else tuple((int(a), int(b)) for a, b in offsets)))
    return tokenised


def _ends_by_itself(tokenizer: Any, text: str, ids: list[int], offsets: Any) -> bool:
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None or len(ids) < 2 or ids[-1] != end:
        return False
    if offsets is not None:
        return tuple(offsets[-1]) == (0, 0)
    return not text.endswith(str(tokenizer.eos_token))


def _border(
    tokenizer: Any,
    text: str,
    prompt: str,
    ids: list[int],
    offsets: tuple[tuple[int, int], ...] | None,
    chat: bool,
    drop_end: bool,
    row: int,
) -> int:
    if len(text) == len(prompt):
        return len(ids)
    if offsets is not None:
        return next((index for index, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    alone, _ = _tokenise_alike(tokenizer, [prompt], chat, drop_end)[0]
    if alone != ids[: len(alone)]:
        raise DataError(
            f"row {row}: prompt and completion share a token, and this tokenizer does not tell "
            "where tokens begin; use a fast tokenizer"
        )
    return len(alone)


def _fitted(item: Encoded, limit: int | None, on_long: str, tokenizer: Any, row: int) -> Encoded:
    if limit is None or len(item.ids) <= limit:
        return item
    if on_long == "error":
        raise DataError(
            f"row {row} has {len(item.ids)} tokens, over the limit of {limit}; "
            "shorten it or use on_long='truncate'"
        )
    specials = set(getattr(tokenizer, "all_special_ids", ()))
    keep = 1 if item.ids[0] in specials else 0
    drop = len(item.ids) - limit
    if keep + drop >= item.prompt_tokens:
        raise DataError(
            f"row {row}: its completion has {len(item.ids) - item.prompt_tokens} tokens, "
            f"which leaves no room for the prompt within the limit of {limit}"
        )

    def cut(values: Any) -> Any:
        return None if values is None else (*values[:keep], *values[keep + drop :])

    return Encoded(cut(item.ids), item.text, cut(item.offsets), item.prompt_chars, item.prompt_tokens - drop)


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Row numbers in batches of like length, longest first, each at most `batch_tokens` with its padding.

    A row longer than `batch_tokens` is a batch by itself.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
