"""Passes whose backward is wanted for the first rows only, so that linear maps go back for these alone.

Two short runs in one batch share the reading of the weights on the way up; on the way down the second has no
gradient, and its zeros need not be multiplied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veridical.hooks import overridden

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


@contextlib.contextmanager
def first_rows(model: HookedModel, rows: int) -> Iterator[None]:
    """Inside, gradients at what plain linear maps of the blocks take are those of the first `rows` rows.

    Those of later rows are zero, as they are anyway for a metric that reads the first ones only. Values are
    the modules' own.
    """
    forwards = {
        module: _act(weight, rows)
        for block in model.architecture.blocks
        for module in block.modules()
        if (weight := _weight(module)) is not None
    }
    with overridden(forwards):
        yield


def _weight(module: nn.Module) -> Tensor | None:
    """`[out, in]` of a plain linear map (GPT-2's `Conv1D` holds it transposed)."""
    if type(module) is nn.Linear:
        return module.weight.detach()
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor):
        return module.weight.detach().T  # type: ignore[union-attr]
    return None


def _act(weight: Tensor, rows: int) -> Callable[..., Any]:
    def act(own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if not plain or args[0].dim() < 3 or len(args[0]) != 2 * rows or args[0].shape[-1] != weight.shape[1]:
            return own(*args, **kwargs)
        return _FirstRows.apply(args[0], weight, own, rows)

    return act


class _FirstRows(torch.autograd.Function):
    """A linear map, and a backward for the first rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, own: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        ctx.weight, ctx.rows = weight, rows
        return own(x)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = arrived
        given = gradient.new_zeros(*gradient.shape[:-1], ctx.weight.shape[1])
        given[: ctx.rows] = gradient[: ctx.rows] @ ctx.weight
        return given, None, None, None
