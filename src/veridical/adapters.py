"""LoRA folders in PEFT's format, put on their base and merged into plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical.errors import InputError, ModelError
from veridical.files import read_json

if TYPE_CHECKING:
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
