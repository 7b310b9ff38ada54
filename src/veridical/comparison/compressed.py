"""Compressed copies of a model, to be compared with it: weights rounded to few bits, or set to zero.

What is measured is what compression does to the function. The copies are plain models in their own number
format: they are neither smaller nor faster. Weights of the layers' matrices are compressed; embeddings,
norms, biases and the unembedding stay as they are.

- Rounding is symmetric and by output channel, to 2^bits - 1 levels between the channel's largest values, as
  in weight-only quantisation without calibration (torchao's `Int8WeightOnlyConfig` has one level more;
  Dettmers et al. 2022, arXiv:2208.07339, keep outliers apart besides). A model that torchao or bitsandbytes
  quantised as it was loaded (`veridical.load(..., quantization_config=...)`) can be compared as it is.
- Pruning sets the smallest weights of each matrix to zero (`torch.nn.utils.prune`, by magnitude; Han et al.
  2015, arXiv:1506.02626), without training afterwards.

A distilled student is a model of its own and is compared like any policy.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veridical.errors import InputError

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

EXPECTED = "expected int2 to int8, or prune-N with a share of N % from 0 to 100"


def compressed(model: HookedModel, how: str) -> HookedModel:
    """A compressed copy.

    Args:
        model: Left as it is.
        how: "int8", "int4" and so on (bits of a weight), or "prune-50" (per cent of each matrix).

    Raises:
        InputError: Anything else, or a model without matrices in its layers.
    """
    if found := re.fullmatch(r"int([2-8])", how):
        return quantised(model, int(found[1]))
    if (found := re.fullmatch(r"prune-(\d+(?:\.\d+)?)", how)) and float(found[1]) <= 100:
        return pruned(model, float(found[1]) / 100)
    raise InputError(f"compress is {how!r}; {EXPECTED}")


def quantised(model: HookedModel, bits: int = 8) -> HookedModel:
    """A copy whose layers' weights are rounded to `bits` bits, symmetrically by output channel.

    Raises:
        InputError: Other than 2 to 8 bits, or a model without matrices in its layers.
    """
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise InputError(f"bits is {bits!r}; expected 2 to 8")
    made, top = _copy(model, f"int{bits}"), 2 ** (bits - 1) - 1
    for module, axis in _matrices(made):
        weight = module.weight.detach()
        scale = (weight.abs().amax(1 - axis).float() / top).clamp_min(torch.finfo(torch.float32).tiny)
        zero = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
        rounded = torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, axis, -top, top)
        with torch.no_grad():
            module.weight.copy_(rounded)
    return made


def pruned(model: HookedModel, share: float) -> HookedModel:
    """A copy in which the smallest `share` of each of the layers' matrices is zero.

    Raises:
        InputError: A share outside 0 to 1, or a model without matrices in its layers.
    """
    from torch.nn.utils import prune

    if not 0 <= share <= 1:
        raise InputError(f"share is {share!r}; expected 0 to 1")
    made = _copy(model, f"pruned by {share:.0%}")
    for module, _ in _matrices(made):
        prune.l1_unstructured(module, "weight", amount=float(share))
        prune.remove(module, "weight")
    return made


def _copy(model: HookedModel, how: str) -> HookedModel:
    from veridical import architectures
    from veridical.hooked import HookedModel

    module = copy.deepcopy(model.model)
    made = HookedModel(
        module, architectures.describe(module), tokenizer=model.tokenizer, path=f"{model.path}, {how}"
    )
    if next(_matrices(made), None) is None:
        raise InputError(f"{model.path} has no plain weight matrices in its layers to compress")
    return made


def _matrices(model: HookedModel) -> Iterator[tuple[Any, int]]:
    """Modules of the layers with a weight matrix, and the axis of their outputs."""
    from transformers.pytorch_utils import Conv1D

    for block in model.architecture.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear | Conv1D) and module.weight.is_floating_point():
                yield module, 1 if isinstance(module, Conv1D) else 0
