"""What identifies a model's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from veridical.architectures import inner
from veridical.provenance import fingerprint as digest

WHOLE_BYTES = 1 << 20
STRETCHES, STRETCH_BYTES = 256, 4096
_CHANGEABLE = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict")


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's config and weights that does not depend on path, process, device or wrapper.

    Every tensor counts with its place in the order, shape, number format and content: all of its bytes up
    to 1 MiB, above that 256 stretches of 4 KiB spread evenly from the first byte to the last. So any broad
    change (training, a merged or active adapter, an ablated direction) shows, and a change to a few numbers
    inside a large tensor may not. Adapters of PEFT count while they are enabled. Weights offloaded to disk
    count by shape only. TransformerLens lays weights out anew, so its models have fingerprints of their own.
    """
    config = getattr(inner(model), "config", None)
    parts: list[str | bytes] = [_described(config), *_adapters(model)]
    for tensor in _tensors(model):
        parts.append(f"{tuple(tensor.shape)} {tensor.dtype}")
        parts.append(_content(tensor))
    return digest(parts)


def _described(config: Any) -> str:
    if not hasattr(config, "to_dict"):
        return type(config).__name__
    kept = {
        name: value for name, value in config.to_dict().items() if name[0] != "_" and name not in _CHANGEABLE
    }
    return json.dumps(kept, sort_keys=True, default=str)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    idle = {
        id(tensor)
        for module in model.modules()
        if getattr(module, "disable_adapters", False) is True
        and isinstance(getattr(module, "base_layer", None), nn.Module)
        for tensor in _adapter_tensors(module)
    }
    state = {
        id(tensor): tensor
        for tensor in model.state_dict(keep_vars=True).values()
        if isinstance(tensor, Tensor)
    }
    yield from (tensor.detach() for key, tensor in state.items() if key not in idle)


def _adapter_tensors(layer: Any) -> list[Tensor]:
    base = {id(tensor) for tensor in layer.base_layer.parameters()}
    return [tensor for tensor in layer.parameters() if id(tensor) not in base]


def _adapters(model: nn.Module) -> list[str]:
    active = {
        str(module.active_adapters)
        for module in model.modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
        and getattr(module, "disable_adapters", True) is False
    }
    return sorted(active)


def plain(tensor: Tensor) -> Tensor:
    """A weight as numbers: of a quantised one (torchao's tensors) those that it stands for."""
    kind = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter and hasattr(kind, "__tensor_flatten__"):
        return tensor.dequantize()
    return tensor


def _content(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta":
        return b"meta"
    raw = plain(tensor).contiguous().reshape(-1).view(torch.uint8)
    size = raw.numel()
    if size <= WHOLE_BYTES:
        return xxhash.xxh3_128_digest(raw.cpu().numpy().data)
    starts = torch.linspace(0, size - STRETCH_BYTES, STRETCHES, dtype=torch.float64).long().tolist()
    if raw.device.type != "cpu":
        gathered = torch.cat([raw[start : start + STRETCH_BYTES] for start in starts])
        return xxhash.xxh3_128_digest(gathered.cpu().numpy().data)
    digest, held = xxhash.xxh3_128(), raw.numpy().data
    for start in starts:
        digest.update(held[start : start + STRETCH_BYTES])
    return digest.digest()
