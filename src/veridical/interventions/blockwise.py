"""Blocks that are passed over, given other rows, or cut short, for the time of one forward.

What a block is called with (masks, positions, rotary angles) is nested tensors of the model's own making;
they are cut by row or by query where their shape says that they go by row or by query.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veridical.errors import ModelError
from veridical.hooks import first_tensor, main_input, overridden, replaced
from veridical.interventions.prefix import Filled, filling


@contextlib.contextmanager
def substituted(
    blocks: Sequence[nn.Module], outputs: Sequence[Any], own: Mapping[int, Tensor], total: int
) -> Iterator[None]:
    """Blocks in `own` run on these rows, whatever comes in; the others hand their input on."""
    handles: list[Any] = []

    def substitute(rows: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key, hidden = main_input(module, args, kwargs)
            args, kwargs = sliced((args, kwargs), total, len(rows))
            return with_input(args, kwargs, key, rows.to(hidden.device))

        return hook

    forwards = {block: handing_on(outputs[layer]) for layer, block in enumerate(blocks) if layer not in own}
    try:
        for layer, rows in own.items():
            handles.append(blocks[layer].register_forward_pre_hook(substitute(rows), with_kwargs=True))
        with overridden(forwards):
            yield
    finally:
        for handle in reversed(handles):
            handle.remove()


@contextlib.contextmanager
def noted(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Notes what each block returns."""
    outputs: list[Any] = [None] * len(blocks)
    handles: list[Any] = []

    def noting(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[layer] = output

        return hook

    try:
        for layer, block in enumerate(blocks):
            handles.append(block.register_forward_hook(noting(layer)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def handing_on(output: Any) -> Callable[..., Any]:
    """A forward that hands its main input on, in the form in which the block gave `output`."""

    def forward(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = main_input(_NO_MODULE, args, kwargs)[1]
        return with_output(output, lambda _: hidden)

    return forward


_NO_MODULE = nn.Identity()


def last_tokens(cache: Any, layer: int) -> Callable[..., Any]:
    """A block's forward past its keys and values for its last token only.

    It is called twice: with all tokens until its keys and values are there, then with the last one, which
    sees them all. The other tokens come out as they went in; nothing reads them.
    """

    def forward(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, hidden = main_input(_NO_MODULE, args, kwargs)
        width = hidden.shape[1]
        if width == 1:
            return own(*args, **kwargs)
        with filling(cache, layer) as held:
            try:
                own(*args, **kwargs)
            except Filled:
                pass
            else:
                raise ModelError("the last block did not reach its key/value cache")
            held.filled = True
            args, kwargs = _last_of((args, kwargs), width)
            args, kwargs = with_input(args, kwargs, key, hidden[:, -1:])
            output = own(*args, **kwargs)
        return with_output(output, lambda new: torch.cat([hidden[:, :-1], new], dim=1))

    return forward


def _last_of(value: Any, width: int) -> Any:
    """Nested arguments with the query dimension of every tensor, of `width`, cut to its last."""
    if isinstance(value, Tensor):
        if value.dim() == 4 and value.shape[2] == width:
            return value[:, :, -1:]
        if value.dim() in (2, 3) and value.shape[1] == width:
            return value[:, -1:]
        return value[-1:] if value.dim() == 1 and len(value) == width else value
    return _mapped(value, lambda item: _last_of(item, width))


def sliced(value: Any, total: int, rows: int) -> Any:
    """Nested arguments with every tensor of `total` rows cut to its first `rows`."""
    if rows == total:
        return value
    if isinstance(value, Tensor):
        return value[:rows] if value.dim() >= 2 and len(value) == total else value
    return _mapped(value, lambda item: sliced(item, total, rows))


def _mapped(value: Any, act: Callable[[Any], Any]) -> Any:
    """Items of a plain tuple, list or dict through `act`; anything else as it is."""
    if type(value) in (tuple, list):
        return type(value)(act(item) for item in value)
    return {name: act(item) for name, item in value.items()} if type(value) is dict else value


def with_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], key: Any, hidden: Tensor) -> Any:
    """Arguments with the main input, found at `key` by `main_input`, replaced."""
    if isinstance(key, str):
        return args, {**kwargs, key: hidden}
    return replaced(args, key, hidden), dict(kwargs)


def with_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with its first tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    found = first_tensor(output)
    assert found is not None
    return replaced(output, found[0], change(found[1]))
