"""Saved SAEs: a SAELens folder with our config, figures, provenance and a card beside it.

`sae_lens.SAE.load_from_disk` reads `cfg.json` and `sae_weights.safetensors` and gives the same output;
`load_sae` reads the same weights, with the architecture as it was trained. An SAE that SAELens has no class
for is saved with its own tensors in `sae.veridical.safetensors`, and no `cfg.json`. Input scales are folded
into the weights. `config.json` is written last and holds the checksums of the other files and of itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical import files
from veridical.config import build, to_dict
from veridical.errors import DamagedFileError, DataError, InputError, ModelError, NonFiniteError
from veridical.provenance import provenance
from veridical.saes.config import SAEConfig
from veridical.saes.formats import saelens
from veridical.saes.formats.dictionary_learning import WEIGHTS as AE
from veridical.saes.formats.dictionary_learning import from_dictionary_learning
from veridical.saes.formats.sparsify import WEIGHTS as SPARSIFY
from veridical.saes.formats.sparsify import from_sparsify
from veridical.saes.kinds import kind
from veridical.saes.origin import SAEOrigin
from veridical.saes.row_norm import RowNormalised
from veridical.sealed import canonical, digest, read_checked, write_folder

if TYPE_CHECKING:
    from veridical.saes.base import SAE

FORMAT = 1
OWN, CONFIG, METRICS, PROVENANCE, CARD = (
    "sae.veridical.safetensors",
    "config.json",
    "metrics.json",
    "provenance.json",
    "README.md",
)
BUFFERS = ("variance", "updates")
"""What training goes on from, and SAELens has no place for."""
CHECKED = 16
"""Random rows on which what is saved is compared with what was to be saved."""


def save_sae(sae: SAE, folder: str | Path) -> Path:
    """Saves one SAE into `folder`, whole or not at all where the folder is new.

    Files of the same names are replaced; others in the folder are left alone. Before anything is written,
    what would be read back is run on random rows and compared with the SAE that is saved.

    Raises:
        InputError: A stack of SAEs.
        NonFiniteError: The SAE gives NaN or infinity.
        ModelError: The saved weights would give another output.
    """
    from veridical.saes.card import card
    from veridical.saes.units import unscaled

    if sae.stacked:
        raise InputError("this is a stack of SAEs; save one at a time with stack.member(number)")
    folder, raw, origin = Path(folder), unscaled(sae), origin_of(sae)
    parts, again = _weights(raw, origin.model)
    _check_output(sae, again)
    parts[METRICS] = canonical(dict(origin.metrics))
    parts[PROVENANCE] = canonical(
        provenance(
            seed=sae.config.seed,
            model=origin.model,
            model_fingerprint=origin.model_fingerprint,
            data_fingerprint=origin.data_fingerprint,
        )
    )
    config: dict[str, Any] = {
        "format": FORMAT,
        "kind": "sae",
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "sae": to_dict(sae.config),
        "buffers": {name: raw.state_dict()[name].item() for name in BUFFERS if name in raw.state_dict()},
        "row_norm": raw.how if isinstance(raw, RowNormalised) else None,
        "origin": origin.to_dict(),
        "files": {name: digest(content) for name, content in parts.items()},
    }
    # The card stands outside the checksums: people may add to it.
    parts[CARD] = card(sae, saelens_reads=saelens.CFG in parts).encode("utf-8")
    parts[CONFIG] = canonical({**config, "checksum": digest(canonical(config))})
    write_folder(folder, parts)
    return folder


def load_sae(folder: str | Path) -> SAE:
    """Loads an SAE: our own folder, or one of SAELens, sparsify or dictionary_learning.

    Raises:
        InputError: No SAE in `folder`; says what was looked for.
        DamagedFileError: A file is missing, cut short or altered.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file() and files.read_json(folder / CONFIG).get("kind") == "sae":
        return _load_own(folder)
    readers = {saelens.WEIGHTS: saelens.from_saelens, SPARSIFY: from_sparsify, AE: from_dictionary_learning}
    for name, reader in readers.items():
        if (folder / name).is_file():
            sae = reader(folder)
            sae.origin = SAEOrigin(source=f"{folder.name} ({reader.__name__.removeprefix('from_')})")
            return sae
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    raise InputError(f"no SAE in {folder}: expected one of {', '.join([*readers, CONFIG])}")


def origin_of(sae: SAE) -> SAEOrigin:
    """Where the SAE came from; an empty record for one that was never told."""
    return sae.origin or SAEOrigin()


def _weights(raw: SAE, model: str | None) -> tuple[dict[str, bytes], SAE]:
    """The files of the weights, and the SAE that they are read as: by SAELens where it has a class for it."""
    from safetensors.torch import save

    try:
        cfg, tensors = saelens.described(raw)
    except InputError:
        own = {name: value.detach().cpu().contiguous() for name, value in raw.state_dict().items()}
        again = kind(raw.config.architecture)(raw.config, raw.d_in, raw.d_out)
        again.load_state_dict(own, assign=True)
        return {OWN: save(own)}, again
    cfg["metadata"]["model_name"] = model
    parts = {saelens.WEIGHTS: save(tensors), saelens.CFG: canonical(cfg)}
    return parts, saelens.made(cfg, tensors, "the weights")


def _check_output(sae: SAE, again: SAE) -> None:
    """Refuses weights that would give another output on random rows than the SAE in memory does."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(CHECKED, sae.d_in, generator=random).to(sae.W_enc.device) / sae.scale
    with torch.no_grad():
        wanted, found = sae(rows).float().cpu(), again(rows.cpu()).float()
    if not bool(torch.isfinite(wanted).all()):
        raise NonFiniteError(f"{sae.config.label} gives NaN or infinity on random rows, so it is not saved")
    tolerance = 0.05 if sae.W_enc.dtype in (torch.bfloat16, torch.float16) else 1e-3
    apart = float((wanted - found).norm() / wanted.norm().clamp_min(1e-12))
    if apart > tolerance:
        raise ModelError(
            f"the weights of {sae.config.label} as they would be saved give another output than the SAE "
            f"itself ({apart:.1%} of its length apart), so nothing was saved"
        )


def _load_own(folder: Path) -> SAE:
    from safetensors import SafetensorError
    from safetensors.torch import load

    config = _read_config(folder)
    content = {name: read_checked(folder / name, expected) for name, expected in config["files"].items()}
    name = OWN if OWN in content else saelens.WEIGHTS
    try:
        tensors = load(content[name])
    except SafetensorError as error:
        raise DamagedFileError(f"{folder / name} is not readable safetensors ({error})") from error
    options = build(SAEConfig, None, **_tuples(config["sae"]))
    sae = kind(options.architecture)(options, config["d_in"], config["d_out"])
    state = tensors if name == OWN else _state(sae, tensors, config["buffers"])
    sae.load_state_dict(state, assign=True)
    sae = sae if config["row_norm"] is None else RowNormalised(sae, config["row_norm"])
    sae.origin = SAEOrigin.from_dict(config["origin"])
    return sae.eval().requires_grad_(False)


def _state(sae: SAE, tensors: dict[str, Tensor], buffers: dict[str, float]) -> dict[str, Tensor]:
    """Our tensors from SAELens's, for the architecture as it was trained."""
    own, wanted = dict(tensors), sae.state_dict()
    own["W_enc"] = own["W_enc"].T.contiguous()
    if "threshold" in own:
        threshold = own.pop("threshold")
        if "log_threshold" in wanted:
            own["log_threshold"] = threshold.log()
        else:
            own["threshold"] = threshold[0].reshape(wanted["threshold"].shape)
    own |= {name: wanted[name].new_tensor(value) for name, value in buffers.items()}
    return {**wanted, **{name: own[name] for name in wanted if name in own}}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = files.read_json(path)
    if config.get("format") != FORMAT:
        raise DataError(f"{path} has format {config.get('format')!r}; this version reads {FORMAT}")
    checksum = config.pop("checksum", None)
    if checksum != digest(canonical(config)):
        raise DamagedFileError(f"{path} does not match its checksum; it was damaged or edited")
    return config


def _tuples(saved: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
