"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, read and written with identical output.

The layout is that of SAELens 6 (older configs, with `hook_point`, `activation_fn_str` and the like, are read
too): `W_enc [d_in, F]`, `W_dec [F, d_out]`, `b_enc`, `b_dec`, and `threshold`, or `b_gate`, `b_mag` and
`r_mag`. What a reader can get wrong, and what is done here:

- `apply_b_dec_to_input`: whether the encoder reads `x - b_dec` or `x`; where ours does otherwise, its bias is
  shifted to make up for it.
- `rescale_acts_by_decoder_norm`: latents are chosen by activation times decoder norm; norms move into the
  encoder.
- `normalize_activations`: SAELens runs `expected_average_only_in` as if it were `none`, because it expects
  the factor to be folded in; a folder that still says so has lost it, and is refused unless `scale` gives it.
  Normalisations of each row (`layer_norm`, `constant_norm_rescale`) are read as `RowNormalised`.
- BatchTopK and matryoshka SAEs are JumpReLU SAEs there once trained; ours are written so. A TopK transcoder
  is written as a TopK SAE that does not centre, where its widths are equal and it has no skip path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical import __version__
from veridical.errors import ConfigError, DamagedFileError, InputError, unknown
from veridical.saes.formats.parts import Parts, read_config, read_tensors, wanted
from veridical.saes.row_norm import ROW_NORMS, RowNormalised

if TYPE_CHECKING:
    from veridical.saes.base import SAE

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
WRITTEN = "6.0.0"
"""Version of the layout that is written; SAELens reads a config without one as older than 6."""
_DTYPES = {
    name: dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for name in (str(dtype), str(dtype).removeprefix("torch."))
}
_TRAINING = ("batchtopk", "matryoshka_batchtopk")
"""Checkpoints of training; what is saved for inference is a JumpReLU SAE."""
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_KINDS = {
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    **dict.fromkeys(_TRAINING, "batch_topk"),
    **dict.fromkeys(_TRANSCODERS, "jumprelu_transcoder"),
}


def to_saelens(sae: SAE, folder: str | Path) -> Path:
    """Writes an SAE as a SAELens folder, its input scale folded into the weights.

    Args:
        sae: One SAE.
        folder: Where to; files of the same names are replaced.

    Raises:
        InputError: A stack, or an SAE that SAELens has no class for (a crosscoder, or a TopK transcoder with
            a skip path or another output width).
    """
    from safetensors.torch import save

    from veridical import files

    cfg, tensors = described(sae)
    folder = Path(folder)
    files.write_bytes(folder / WEIGHTS, save(tensors))
    files.write_json(folder / CFG, cfg)
    return folder


def from_saelens(folder: str | Path, *, scale: float | None = None) -> SAE:
    """Reads a SAELens folder.

    Args:
        folder: Holds `cfg.json` and `sae_weights.safetensors`.
        scale: Factor from raw activations to the inputs that the SAE was trained on, for a folder whose
            config says `expected_average_only_in`; folded into the weights.

    Raises:
        InputError: No such folder, or one that needs a `scale`.
        UnknownNameError: An architecture that is not read.
        DamagedFileError: A file that is cut short, or tensors that do not fit.
        NonFiniteError: NaN or infinity in a tensor.
    """
    folder = Path(folder)
    cfg = read_config(folder / CFG, "a SAELens folder")
    return made(cfg, read_tensors(folder / WEIGHTS), str(folder), scale=scale)


def described(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an SAE as SAELens has them."""
    from veridical.saes.units import unscaled

    if sae.stacked:
        raise InputError("this is a stack of SAEs; write one at a time with stack.member(number)")
    if isinstance(sae, RowNormalised):
        cfg, tensors = described(sae.inner)
        return {**cfg, "normalize_activations": sae.how}, tensors
    raw = unscaled(sae)
    architecture, extra, tensors = _theirs(raw)
    tensors = {
        "W_enc": raw.W_enc.T, "W_dec": raw.W_dec, "b_dec": raw.b_dec, **tensors
    }  # fmt: skip
    dtype = str(raw.W_dec.dtype).removeprefix("torch.")
    site = raw.config.site
    cfg = {
        "architecture": architecture,
        "d_in": raw.d_in,
        "d_sae": raw.width,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": raw.centred,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if _kind_of(site) == "z" else "none",
        **extra,
        "metadata": {
            "sae_lens_version": WRITTEN,
            "sae_lens_training_version": None,
            "hook_name": _hook_name(site),
            "training_architecture": raw.config.architecture,
            "veridical_version": __version__,
        },
    }
    return cfg, {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _theirs(sae: SAE) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, further fields of the config, and tensors beside `W_enc`, `W_dec` and `b_dec`."""
    config, state = sae.config, sae.state_dict()
    bias = {} if config.architecture == "gated" else {"b_enc": state["b_enc"]}
    if config.architecture == "relu":
        return "standard", {}, bias
    if config.architecture == "gated":
        return "gated", {}, {name: state[name] for name in ("b_gate", "b_mag", "r_mag")}
    if config.architecture in ("jumprelu", "jumprelu_transcoder"):
        bias["threshold"] = state["log_threshold"].exp()
        if config.architecture == "jumprelu":
            return "jumprelu", {}, bias
        name = "jumprelu_skip_transcoder" if config.skip else "jumprelu_transcoder"
        skip = {"W_skip": state["W_skip"]} if config.skip else {}
        return name, {"d_out": sae.d_out, "hook_name_out": config.target_site}, {**bias, **skip}
    if config.architecture in ("batch_topk", "matryoshka"):
        threshold = state["threshold"].to(bias["b_enc"]).expand_as(bias["b_enc"])
        return "jumprelu", {}, {**bias, "threshold": threshold}
    topk = config.architecture == "topk"
    if topk or (config.architecture == "transcoder" and sae.d_in == sae.d_out and not config.skip):
        return "topk", {"k": config.k, "rescale_acts_by_decoder_norm": False}, bias
    skip = " with a skip path" if config.skip else ""
    raise InputError(
        f"SAELens has no class for a {config.architecture} from width {sae.d_in} to {sae.d_out}{skip}; save "
        "it in Veridical's own layout"
    )


def made(
    cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, *, scale: float | None = None
) -> SAE:
    """The SAE of a SAELens config and its tensors; see `from_saelens`."""
    cfg = modern(cfg, where)
    normalisation = str(cfg.get("normalize_activations") or "none")
    if normalisation == "expected_average_only_in" and scale is None:
        raise InputError(
            f"{where} says normalize_activations=expected_average_only_in, but holds no factor; give it with "
            "scale=... (mean norm sqrt(d) over the mean norm in training), or 1.0 to run it as SAELens does"
        )
    if normalisation not in ("none", "expected_average_only_in", *ROW_NORMS):
        raise unknown("normalisation", normalisation, ("none", "expected_average_only_in", *ROW_NORMS))
    parts = _ours(cfg, dict(tensors), where)
    if scale is not None and scale != 1:
        _rescale(parts, scale)
    sae = parts.make()
    return RowNormalised(sae, normalisation) if normalisation in ROW_NORMS else sae


def _ours(cfg: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> Parts:
    architecture = str(cfg["architecture"])
    if architecture not in _KINDS:
        raise unknown("SAELens architecture", architecture, _KINDS)
    kind, metadata = _KINDS[architecture], cfg.get("metadata") or {}
    options: dict[str, Any] = {"site": metadata.get("hook_name")}
    own = _renamed(architecture, tensors, where)
    if kind == "jumprelu_transcoder":
        target = cfg.get("hook_name_out") or metadata.get("hook_name_out")
        # A transcoder names both of its sites or neither.
        options = {"site": options["site"], "target_site": target} if options["site"] and target else {}
        options["skip"] = "W_skip" in own
    elif kind in ("topk", "batch_topk"):
        options["k"] = _k(cfg, where)
    if cfg.get("finetuning_scaling_factor") is True and "finetuning_scaling_factor" in tensors:
        own["W_dec"] = own["W_dec"] * tensors["finetuning_scaling_factor"][:, None]
    if (dtype := cfg.get("dtype")) is not None:
        if dtype not in _DTYPES:
            raise unknown("dtype", dtype, _DTYPES)
        own = {name: value.to(_DTYPES[dtype]) for name, value in own.items()}
    _check_sizes(cfg, own, where)
    parts = Parts(kind, own, options, where, centred=bool(cfg.get("apply_b_dec_to_input", True)))
    if cfg.get("rescale_acts_by_decoder_norm"):
        # The threshold of a BatchTopK is one number, in units of activation times norm already.
        held = {name: own.pop(name) for name in ("threshold",) if name in own}
        parts.move_norms()
        own |= held
    return parts


def _renamed(architecture: str, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors that an architecture has there, under our names and in our orientation."""
    names = ["W_enc", "W_dec", "b_dec"]
    names += ["b_gate", "b_mag", "r_mag"] if architecture == "gated" else ["b_enc"]
    names += ["threshold"] if "jumprelu" in architecture else []
    names += ["W_skip"] if "skip" in architecture else []
    theirs = {name: name for name in names}
    if architecture in _TRAINING:
        theirs["threshold"] = "topk_threshold"
    own = wanted(tensors, where, **theirs)
    own["W_enc"] = own["W_enc"].T
    if architecture in ("transcoder", "skip_transcoder"):
        own["threshold"] = torch.zeros_like(own["b_enc"])
    return own


def modern(cfg: Mapping[str, Any], where: str = "cfg.json") -> dict[str, Any]:
    """The config as SAELens 6 writes it, from any version."""
    metadata = cfg.get("metadata") or {}
    version = str(cfg.get("sae_lens_version") or metadata.get("sae_lens_version") or "")
    if version and int(version.split(".")[0]) >= 6:
        if "architecture" not in cfg:
            raise DamagedFileError(f"{where} names no architecture")
        return dict(cfg)
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    old = {renamed.get(name, name): value for name, value in cfg.items()}
    normalise = old.get("normalize_activations")
    if isinstance(normalise, bool) or normalise is None:
        old["normalize_activations"] = "expected_average_only_in" if normalise else "none"
    old.setdefault("architecture", "standard")
    activation, options = old.get("activation_fn") or "relu", old.get("activation_fn_kwargs") or {}
    if activation == "topk":
        old |= {"architecture": "topk", "k": options.get("k")}
    elif activation != "relu":
        raise ConfigError(f"{where} has activation {activation!r}; expected relu or topk")
    old["metadata"] = {**metadata, "hook_name": old.get("hook_name") or metadata.get("hook_name")}
    return old


def _rescale(parts: Parts, scale: float) -> None:
    """Folds a factor on inputs into the weights; latents keep their values, as SAELens's own folding does."""
    tensors = parts.tensors
    tensors["W_enc"] = tensors["W_enc"] * scale
    for name in ("W_dec", "b_dec"):
        tensors[name] = tensors[name] / scale


def _check_sizes(cfg: Mapping[str, Any], own: Mapping[str, Tensor], where: str) -> None:
    expected = (int(cfg["d_sae"]), int(cfg["d_in"])) if {"d_sae", "d_in"} <= set(cfg) else None
    if expected is not None and tuple(own["W_enc"].shape) != expected:
        width, d_in = own["W_enc"].shape
        raise DamagedFileError(
            f"{where}: W_enc is [{d_in}, {width}]; the config says d_in {expected[1]}, d_sae {expected[0]}"
        )


def _k(cfg: Mapping[str, Any], where: str) -> int:
    found = cfg.get("k")
    if found is None or float(found) != int(found):
        raise ConfigError(f"{where} has k = {found!r}; expected a whole number")
    return int(found)


def _kind_of(site: str | None) -> str | None:
    from veridical.sites import Site

    try:
        return None if site is None else Site.parse(site).kind
    except InputError:
        return None


def _hook_name(site: str | None) -> str | None:
    """The site as SAELens names it; a name that is not in our vocabulary stays."""
    from veridical.sites import Site

    try:
        return None if site is None else Site.parse(site).name
    except InputError:
        return site
