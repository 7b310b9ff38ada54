"""LoRA folders in PEFT's format, put on their base and merged into plain weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical.errors import InputError, ModelError, unknown
from veridical.files import read_json

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter and no model of its own."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: str | Path) -> str:
    """The base that an adapter was trained on: a folder, a hub name, or an embedded organism.

    Raises:
        InputError: The adapter does not say.
    """
    base = read_json(Path(folder) / CONFIG).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{folder} does not say which model it adapts (base_model_name_or_path)")
    return str(base)


def scores(folder: str | Path) -> bool:
    """Whether the adapter makes a model that gives scores, such as a reward model."""
    return read_json(Path(folder) / CONFIG).get("task_type") == "SEQ_CLS"


def merged(base: nn.Module, folder: str | Path) -> nn.Module:
    """`base` with the adapter of `folder` merged into its weights, a plain model again; `base` is used up.

    Raises:
        ModelError: Tensors of the adapter that have no place in `base`, or places in it that the adapter
            leaves empty: the base would be served unchanged there.
    """
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS}; weights are read from safetensors only")
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    config.base_model_name_or_path = None  # PEFT would warn that the base lies elsewhere now
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name that transformers will drop
            adapted = get_peft_model(base, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise ModelError(f"the adapter in {folder} does not fit its base: {_line(error)}") from error
    try:
        found = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    except RuntimeError as error:
        raise ModelError(f"the adapter in {folder} does not fit its base: {_line(error)}") from error
    empty = [name for name in found.missing_keys if "lora_" in name or "modules_to_save" in name]
    if wrong := [*found.unexpected_keys, *empty]:
        raise ModelError(
            f"the adapter in {folder} does not fit its base: {len(wrong)} tensors have no partner, "
            f"the first is {wrong[0]}"
        )
    plain: Any = adapted.merge_and_unload()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    return plain


def lora_config(
    model: nn.Module,
    rank: int,
    modules: Sequence[str] = (),
    layers: Sequence[int] = (),
    *,
    base: str | None = None,
    task_type: str = "CAUSAL_LM",
    **own: Any,
) -> LoraConfig:
    """PEFT's config of a LoRA of `rank` with scaling 2.

    Args:
        model: Who gets it.
        rank: Of every pair of matrices.
        modules: Linear layers by the last part of their name; all but the unembedding if none is given.
        layers: Blocks, counted from 0; all if none is given.
        base: What the base is called.
        task_type: As PEFT names it.
        **own: Further options of PEFT's.

    Raises:
        UnknownNameError: Modules that the model does not have; gives the nearest.
        InputError: Blocks that it does not have.
    """
    import torch
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    linear = {
        name.rsplit(".", 1)[-1]: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and "." in name
    }
    for name in modules:
        if name not in linear:
            raise unknown("module for LoRA", name, sorted(linear))
    depth = int(getattr(model.config, "num_hidden_layers", 0))  # type: ignore[arg-type]
    for layer in layers:
        if not 0 <= layer < depth:
            raise InputError(f"layers of the LoRA has {layer}; the model's blocks are 0 to {depth - 1}")
    chosen = list(modules or sorted(linear))
    return LoraConfig(
        base_model_name_or_path=base,
        task_type=task_type,
        r=rank,
        lora_alpha=2 * rank,
        target_modules=chosen,
        layers_to_transform=list(layers) or None,
        fan_in_fan_out=all(linear[name] for name in chosen),
        **own,
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
