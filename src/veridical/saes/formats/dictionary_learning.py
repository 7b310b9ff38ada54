"""Dictionary_learning folders (Marks, Karvonen and others): `config.json` and `ae.pt`.

`ae.pt` is a state dict that torch pickled; it is read with `weights_only=True`, which builds tensors and
refuses everything else. A normalisation of activations in training is folded into the biases there before
saving, so nothing is left to fold. Its gated and JumpReLU dictionaries multiply latents by decoder norms
and divide them out again in the decoder; here the norms move into the encoder, which is the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.errors import DamagedFileError, DataError, InputError, unknown
from veridical.saes.formats.parts import Parts, read_config, wanted

if TYPE_CHECKING:
    from veridical.saes.base import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_SUBMODULE = re.compile(r"(resid_post|resid_pre|attention_out|attn_out|mlp_out)_layer_(\d+)")

Tensors = dict[str, Tensor]


def from_dictionary_learning(folder: str | Path, *, site: str | None = None) -> SAE:
    """Reads one dictionary of dictionary_learning.

    Args:
        folder: The folder of one trainer, with `ae.pt` and `config.json`.
        site: Where it reads; by default what the config says of layer and submodule.

    Raises:
        InputError: No dictionary in the folder.
        UnknownNameError: A class of dictionary that is not read; names the nearest.
        DamagedFileError: A file that is cut short, or tensors that do not fit.
        DataError: A weights file that holds something other than tensors.
    """
    folder = Path(folder)
    trainer = read_config(folder / CONFIG, "the folder of a dictionary_learning trainer").get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise InputError(f"{folder / CONFIG} names no dict_class; expected that of a trainer")
    name = str(trainer["dict_class"])
    if name not in READERS:
        raise unknown("class of dictionary_learning", name, READERS)
    parts = READERS[name](_load(folder / WEIGHTS), str(folder))
    parts.options["site"] = site or _site(trainer)
    return parts.make()


def _autoencoder(tensors: Tensors, where: str) -> Parts:
    own = _linear(tensors, where, b_enc="encoder.bias", b_dec="bias")
    return Parts("relu", own, {}, where)


def _autoencoder_new(tensors: Tensors, where: str) -> Parts:
    own = _linear(tensors, where, b_enc="encoder.bias", b_dec="decoder.bias")
    return Parts("relu", own, {}, where, centred=False)


def _gated(tensors: Tensors, where: str) -> Parts:
    own = _linear(tensors, where, b_gate="gate_bias", b_mag="mag_bias", r_mag="r_mag", b_dec="decoder_bias")
    return Parts("gated", own, {}, where).move_norms()


def _jumprelu(tensors: Tensors, where: str) -> Parts:
    own = wanted(
        tensors, where, W_enc="W_enc", b_enc="b_enc", W_dec="W_dec", b_dec="b_dec", threshold="threshold"
    )
    own["W_enc"] = own["W_enc"].T
    return Parts("jumprelu", own, {}, where, centred=False).move_norms()


def _topk(tensors: Tensors, where: str) -> Parts:
    own = _linear(tensors, where, b_enc="encoder.bias", b_dec="b_dec")
    return Parts("topk", own, {"k": _k(tensors, where)}, where)


def _batch_topk(tensors: Tensors, where: str) -> Parts:
    own = _linear(tensors, where, b_enc="encoder.bias", b_dec="b_dec") | {
        "threshold": _threshold(tensors, where)
    }
    return Parts("batch_topk", own, {"k": _k(tensors, where)}, where)


def _matryoshka(tensors: Tensors, where: str) -> Parts:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "group_sizes")
    own = wanted(tensors, where, **{name: name for name in names})
    own |= {"W_enc": own["W_enc"].T, "threshold": _threshold(tensors, where)}
    prefixes = tuple(int(size) for size in own.pop("group_sizes").cumsum(0))
    return Parts("matryoshka", own, {"k": _k(tensors, where), "prefixes": prefixes}, where)


READERS: dict[str, Callable[[Tensors, str], Parts]] = {
    "AutoEncoder": _autoencoder,
    "AutoEncoderNew": _autoencoder_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}


def _linear(tensors: Tensors, where: str, **biases: str) -> Tensors:
    """Weights of `nn.Linear` encoder `[F, d]` and decoder `[d, F]`, with biases under our names."""
    own = wanted(tensors, where, W_enc="encoder.weight", W_dec="decoder.weight", **biases)
    own["W_dec"] = own["W_dec"].T
    return own


def _k(tensors: Tensors, where: str) -> int:
    return int(wanted(tensors, where, k="k")["k"])


def _threshold(tensors: Tensors, where: str) -> Tensor:
    """The threshold at inference; one below 0 was never set, and the ReLU alone decides."""
    return wanted(tensors, where, threshold="threshold")["threshold"].float().clamp_min(0)


def _site(trainer: dict[str, Any]) -> str | None:
    named = _SUBMODULE.fullmatch(str(trainer.get("submodule_name") or ""))
    if named is not None:
        kind = named[1].replace("attention_out", "attn_out")
        return f"{kind}.{named[2]}"
    layer = trainer.get("layer")
    return f"resid_post.{layer}" if isinstance(layer, int) and not trainer.get("submodule_name") else None


def _load(path: Path) -> Tensors:
    import pickle

    if not path.is_file():
        raise InputError(f"no {path.name} in {path.parent}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds something other than tensors, which could run code; it is not read"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is not readable ({_first_line(error)}); it was cut short") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{path} is not a state dict of tensors")
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
