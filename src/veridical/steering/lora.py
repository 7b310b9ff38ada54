"""A LoRA on a model that stays as it was: put on for training, or added to the weights for a while.

PEFT makes the layers, reads and writes the files. What is done here is what PEFT leaves to its user: the
model is afterwards as it was to the last bit, its modules, flags and weights included.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veridical.errors import InputError, ModelError

if TYPE_CHECKING:
    from peft import LoraConfig

    from veridical.hooked import HookedModel

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, repr=False)
class LoRA:
    """The weights of a LoRA: `W + strength * scaling * B A` on each of its modules.

    Attributes:
        config: PEFT's config, as plain values.
        tensors: By PEFT's names, as its file has them.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"LoRA(rank {self.config['r']}, {len(self.paths)} modules)"

    @property
    def paths(self) -> list[str]:
        """Paths of the modules that it changes."""
        return [name.removeprefix(PREFIX).removesuffix(A) for name in self.tensors if name.endswith(A)]

    def scaling(self, path: str) -> float:
        """What `B A` is multiplied with on the module at `path`."""
        rank = self.tensors[f"{PREFIX}{path}{A}"].shape[0]
        return float(self.config["lora_alpha"]) / rank

    def delta(self, path: str) -> Tensor:
        """The change of the weight of the module at `path`, `[out, in]`, at strength 1."""
        a, b = self.tensors[f"{PREFIX}{path}{A}"], self.tensors[f"{PREFIX}{path}{B}"]
        return self.scaling(path) * (b @ a)

    def scaled(self, factor: float) -> LoRA:
        """The LoRA whose strength 1 is this one's `factor`."""
        tensors = {
            name: value * factor if name.endswith(B) else value for name, value in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    @contextlib.contextmanager
    def on(self, model: HookedModel, strength: float) -> Iterator[None]:
        """The model with the change added to its weights at a strength; at 0 as it is."""
        if strength == 0:
            yield
            return
        with added(model.model, self, strength):
            yield

    def norm(self) -> float:
        """Frobenius norm of the change of all weights together."""
        return float(sum((self.delta(path).double() ** 2).sum() for path in self.paths) ** 0.5)


def lora_of(config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoRA:
    """A LoRA from PEFT's own objects; one whose change is not `B A` on linear layers alone is refused.

    Raises:
        InputError: DoRA, rank-stabilised scaling, biases, whole modules, ranks or alphas by module.
    """
    said = config.to_dict()
    for name in ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if said.get(name):
            raise InputError(
                f"this adapter has {name} = {said[name]!r}; only a plain LoRA can be scaled exactly"
            )
    if said.get("bias", "none") != "none":
        raise InputError(f"this adapter has bias = {said['bias']!r}; only a plain LoRA can be scaled exactly")
    kept = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in tensors.items()}
    if odd := [name for name in kept if not name.endswith((A, B))]:
        raise InputError(f"this adapter has a tensor {odd[0]}; only a plain LoRA can be scaled exactly")
    return LoRA(_plain(said), kept)


def peft_config(lora: LoRA) -> LoraConfig:
    """PEFT's config of a LoRA."""
    from peft import LoraConfig

    known = set(LoraConfig.__dataclass_fields__)
    return LoraConfig(**{name: value for name, value in lora.config.items() if name in known - {"peft_type"}})


@contextlib.contextmanager
def put_on(
    module: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor] | None = None
) -> Iterator[Any]:
    """PEFT's layers on `module` while the context lasts; yields PEFT's model.

    Raises:
        ModelError: Modules that the model does not have, or tensors without a partner.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    mode, own = module.training, set(module.__dict__)
    adapted: Any = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                adapted = get_peft_model(module, config)  # type: ignore[arg-type]
            except ValueError as error:
                raise ModelError(
                    f"the adapter does not fit the model: {' '.join(str(error).split())}"
                ) from error
        if tensors is not None:
            found = set_peft_model_state_dict(adapted, dict(tensors))
            wrong = [*found.unexpected_keys, *(name for name in found.missing_keys if "lora_" in name)]
            if wrong:
                raise ModelError(
                    f"the adapter does not fit the model: {len(wrong)} tensors have no partner, "
                    f"the first is {wrong[0]}"
                )
        adapted.train(mode)
        yield adapted
    finally:
        if adapted is not None:
            adapted.unload()
        for name in set(module.__dict__) - own:
            del module.__dict__[name]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        module.train(mode)


@contextlib.contextmanager
def lora_scaled(adapted: Any, strength: float) -> Iterator[None]:
    """PEFT's model with its LoRA at a strength; at 0 the plain model to the last bit."""
    if strength == 0:
        with adapted.disable_adapter():
            yield
    elif strength == 1:
        yield
    else:
        from peft.helpers import rescale_adapter_scale

        with rescale_adapter_scale(adapted, strength):
            yield


@contextlib.contextmanager
def added(module: nn.Module, lora: LoRA, strength: float) -> Iterator[None]:
    """The weights of `module` with `strength` times the LoRA's change while the context lasts.

    The weights are afterwards what they were to the last bit: they are put back, not subtracted from.

    Raises:
        ModelError: A module that the model does not have, or of another shape.
    """
    places = _weights(module, lora)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for path, (weight, turned) in places.items():
            before.append((weight, weight.detach().clone()))
            change = lora.delta(path).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            with torch.no_grad():
                weight.copy_((weight + strength * (change.T if turned else change)).to(weight.dtype))
        yield
    finally:
        with torch.no_grad():
            for weight, kept in before:
                weight.copy_(kept)


def _weights(module: nn.Module, lora: LoRA) -> dict[str, tuple[Tensor, bool]]:
    """For each module of the LoRA its weight, and whether that lies as `[in, out]`."""
    turned = bool(lora.config.get("fan_in_fan_out"))
    found = {}
    for path in lora.paths:
        try:
            weight: Any = module.get_submodule(path).weight
        except AttributeError as error:
            raise ModelError(f"the adapter changes {path}, which this model does not have") from error
        shape = lora.delta(path).shape
        if (
            tuple(weight.shape) != tuple(reversed(shape) if turned else shape)
            or not weight.is_floating_point()
        ):
            raise ModelError(
                f"the adapter's change of {path} is {tuple(shape)}, its weight {tuple(weight.shape)}"
            )
        found[path] = weight, turned
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset | list | tuple):
        items = [_plain(item) for item in value]
        return sorted(items) if isinstance(value, set | frozenset) else items
    return (
        value
        if isinstance(value, str | int | float | bool) or value is None
        else str(getattr(value, "value", value))
    )
