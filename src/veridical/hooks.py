"""The hook engine: reading, editing and stopping early, by plain forward hooks on named modules.

Reading changes nothing: a forward pass with reads gives the same bits as one without. Every hook is removed
when its context ends, also by an exception, and only our own hooks are. Within one context, edits at a site
come before reads at it; hooks that were there before run first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veridical import attention
from veridical.errors import InputError, ModelError
from veridical.sites import Site

Tap = Callable[[Tensor], Tensor | None]
"""Sees a site's value; returns a new value, or None to leave it."""

RECORDER = "transformers.utils.output_capturing"
"""Where the hooks come from that transformers leaves on a model once `output_hidden_states` was asked for.

They note what a block returns while it is asked for again, and do nothing otherwise.
"""


def standing_hooks(root: nn.Module) -> list[str]:
    """Names of the modules below `root` that have forward hooks, other than transformers' own recorders."""
    return [
        name
        for name, part in root.named_modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if getattr(hook, "__module__", None) != RECORDER
    ]


class View(Protocol):
    """How a site's value lies within the tensor that a module takes or gives."""

    def read(self, tensor: Tensor) -> Tensor:
        """The site's value."""
        ...

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """The tensor with the site's value replaced."""
        ...


@dataclass(frozen=True)
class Whole:
    """The tensor itself."""

    def read(self, tensor: Tensor) -> Tensor:
        return tensor

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True)
class Heads:
    """`heads` of width `d_head` side by side in the last dimension, the first at `start`."""

    heads: int
    d_head: int
    start: int = 0

    def read(self, tensor: Tensor) -> Tensor:
        part = tensor[..., self.start : self.start + self.heads * self.d_head]
        return part.unflatten(-1, (self.heads, self.d_head))

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        end = self.start + self.heads * self.d_head
        return torch.cat([tensor[..., : self.start], value.flatten(-2), tensor[..., end:]], dim=-1)


@dataclass(frozen=True)
class Interleaved:
    """Part `index` of (query, key, value), which lie side by side head after head, as in gpt-neox."""

    heads: int
    d_head: int
    index: int

    def read(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, 3, self.d_head))[..., self.index, :]

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        parts = list(tensor.unflatten(-1, (self.heads, 3, self.d_head)).unbind(-2))
        parts[self.index] = value
        return torch.stack(parts, dim=-2).flatten(-3)


@dataclass(frozen=True)
class Place:
    """Where a site is found in a model.

    Attributes:
        module: The module whose input or output holds it; for a pattern, the attention module.
        side: "in" or "out"; "pattern" for attention probabilities.
        width: Trailing shape of the value after [batch, pos]; None where it depends on the input.
        view: How the value lies in that tensor.
        carried: The same tensor is also carried on under another name (the residual stream between
            attention and MLP), so an edit is written into it, not put in its place.
        block: Where rows and positions are flattened into one dimension, the block whose input tells them
            apart.
    """

    module: nn.Module
    side: str
    width: tuple[int, ...] | None = None
    view: View = field(default_factory=Whole)
    carried: bool = False
    block: nn.Module | None = None


@dataclass(repr=False)
class Run:
    """What a forward pass gave.

    Attributes:
        output: What the model returned; None if it was stopped early.
        values: What was read, by canonical site name.
    """

    output: Any = None
    values: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        ended = "stopped early" if self.output is None else "with output"
        return f"Run({len(self.values)} values read, {ended})"

    @property
    def logits(self) -> Tensor:
        """The model's logits.

        Raises:
            ModelError: The run was stopped early, or the model gives none.
        """
        found = self.output if isinstance(self.output, Tensor) else getattr(self.output, "logits", None)
        if found is None:
            raise ModelError("this run has no logits; it was stopped early or the model has no head")
        return found

    def __getitem__(self, site: str | Site) -> Any:
        return self.values[Site.parse(site).name]


class Stop(Exception):
    """Ends a forward pass once everything asked for was read. Always caught by the engine."""


Reads = Mapping[Site, tuple[Place, Callable[[Tensor], Any] | None]]
Writes = Mapping[Site, tuple[Place, Callable[[Tensor], Tensor]]]


@contextlib.contextmanager
def attached(reads: Reads, writes: Writes, *, stop: bool = False, once: bool = False) -> Iterator[Run]:
    """Hooks for `reads` and `writes` while the context lasts; yields the `Run` whose values they fill.

    Args:
        reads: For each site its place and what to do with its value; None keeps the value itself.
        writes: For each site its place and the edit.
        stop: Raise `Stop` as soon as every read was made.
        once: A site that is reached twice is an error; otherwise the last value is kept.
    """
    run = Run()
    remaining = set(reads)
    handles: list[Any] = []
    shapes: dict[nn.Module, torch.Size] = {}

    def reader(site: Site, act: Callable[[Tensor], Any] | None) -> Tap:
        def tap(value: Tensor) -> None:
            if once and site.name in run.values:
                raise ModelError(
                    f"{site} was reached more than once in one forward pass; use hooks() with a function"
                )
            run.values[site.name] = value if act is None else act(value)
            remaining.discard(site)
            if stop and not remaining:
                raise Stop

        return tap

    def writer(site: Site, edit: Callable[[Tensor], Tensor]) -> Tap:
        # The edit gets its own copy, so that one that works in place cannot reach tensors that share the
        # memory.
        return lambda value: _checked(site, edit(value.clone()), value)

    try:
        for block in {
            place.block for place, _ in [*reads.values(), *writes.values()] if place.block is not None
        }:
            handles.append(_note_shape(block, shapes))
        for site, (place, edit) in writes.items():
            handles.append(_attach(place, writer(site, edit), shapes))
        for site, (place, act) in reads.items():
            handles.append(_attach(place, reader(site, act), shapes))
        yield run
    finally:
        for handle in reversed(handles):
            handle.remove()


@contextlib.contextmanager
def overridden(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for some modules while the context lasts; hooks on them, ours or a user's, still run.

    Args:
        forwards: For each module a function of (its own forward, args, kwargs) that stands in for it.
    """
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, act in forwards.items():
            before.append((module, module.__dict__.get("forward")))
            own = module.forward
            module.__dict__["forward"] = lambda *args, own=own, act=act, **kwargs: act(own, args, kwargs)
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def missed(run: Run, reads: Sequence[Site]) -> None:
    """Refuses a run in which a site was not reached.

    Raises:
        ModelError: Names the sites.
    """
    names = [site.name for site in reads if site.name not in run.values]
    if names:
        raise ModelError(f"not reached in this forward pass: {', '.join(names)}")


def first_tensor(values: Any) -> tuple[Any, Tensor] | None:
    """The key and value of the first tensor in a tuple or dict; None if it holds none."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    return next(((key, value) for key, value in items if isinstance(value, Tensor)), None)


def _attach(place: Place, tap: Tap, shapes: Mapping[nn.Module, torch.Size]) -> Any:
    if place.side == "pattern":
        return attention.attach(place.module, tap)
    if place.side == "in":
        return _attach_input(place, tap, shapes)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _visit(place, tap, output, shapes)
        found = first_tensor(output) if isinstance(output, (tuple, list, Mapping)) else None
        if found is None:
            raise ModelError(f"the output of {type(module).__name__} holds no tensor; read another module")
        key, tensor = found
        edited = _visit(place, tap, tensor, shapes)
        return None if edited is None else replaced(output, key, edited)

    return place.module.register_forward_hook(hook)


def _attach_input(place: Place, tap: Tap, shapes: Mapping[nn.Module, torch.Size]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, tensor = main_input(module, args, kwargs)
        edited = _visit(place, tap, tensor, shapes)
        if edited is None:
            return None
        if isinstance(key, str):
            return args, {**kwargs, key: edited}
        return replaced(args, key, edited), kwargs

    return place.module.register_forward_pre_hook(hook, with_kwargs=True)


def _visit(place: Place, tap: Tap, tensor: Tensor, shapes: Mapping[nn.Module, torch.Size]) -> Tensor | None:
    flat = place.block is not None and tensor.dim() == 2
    whole = tensor.unflatten(0, shapes[place.block]) if flat else tensor  # type: ignore[index]
    value = place.view.read(whole)
    # A value that is only a part of the tensor, or laid out otherwise, goes back into it when gradients are
    # kept, bit for bit the same, so that what was read is what the output depends on.
    kept = torch.is_grad_enabled() and tensor.requires_grad and value is not tensor
    if kept and place.carried:
        value = value.clone()
    edited = tap(value)
    if edited is None:
        if not kept:
            return None
        edited = value
    whole = place.view.write(whole, edited)
    whole = whole.flatten(0, 1) if flat else whole
    if not place.carried:
        return whole
    tensor.copy_(whole)
    return None


def _note_shape(block: nn.Module, shapes: dict[nn.Module, torch.Size]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes[block] = main_input(module, args, kwargs)[1].shape[:2]

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def main_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """The tensor that a module works on, and its place: a number among `args`, or a name in `kwargs`."""
    found = first_tensor(args)
    if found is None and isinstance(kwargs.get("hidden_states"), Tensor):
        found = "hidden_states", kwargs["hidden_states"]
    found = found or first_tensor(kwargs)
    if found is None:
        raise ModelError(f"the input of {type(module).__name__} holds no tensor; read another module")
    return found


def replaced(values: Any, key: Any, edited: Tensor) -> Any:
    """`values` (a tuple, list or mapping) with `edited` at `key`."""
    if isinstance(values, Mapping):
        return type(values)({**values, key: edited})  # type: ignore[call-arg]
    items = [edited if index == key else value for index, value in enumerate(values)]
    return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)


def _checked(site: Site, edited: Any, value: Tensor) -> Tensor:
    if edited is None:
        raise InputError(f"the edit at {site} returned None; return the new tensor")
    if not isinstance(edited, Tensor):
        raise InputError(f"the edit at {site} returned a {type(edited).__name__}; return a tensor")
    for what in ("shape", "dtype", "device"):
        was, now = getattr(value, what), getattr(edited, what)
        if was != now:
            show = tuple if what == "shape" else str
            raise InputError(f"the edit at {site} changed the {what} from {show(was)} to {show(now)}")
    return edited
