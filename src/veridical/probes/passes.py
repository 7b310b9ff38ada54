"""What each forward pass of a model is about: which rows, which tokens, which of them real.

Hooks at a site see a bare tensor `[rows, tokens, width]`. Whether a token is padding, belongs to the prompt,
or was generated stands in the inputs of the model, which a hook on the model itself notes here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from veridical.errors import ModelError, unknown

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

Positions = Literal["all", "prompt", "prompt_last", "generated"]
"""Tokens of a call: every one, those of the prompt, the last of these in each row, those after it.

The prompt is the first pass, unless the caller says where each row's prompt ends in it
(`HookedModel.prompt_tokens`), as scoring does, which reads prompt and answer in one pass.
"""


@dataclass
class Pass:
    """One forward pass.

    Attributes:
        ids: `[rows, tokens]`, its token ids; None where it was given embeddings.
        mask: As the model was given it; None where every token is real.
        past: Tokens of each row before this pass, padding included (held in the key/value cache).
        shape: Rows and tokens of this pass.
        first: Whether it begins a call: a prompt, not what was generated after it.
        cached: Whether it fills a key/value cache, so that further tokens of the same texts may follow.
        ends: Tokens of each row's prompt, where more than the prompt is read in the first pass.
    """

    ids: Tensor | None
    mask: Tensor | None
    past: int
    shape: tuple[int, int]
    first: bool
    cached: bool = False
    ends: Sequence[int] | None = None

    @property
    def real(self) -> Tensor | None:
        """`[rows, past + tokens]` bool: which tokens up to the end of this pass are no padding."""
        mask, width = self.mask, self.past + self.shape[1]
        if mask is None:
            return None
        if mask.dim() == 4:  # of a compiled cache: what the last query sees
            last = mask[:, 0, -1, :width]
            seen = last if last.dtype == torch.bool else last == 0
            return seen.expand(self.shape[0], -1)
        return mask[:, :width].bool()


class Passes:
    """Follows a model's forward passes; `current` is the one that is running, or the last."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.current: Pass | None = None

    def require(self) -> Pass:
        """The running pass."""
        if self.current is None:
            raise ModelError("the site was reached without a forward pass of the model itself")
        return self.current

    def choose(self, positions: Positions) -> Tensor | None:
        """`[rows, tokens]` bool: the tokens of the running pass to act on; None for all of them."""
        now = self.require()
        if now.ends is not None and positions != "all":
            return _within(now, now.ends, positions)
        if positions == "all" or (positions == "prompt" and now.first):
            return None
        if positions == "generated" and not now.first:
            return None
        chosen = torch.zeros(now.shape, dtype=torch.bool)
        if positions == "prompt_last" and now.first:
            real = now.real
            if real is None:
                chosen[:, -1] = True
            else:
                here = real[:, now.past :].cpu()
                order = torch.arange(1, now.shape[1] + 1)
                chosen[torch.arange(now.shape[0]), (here * order).argmax(1)] = True
        return chosen

    def note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook: notes a pass from the model's arguments."""
        ids, shape = _tokens(args, kwargs)
        mask = _mask(kwargs.get("attention_mask"))
        cache = kwargs.get("past_key_values")
        past = _past(cache, mask, shape[1])
        before = self.current
        follows = before is not None and 0 < past <= before.past + before.shape[1]
        first = not follows or (before is not None and before.shape[0] != shape[0])
        cached = cache is not None or bool(kwargs.get("use_cache"))
        given = self.model.prompt_tokens if past == 0 else None
        ends = given if given is not None and len(given) == shape[0] else None
        self.current = Pass(ids, mask, past, shape, first, cached, ends)


@contextlib.contextmanager
def following(model: HookedModel) -> Iterator[Passes]:
    """Follows the model's passes while the context lasts."""
    passes = Passes(model)
    handle = model.model.register_forward_pre_hook(passes.note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def _within(now: Pass, ends: Sequence[int], positions: Positions) -> Tensor:
    """`[rows, tokens]` bool, of a pass that reads more than the prompt."""
    real = now.real
    real = torch.ones(now.shape, dtype=torch.bool) if real is None else real.cpu()
    order, last = real.cumsum(1) - 1, torch.tensor(list(ends))[:, None] - 1
    chosen = {"prompt": order <= last, "prompt_last": order == last, "generated": order > last}
    return chosen[positions] & real


def check_positions(positions: str) -> None:
    """Refuses a name that is none of `Positions`."""
    if positions not in get_args(Positions):
        raise unknown("choice of positions", positions, get_args(Positions))


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, tuple[int, int]]:
    """Token ids, and rows and tokens, of a pass."""
    given = [kwargs.get(name) for name in ("input_ids", "input", "inputs_embeds", "pixel_values")]
    tensor = next((x for x in (*given, *args) if isinstance(x, Tensor)), None)
    if tensor is None or tensor.dim() < 2:
        raise ModelError("this forward pass was given no tensor of tokens [rows, tokens]")
    ids = tensor if tensor.dim() == 2 and not tensor.is_floating_point() else None
    return ids, (tensor.shape[0], tensor.shape[1])


def _mask(given: Any) -> Tensor | None:
    if isinstance(given, Mapping):  # one for each kind of attention layer
        given = given.get("full_attention")
    return given if isinstance(given, Tensor) else None


def _past(cache: Any, mask: Tensor | None, tokens: int) -> int:
    """Tokens before this pass. The mask is asked first: it is on the right side of any device."""
    if cache is None:
        return 0
    if mask is not None and mask.dim() == 2:
        return mask.shape[1] - tokens
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if length is not None else 0
