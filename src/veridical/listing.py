"""What `veridical ls` shows: embedded models and pairs; probes, SAEs, erasers, results, runs of a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from veridical import adapters, organisms
from veridical.errors import InputError, StoreError, VeridicalError
from veridical.files import read_json

DEPTH = 4
SKIPPED = {"node_modules", "site-packages", "__pycache__"}
DICTIONARY = {"dict_size": "latents", "activation_dim": "input width", "k": "k", "layer": "layer"}
"""What a config of dictionary_learning says of a dictionary, in words."""
HEADINGS = ("name", "kind", "size", "what it holds")


@dataclass(frozen=True)
class Item:
    """One line of the list."""

    name: str
    kind: str
    size: str
    figure: str


def listing(folder: Path) -> str:
    """Embedded things, then what is in `folder`, as aligned text.

    Raises:
        InputError: `folder` does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"no folder at {folder}")
    here = list(found(folder))
    try:
        inside = _aligned(list(embedded()))
    except StoreError as error:  # a copy of the package without its data can still list a folder
        inside = [f"  {error}"]
    lines = ["Embedded (use the name as --model or --data)", *inside, "", f"In {folder}"]
    return "\n".join([*lines, *(_aligned(here) if here else ["  no probe, SAE, eraser, store or run"])])


def embedded() -> Iterator[Item]:
    """The models and pairs that come with the package."""
    for name in organisms.NAMES:
        folder = organisms.path(name)
        if adapters.is_adapter(folder):
            rank = read_json(folder / adapters.CONFIG).get("r")
            said = f"LoRA of rank {rank} on {adapters.base_of(folder)}"
            yield Item(name, "reward model" if adapters.scores(folder) else "model", _size(folder), said)
        elif (folder / "config.json").is_file():
            yield Item(name, "model", _size(folder), _model_figure(read_json(folder / "config.json")))
    for name in organisms.PAIRS:
        file = organisms.embedded_pairs(name)
        if file.is_file():
            yield Item(name, "pairs", _size(file), _pairs_figure(file))


def found(folder: Path) -> Iterator[Item]:
    """Probes, SAEs, erasers, stores, results and runs in `folder`, at most four levels deep."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        depth = len(here.relative_to(folder).parts)
        folders[:] = sorted(
            name for name in folders if depth < DEPTH and not name.startswith(".") and name not in SKIPPED
        )
        try:
            item = _item(here, set(names))
        except (VeridicalError, KeyError, TypeError, AttributeError):
            item = Item(str(here), "?", _size(here), "cannot be read: damaged, or not written by veridical")
        if item is not None:
            yield item


def _item(here: Path, names: set[str]) -> Item | None:
    if "manifest.json" in names:
        return _store(here)
    if names & {"sae_weights.safetensors", "sae.veridical.safetensors"}:
        return _sae(here, names)
    if {"cfg.json", "sae.safetensors"} <= names:
        return _sparsify(here)
    if {"config.json", "ae.pt"} <= names:
        return _dictionary(here)
    if {"config.json", "weights.safetensors"} <= names:
        return _fitted(here)
    if {"result.json", "section.json"} <= names:
        return _result(here, str(read_json(here / "result.json")["kind"]))
    if {"sweep.json", "section.json"} <= names:
        return _result(here, "Sweep")
    if {"config.json", "provenance.json", "metrics.json"} <= names:
        return _run(here)
    return None


def _store(here: Path) -> Item | None:
    manifest = read_json(here / "manifest.json")
    if not str(manifest.get("format", "")).startswith("veridical"):
        return None
    sites = manifest.get("request", manifest).get("sites", ())
    said = f"{len(sites)} site{'s' if len(sites) != 1 else ''}, {manifest.get('status', 'status unknown')}"
    return Item(str(here), "store", _size(here), said)


def _fitted(here: Path) -> Item | None:
    """A probe with its label, site, estimator and AUROC, or an eraser with how much it takes out."""
    config = read_json(here / "config.json")
    if "origin" not in config:
        return None
    origin = config["origin"]
    said = [part for part in (origin.get("target"), origin.get("site")) if part]
    if "eraser" in config:
        said += [str(config["eraser"]), f"{config['rank']} of {config['n_features']} dimensions"]
        return Item(str(here), "eraser", _size(here), ", ".join(said))
    metrics = read_json(here / "metrics.json").get("metrics", {})
    said.append(str(config["kind"]))
    if metrics.get("auroc") is not None:
        said.append(f"AUROC {metrics['auroc']:.3f}")
    return Item(str(here), "probe", _size(here), ", ".join(said))


def _sae(here: Path, names: set[str]) -> Item:
    """A sparse autoencoder with its site and figures, or one that another library saved."""
    if "config.json" not in names:
        return Item(str(here), "SAE", _size(here), "of SAELens")
    config = read_json(here / "config.json")
    options, figures = config["sae"], config["origin"]["metrics"]
    said = [str(options["architecture"])]
    said += [site for site in (options["site"], *options["sites"]) if site]
    if figures.get("l0") is not None and figures.get("fvu") is not None:
        said.append(f"L0 {figures['l0']:.3g}, FVU {figures['fvu']:.3f}")
    return Item(str(here), "SAE", _size(here), ", ".join(said))


def _sparsify(here: Path) -> Item:
    """A coder of sparsify, the folder of one hookpoint."""
    cfg = read_json(here / "cfg.json")
    kind = "transcoder" if cfg.get("transcode") else "topk"
    return Item(
        str(here), "SAE", _size(here), f"of sparsify: {kind}, k {cfg['k']}, input width {cfg['d_in']}"
    )


def _dictionary(here: Path) -> Item:
    """A dictionary of dictionary_learning, the folder of one trainer."""
    trainer = read_json(here / "config.json")["trainer"]
    said = [f"of dictionary_learning: {trainer['dict_class']}"]
    said += [f"{label} {trainer[key]}" for key, label in DICTIONARY.items() if trainer.get(key) is not None]
    return Item(str(here), "SAE", _size(here), ", ".join(said))


def _result(here: Path, kind: str) -> Item:
    """A result with its first figure, or its title where that stands elsewhere on the page."""
    section = read_json(here / "section.json")
    heads = section.get("headline", ())
    said = f"{heads[0][0]}: {heads[0][1]}" if heads else str(section["title"])
    return Item(str(here), re.sub(r"(?<!^)(?=[A-Z])", " ", kind).lower(), _size(here), said)


def _run(here: Path) -> Item:
    facts = read_json(here / "provenance.json")
    sections = [here / "section.json", *sorted(here.glob("*/section.json"))]
    heads = [head for file in sections if file.is_file() for head in read_json(file).get("headline", ())]
    said = (
        f"{heads[0][0]}: {heads[0][1]}" if heads else f"{facts.get('model', '')} on {facts.get('data', '')}"
    )
    return Item(str(here), f"run ({facts['verb']})" if "verb" in facts else "run", _size(here), said)


def _model_figure(config: dict[str, Any]) -> str:
    return (
        f"{config.get('model_type')}, {config.get('num_hidden_layers')} layers of {config.get('hidden_size')}"
    )


def _pairs_figure(file: Path) -> str:
    from pyarrow import parquet

    return f"{parquet.ParquetFile(file).metadata.num_rows:,} rows"


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = float(sum(file.stat().st_size for file in files))
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _aligned(items: Sequence[Item]) -> list[str]:
    rows = [HEADINGS, *(astuple(item) for item in items)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])).rstrip() for row in rows
    ]
