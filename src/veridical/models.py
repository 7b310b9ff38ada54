"""Loading hub names, folders, embedded organisms, modules and TransformerLens models into one handle."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veridical import adapters, architectures, lens, selftest
from veridical.devices import usable
from veridical.errors import InputError, ModelError, misspelt, nearest, unknown
from veridical.hooked import HookedModel
from veridical.scoring import quiet

__all__ = ["HookedModel", "load"]

log = logging.getLogger("veridical")

_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForPreTraining": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "Model": "AutoModel",
}


def load(
    source: Any,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    check: bool = True,
) -> HookedModel:
    """A handle on a model, which is never changed.

    Args:
        source: Name of an embedded organism, a local folder (of a LoRA: its base is loaded and the LoRA
            merged into it), a hub name, a transformers or PEFT model, another `torch.nn.Module` (raw module
            paths only), or a TransformerLens `HookedTransformer` or `TransformerBridge`. An embedded name
            wins over a folder of that name; write `./name` for the folder.
        device: Where to load to; by default the accelerator if there is one.
        dtype: Number format to load in; by default the checkpoint's own on CUDA, float32 elsewhere.
        device_map: Passed to transformers.
        quantization_config: Passed to transformers.
        trust_remote_code: Run code that comes with the model. Weights are read from safetensors only,
            either way.
        tokenizer: A tokenizer or the name of one; by default the model's own.
        check: Test the sites on a tiny input: shapes, attention rows that sum to one, edits that have an
            effect.

    Raises:
        InputError: A name or folder that is no model, options that do not fit the source, or a device that is
            not there.
        ModelError: A model that cannot be loaded, or whose sites fail the check.
    """
    if isinstance(source, HookedModel):
        return source
    if isinstance(source, (str, Path)):
        model, path, processor = _load_named(
            str(source), device, dtype, device_map, quantization_config, trust_remote_code
        )
        chosen = _tokenizer(tokenizer if tokenizer is not None else path, trust_remote_code)
        handle = HookedModel(
            model, architectures.describe(model), tokenizer=chosen, processor=processor, path=str(source)
        )
    elif isinstance(source, nn.Module):
        options = {"device": device, "dtype": dtype, "device_map": device_map}
        if given := [name for name, value in options.items() if value is not None]:
            raise InputError(
                f"{given[0]} is for loading; a model that is already there is left as it is, "
                "so move or convert it yourself"
            )
        handle = _wrap(source, tokenizer, trust_remote_code)
    else:
        raise InputError(f"cannot load a {type(source).__name__}; expected a name, a folder or a model")
    _warn_of_dropout(handle)
    if check:
        selftest.check(handle)
    return handle


def _wrap(model: nn.Module, tokenizer: Any, trust_remote_code: bool) -> HookedModel:
    if lens.is_lens(model):
        return lens.wrap(model, _tokenizer(tokenizer, trust_remote_code))
    name = str(getattr(architectures.inner(model), "name_or_path", "") or "")
    chosen = _tokenizer(tokenizer if tokenizer is not None else name or None, trust_remote_code)
    return HookedModel(
        model, architectures.describe(model), tokenizer=chosen, path=name or type(model).__name__
    )


def _load_named(
    name: str, device: Any, dtype: Any, device_map: Any, quantization_config: Any, trust: bool
) -> tuple[nn.Module, str, Any]:
    import transformers

    path = folder_of(name)
    adapter = path if Path(path).is_dir() and adapters.is_adapter(path) else None
    if adapter is not None:
        path = _base_of(name, adapter)
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust)
        except Exception as error:
            raise _cannot_load(name, error) from error
        placed = device_map is not None or quantization_config is not None
        where, number, reason = choose(device, dtype, config)
        options: dict[str, Any] = {"dtype": number, "use_safetensors": True, "trust_remote_code": trust}
        if device_map is not None:
            options["device_map"] = device_map
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        kind = _auto_class(config)
        if adapter is not None and adapters.scores(adapter):
            kind, options["num_labels"] = "AutoModelForSequenceClassification", 1
        try:
            model = getattr(transformers, kind).from_pretrained(path, **options)
        except Exception as error:
            raise _cannot_load(name, error) from error
        processor = _processor(path, trust)
    if adapter is not None:
        model = adapters.merged(model, adapter)
    if not placed:
        model = model.to(where)
    log.info(
        "%s: %s", name, f"{reason}" if not placed else f"{number} as device_map and quantisation place it"
    )
    return model.eval(), path, processor


def choose(device: Any, dtype: Any, config: Any = None) -> tuple[torch.device, Any, str]:
    """Device and number format, and why, in one line such as "float32 on cpu: no accelerator found"."""
    if device is not None:
        where, why = usable(device), "as asked"
    elif torch.cuda.is_available():
        where, why = torch.device("cuda"), f"found {torch.cuda.get_device_name()}"
    elif torch.backends.mps.is_available():
        where, why = torch.device("mps"), "found Apple's GPU"
    else:
        where, why = torch.device("cpu"), "no accelerator found"
    saved = getattr(config, "dtype", None)
    if dtype is not None:
        number = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
        if number is None:
            raise InputError(f"unknown dtype {dtype!r}; expected float32, bfloat16, float16 or auto")
    elif where.type == "cuda" and saved in (torch.bfloat16, torch.float16):
        number, why = saved, f"{why}; the checkpoint's own format"
    else:
        number = torch.float32
    return where, number, f"{str(number).removeprefix('torch.')} on {where}: {why}"


def folder_of(name: str) -> str:
    """Where the model called `name` lies: the folder of an embedded organism, a folder, or a hub name.

    Raises:
        InputError: A folder that holds neither a model nor an adapter, or a name close to an embedded one.
        ModelError: Weights in a format that can run code.
    """
    from veridical import organisms

    if name in organisms.NAMES:
        return str(organisms.path(name))
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or folder.exists():
            raise InputError(f"no model folder at {name}")
        if misspelt(name, organisms.NAMES):
            raise unknown("model", name, organisms.NAMES, "A model of the hub is written owner/name")
        return name
    if not (folder / "config.json").is_file():
        if adapters.is_adapter(folder):
            return str(folder)
        raise InputError(f"{name} is not a model folder; it has no config.json")
    if not any(folder.glob("*.safetensors")):
        pickled = [
            file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(pattern))
        ]
        if pickled:
            raise ModelError(
                f"{name} holds its weights only as {pickled[0]}, a format that can run code when it is read; "
                "save the model again with safetensors"
            )
        raise InputError(f"{name} holds no weights; expected model.safetensors")
    return str(folder)


def _base_of(name: str, adapter: str) -> str:
    """Where the base of an adapter lies; an adapter on an adapter is refused."""
    base = adapters.base_of(adapter)
    try:
        path = folder_of(base)
    except InputError as error:
        raise InputError(f"{name} is an adapter on {base}, which cannot be found: {error}") from error
    if Path(path).is_dir() and adapters.is_adapter(path):
        raise InputError(f"{name} is an adapter on {base}, which is an adapter itself; merge that one first")
    return path


def _cannot_load(name: str, error: Exception) -> ModelError:
    from veridical import organisms

    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    close = nearest(name, organisms.NAMES) or list(organisms.NAMES)
    return ModelError(f"cannot load {name!r}: {said} (embedded organisms: {', '.join(close)})")


def _auto_class(config: Any) -> str:
    name = str((getattr(config, "architectures", None) or [""])[0])
    if name.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        return "AutoModelForSeq2SeqLM"
    for suffix, auto in _AUTO.items():
        if name.endswith(suffix):
            return auto
    family = architectures.FAMILIES.get(getattr(config, "model_type", ""))
    kinds = {"encoder": "AutoModelForMaskedLM", "vision": "AutoModelForImageClassification"}
    return kinds.get(family.kind if family else "", "AutoModelForCausalLM")


def _tokenizer(source: Any, trust: bool) -> Any:
    if source is None or not isinstance(source, (str, Path)):
        return source
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust)
        except Exception as error:
            log.debug("no tokenizer at %s: %s", source, error)
            return None


def _processor(path: str, trust: bool) -> Any:
    folder = Path(path)
    if folder.is_dir() and not (folder / "preprocessor_config.json").is_file():
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:
        log.debug("no image processor at %s: %s", path, error)
        return None


def _warn_of_dropout(handle: HookedModel) -> None:
    if not handle.model.training:
        return
    config = getattr(architectures.inner(handle.model), "config", None)
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "hidden_dropout", "dropout")
    active = any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in handle.model.modules())
    if active or any(isinstance(p := getattr(config, n, 0), float) and p > 0 for n in names):
        log.warning(
            "%s is in training mode with dropout, so its numbers vary; call .eval() on it first", handle.path
        )
