"""What can be trained for, by name, and what is trained: a LoRA, or for comparison edits of ReFT.

A loss is anything with `loss(runner, items, strength, beta)` and `check(items)`; a new one is a new file and
a line here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from veridical.adapters import lora_config
from veridical.errors import InputError
from veridical.steering import hidden_preference, reft, representation, rerouting
from veridical.steering.adapter_config import REFT, AdapterConfig
from veridical.steering.distil_vector import DistilVector
from veridical.steering.lora import LoRA, lora_of, lora_scaled, put_on
from veridical.steering.output_preference import OutputPreference
from veridical.steering.reft import ReFT

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.sites import Site
    from veridical.steering.runner import Runner
    from veridical.steering.twins import Twin

ON_OUTPUTS = ("dpo", "ipo")
MIDDLE = (1 / 3, 2 / 3)
"""Depths between which states are read where no site is named."""


class Loss(Protocol):
    """What is trained for."""

    def loss(self, runner: Runner, items: Sequence[Twin], strength: float, beta: float) -> Tensor:
        """The loss of one batch at a strength."""
        ...

    def check(self, items: Sequence[Twin]) -> None:
        """Refuses pairs that it cannot learn from."""
        ...


LOSSES: dict[str, Any] = {
    "representation": representation,
    "rerouting": rerouting,
    "hidden_preference": hidden_preference,
    "dpo": OutputPreference(squared=False),
    "ipo": OutputPreference(squared=True),
    "loreft": reft,
    "direft": reft,
}


def loss_of(config: AdapterConfig, model: HookedModel, vector: Any = None) -> Loss:
    """The loss of an objective.

    Raises:
        InputError: distil_vector without a vector, or a vector with another objective.
    """
    if config.objective == "distil_vector":
        return DistilVector(vector, model)
    if vector is not None:
        raise InputError(f"vector= is for the objective distil_vector, not for {config.objective}")
    return LOSSES[config.objective]


def sites_of(config: AdapterConfig, model: HookedModel, loss: Loss) -> list[Site]:
    """The sites whose states are read: those named, those of the vector, or the middle third of the depth."""
    if isinstance(loss, DistilVector):
        return model.resolve(loss.sites)
    if config.sites:
        return model.resolve(config.sites)
    first, last = (round(share * (model.n_layers - 1)) for share in MIDDLE)
    return model.resolve([f"resid_post.{layer}" for layer in range(first, last + 1)])


@dataclass(frozen=True)
class Trainable:
    """What is trained.

    Attributes:
        weights: Tensors with gradients.
        changed: Makes a context in which the change acts at a strength; 0 is the plain model.
        state: A copy of the weights by name.
        done: From such a copy to the change on its own.
    """

    weights: list[Tensor]
    changed: Callable[[float], AbstractContextManager[Any]]
    state: Callable[[], dict[str, Tensor]]
    done: Callable[[Mapping[str, Tensor]], LoRA | ReFT]


@contextlib.contextmanager
def trainable(model: HookedModel, config: AdapterConfig, sites: Sequence[Site]) -> Iterator[Trainable]:
    """The untrained change on the model; the model is afterwards as it was.

    Raises:
        UnknownNameError: Modules that the model does not have; gives the nearest.
        InputError: Blocks that it does not have.
    """
    if config.objective in REFT:
        edits = reft.edits_for(model, sites, config.rank, config.objective == "loreft")
        flags = [(parameter, parameter.requires_grad) for parameter in model.model.parameters()]

        def done(state: Mapping[str, Tensor]) -> ReFT:
            edits.load_state_dict(state)
            return ReFT(edits.requires_grad_(False))

        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield Trainable(
                list(edits.parameters()), lambda strength: reft.acting(model, edits, strength),
                lambda: {name: value.detach().clone() for name, value in edits.state_dict().items()}, done,
            )  # fmt: skip
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return
    from peft import get_peft_model_state_dict

    layers = config.layers or _below(config, model, sites)
    said = lora_config(model.model, config.rank, config.modules, layers, base=str(model.path))
    with put_on(model.model, said) as adapted:
        yield Trainable(
            [parameter for parameter in adapted.parameters() if parameter.requires_grad],
            lambda strength: lora_scaled(adapted, strength),
            lambda: {n: v.detach().cpu().clone() for n, v in get_peft_model_state_dict(adapted).items()},
            lambda state: lora_of(said, state),
        )


def _below(config: AdapterConfig, model: HookedModel, sites: Sequence[Site]) -> tuple[int, ...]:
    """Blocks that a loss on states at `sites` reaches; () for all."""
    deepest = max((-1 if site.layer is None else site.layer for site in sites), default=-1)
    if config.objective in ON_OUTPUTS or not 0 <= deepest < model.n_layers:
        return ()
    return tuple(range(deepest + 1))
