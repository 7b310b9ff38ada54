"""Several adapters as one LoRA, exactly: their low-rank parts side by side.

    sum_i w_i s_i B_i A_i  =  [B_1 B_2 ...] [w_1 s_1 A_1; w_2 s_2 A_2; ...]

which is PEFT's `add_weighted_adapter` with `cat`. Its `linear` adds the A and the B of adapters by
themselves, so that products of one's B with another's A come in: for two adapters the change is wrong by
about 100 %. What PEFT makes is held against the sum, module by module, before it is handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from veridical.errors import InputError, ModelError
from veridical.probes.fits import MismatchError
from veridical.steering.adapter import Adapter
from veridical.steering.lora import LoRA, lora_of, peft_config, put_on

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

EXACT = 1e-5
"""Largest error of a module's change, relative to its norm."""
NAME = "merged"


def merge(
    model: HookedModel,
    adapters: Sequence[Adapter | LoRA],
    weights: Sequence[float] | None = None,
    *,
    how: str = "cat",
) -> LoRA:
    """One LoRA whose change is the weighted sum of the adapters' changes; its rank is the sum of their ranks.

    Its effect is not the sum of theirs and was not measured: `lora.on(model, 1.0)` is the context to measure
    it in.

    Args:
        model: The base of all of them.
        adapters: At least two.
        weights: One for each, 1 when not given; negative ones turn an adapter round.
        how: "cat" only.

    Raises:
        InputError: Another way to merge, fewer than two adapters, or weights that do not fit.
        MismatchError: An adapter of another base.
        ModelError: What PEFT made is not the sum.
    """
    if how != "cat":
        raise InputError(
            f"how is {how!r}; only 'cat' adds adapters exactly (PEFT's 'linear' mixes one's A with another's "
            "B and is wrong by about 100 % for two adapters)"
        )
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(adapters) < 2 or len(weights) != len(adapters):
        raise InputError(
            f"{len(adapters)} adapters and {len(weights)} weights; expected two or more, each with a weight"
        )
    loras = [_lora(model, adapter) for adapter in adapters]
    made = _cat(model, loras, weights)
    _check(made, loras, weights)
    return made


def _cat(model: HookedModel, loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    names = ["default", *(f"part_{at}" for at in range(1, len(loras)))]
    with put_on(model.model, peft_config(loras[0]), loras[0].tensors) as adapted:
        for name, lora in zip(names[1:], loras[1:]):
            adapted.add_adapter(name, peft_config(lora))
            set_peft_model_state_dict(adapted, dict(lora.tensors), adapter_name=name)
        adapted.add_weighted_adapter(names, list(weights), NAME, combination_type="cat")
        state = get_peft_model_state_dict(adapted, adapter_name=NAME)
        return lora_of(adapted.peft_config[NAME], state)


def _check(made: LoRA, loras: Sequence[LoRA], weights: Sequence[float]) -> None:
    wanted: dict[str, torch.Tensor] = {}
    for lora, weight in zip(loras, weights):
        for path in lora.paths:
            part = weight * lora.delta(path).double()
            wanted[path] = wanted[path] + part if path in wanted else part
    if set(made.paths) != set(wanted):
        raise ModelError("PEFT merged other modules than the adapters have; nothing was merged")
    for path, change in wanted.items():
        error = float((made.delta(path).double() - change).norm() / change.norm().clamp_min(1e-12))
        if error > EXACT and float(change.norm()) > 0:
            raise ModelError(
                f"PEFT's merge of {path} is off by {error:.2g} of its change; nothing was merged"
            )


def _lora(model: HookedModel, adapter: Any) -> LoRA:
    if isinstance(adapter, Adapter):
        adapter.check_base(model)
        adapter = adapter.lora
    if not isinstance(adapter, LoRA):
        raise InputError(f"{adapter!r} is no LoRA and cannot be merged")
    missing = [path for path in adapter.paths if path not in dict(model.model.named_modules())]
    if missing:
        raise MismatchError(f"{model.path} has no module {missing[0]}, which this adapter changes")
    return adapter
