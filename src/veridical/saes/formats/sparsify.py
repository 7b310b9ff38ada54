"""Sparsify folders (EleutherAI): `cfg.json` and `sae.safetensors`, one folder for each hookpoint.

Its coder keeps `encoder.weight [F, d]`, `encoder.bias`, `W_dec [F, d]` and `b_dec`, which is our layout: no
transpose. (SAELens's own loader of these folders transposes the decoder.) The decoder bias is subtracted from
the input unless the coder is a transcoder (`transcode`), and decoder rows are taken as they are, whatever
`normalize_decoder` says: that option acts in training.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical.errors import InputError
from veridical.saes.formats.parts import Parts, read_config, read_tensors, wanted

if TYPE_CHECKING:
    from veridical.saes.base import SAE

CFG, WEIGHTS = "cfg.json", "sae.safetensors"
_BLOCK = re.compile(r"(?:^|.*[._])(?:layers|h)[._](\d+)(?:[._](\w+))?$")
_PARTS = {"mlp": "mlp_out", "attn": "attn_out", "self_attn": "attn_out", "attention": "attn_out"}
_REFUSED = {
    "signed": "latents that may be negative",
    "embed_skip": "a skip path from the embeddings",
    "gram_lookup": "an n-gram table beside the coder",
}


def from_sparsify(folder: str | Path, *, site: str | None = None, target_site: str | None = None) -> SAE:
    """Reads one coder of sparsify.

    Args:
        folder: The folder of one hookpoint; what `sparsify` writes for a run holds one for each.
        site: Where it reads; for an SAE on a block, its attention or its MLP, told by the folder's name.
        target_site: What a transcoder predicts.

    Raises:
        InputError: No coder in the folder, or one of a kind that is not read.
        DamagedFileError: A file that is cut short, or tensors that do not fit.
    """
    folder = Path(folder)
    if not (folder / CFG).is_file() and (inside := _hookpoints(folder)):
        raise InputError(f"{folder} holds coders for {', '.join(inside)}; give the folder of one of them")
    cfg = read_config(folder / CFG, "the folder of a sparsify coder")
    _check(cfg, folder)
    tensors = read_tensors(folder / WEIGHTS)
    own = wanted(tensors, folder, W_enc="encoder.weight", b_enc="encoder.bias", W_dec="W_dec", b_dec="b_dec")
    options: dict[str, Any] = {"k": int(cfg["k"]), "site": site or site_of(folder.name)}
    kind = "topk"
    if cfg.get("transcode"):
        kind = "transcoder"
        options |= {"site": site, "target_site": target_site, "skip": bool(cfg.get("skip_connection"))}
    if cfg.get("skip_connection"):
        own |= wanted(tensors, folder, W_skip="W_skip")
    return Parts(kind, own, options, str(folder), centred=kind == "topk").make()


def site_of(name: str) -> str | None:
    """The site of a hookpoint, from its module's name; None where that does not tell."""
    if re.split(r"[._]", name)[-1] in ("wte",) or name.endswith("embed_tokens"):
        return "embed"
    found = _BLOCK.match(name)
    if found is None:
        return None
    layer, part = found.groups()
    kind = "resid_post" if part is None else _PARTS.get(part)
    return None if kind is None else f"{kind}.{layer}"


def _check(cfg: dict[str, Any], folder: Path) -> None:
    if "k" not in cfg or "d_in" not in cfg:
        raise InputError(f"{folder / CFG} is not the config of a sparsify coder: it has no k or d_in")
    activation = cfg.get("activation", "topk")
    if activation != "topk":
        raise InputError(f"{folder} has activation {activation!r}; topk coders are read")
    for option, what in _REFUSED.items():
        if cfg.get(option):
            raise InputError(f"{folder} was trained with {option} ({what}), which no SAE here has")
    if cfg.get("skip_connection") and not cfg.get("transcode"):
        raise InputError(f"{folder} is an SAE with a skip path, which would copy its input; not read")


def _hookpoints(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"*/{CFG}")) if folder.is_dir() else []
