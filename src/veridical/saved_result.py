"""Saved results: one form for every result that is a dataclass of figures, tables, arrays and probes.

`result.json` holds the fields, `arrays.safetensors` every number that came as an array or a column (so that
they come back to the last bit), and what has a folder form of its own (probes, erasers, sweeps) lies in a
folder beside them. `result.json` is written last and holds the checksums of the rest and of itself. Nothing
is unpickled: what is made on loading is named in `KINDS` and `VALUES`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from veridical import config as configs
from veridical import files
from veridical.errors import DamagedFileError, InputError
from veridical.provenance import provenance
from veridical.sealed import FORMAT, canonical, digest, parsed, read_checked, tensor_bytes, unsealed

if TYPE_CHECKING:
    from veridical.reporting.section import Section

RESULT, ARRAYS = "result.json", "arrays.safetensors"
KINDS = {
    "AdapterReport": "steering.adapter",
    "Agreement": "preference.agreement",
    "Attribution": "interventions.attribution",
    "Calibration": "probes.calibration",
    "CausalCheck": "probes.causal_result",
    "Circuit": "interventions.circuit_result",
    "Comparison": "comparison.comparison",
    "ConstitutionalData": "preference.revised",
    "DirectLogits": "interventions.direct",
    "Distilled": "preference.distilled",
    "ErasureCheck": "probes.erasure_check",
    "Evaluation": "steering.evaluation",
    "HonestyReport": "probes.honesty_report",
    "Frontier": "preference.frontier",
    "HackingCheck": "preference.hacking",
    "Judged": "probes.judged",
    "LearningCurve": "probes.learning",
    "LensReading": "interventions.lens_reading",
    "ModelTransfer": "probes.model_transfer",
    "Patched": "interventions.patched",
    "PatchedPaths": "interventions.patched_paths",
    "Policies": "comparison.policies",
    "PreferenceRun": "preference.runs",
    "Proposal": "steering.proposal",
    "TransferMatrix": "probes.transfer",
    "TunedLens": "interventions.tuned_result",
}
"""Class of each result that is saved so, and its module of `veridical`."""
VALUES = {"Edited": "probes.causal_result", "Estimate": "probes.evaluate"}
"""Dataclasses that stand inside results, and their modules."""
CONFIGS = ("HonestyConfig", "ProbeConfig")
FOLDERS = {"probe": "config.json", "eraser": "config.json", "sweep": "sweep.json"}
"""What has a folder form of its own, and the file that seals it."""


class Saved:
    """Keeps a result: `save` into a folder, `load` from it, in this or another process."""

    def save(self, folder: str | Path) -> Path:
        """Saves everything, with config, provenance, metrics and the section of the report, into `folder`."""
        return save_result(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Loads what `save` wrote; a file that is not as it was written is named and refused.

        Raises:
            InputError: No result, or another kind of result, in `folder`.
            DamagedFileError: A file is missing, cut short or altered.
        """
        found = load_result(folder)
        if not isinstance(found, cls):
            raise InputError(f"{folder} holds a {type(found).__name__}; expected a {cls.__name__}")
        return found

    def made_by(self) -> dict[str, Any]:
        """Seed, model and fingerprints, for the provenance."""
        facts = getattr(self, "facts", {})
        kept = {name: facts.get(name) for name in ("model", "model_fingerprint", "data_fingerprint")}
        return {"seed": getattr(getattr(self, "config", None), "seed", facts.get("seed")), **kept}

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The figures as a table."""

    @abstractmethod
    def report_section(self) -> Section:
        """The result as a section of a report."""


def save_result(result: Saved, folder: str | Path) -> Path:
    """Saves a result of `KINDS`; see `Saved.save`."""
    folder, writer = Path(folder), _Writer(Path(folder))
    fields = {
        field.name: writer.encode(getattr(result, field.name), (field.name,)) for field in _fields(result)
    }
    if (config := getattr(result, "config", None)) is not None:
        files.write_json(folder / "config.json", configs.to_dict(config))
    files.write_json(folder / "provenance.json", provenance(**result.made_by()))
    table = json.loads(str(result.to_frame().to_json(orient="records", double_precision=15)))
    files.write_json(folder / "metrics.json", {"table": table})
    result.report_section().save(folder)
    arrays = tensor_bytes(writer.arrays)
    files.write_bytes(folder / ARRAYS, arrays)
    body = {"format": FORMAT, "kind": type(result).__name__, "fields": fields, "arrays": digest(arrays)}
    files.write_json(folder / RESULT, {**body, "checksum": digest(canonical(body))})
    return folder


def load_result(folder: str | Path) -> Any:
    """Loads a result of any of `KINDS`; see `Saved.load`."""
    folder = Path(folder)
    path = folder / RESULT
    if not path.is_file():
        raise InputError(f"no {RESULT} in {folder}: expected a folder that a result was saved in")
    body = unsealed(files.read_json(path), path)
    if body["kind"] not in KINDS:
        raise InputError(f"{path} holds a {body['kind']!r}, which this version does not know")
    arrays = parsed(read_checked(folder / ARRAYS, body["arrays"]), folder / ARRAYS)
    reader = _Reader(folder, arrays)
    fields = {name: reader.decode(value) for name, value in body["fields"].items()}
    return _class(KINDS, body["kind"])(**fields)


class _Writer:
    """Turns values into JSON; arrays are gathered, probes and sweeps saved in folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, np.ndarray] = {}
        self.places: set[str] = set()

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if np.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if isinstance(value, pd.DataFrame):
            return self._table(value, path)
        if isinstance(value, tuple | list):
            items = [self.encode(item, (*path, str(at))) for at, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, Mapping):
            items = [(key, self.encode(item, (*path, str(key)))) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
                return dict(items)
            return {"$map": [[self.encode(key, path), item] for key, item in items]}
        return self._object(value, path)

    def _array(self, value: np.ndarray, path: tuple[str, ...]) -> dict[str, Any]:
        if value.dtype.kind in "biuf":
            name = "/".join(path)
            self.arrays[name] = value
            return {"$array": name}
        items = [self.encode(item, path) for item in value.reshape(-1).tolist()]
        return {"$objects": items, "shape": list(value.shape), "dtype": value.dtype.str}

    def _table(self, value: pd.DataFrame, path: tuple[str, ...]) -> dict[str, Any]:
        columns = []
        for name in value.columns:
            column, dtype = value[name], value[name].dtype
            plain = isinstance(dtype, np.dtype) and dtype.kind in "biuf"
            values = column.to_numpy() if plain else np.array([*column.tolist(), None], dtype=object)[:-1]
            columns.append([name, str(dtype), self._array(values, (*path, str(name)))])
        return {"$table": columns, "rows": len(value)}

    def _object(self, value: Any, path: tuple[str, ...]) -> dict[str, Any]:
        from veridical.probes.base import LinearProbe
        from veridical.probes.erasure import Eraser
        from veridical.probes.result import ProbeSweep

        name = type(value).__name__
        for kind, own in (("probe", LinearProbe), ("eraser", Eraser), ("sweep", ProbeSweep)):
            if isinstance(value, own):
                place = self._place(path[-1])
                value.save(self.folder / place)
                return {
                    f"${kind}": place,
                    "sealed": digest((self.folder / place / FOLDERS[kind]).read_bytes()),
                }
        if name in CONFIGS:
            return {"$config": name, "values": configs.to_dict(value)}
        if name in VALUES:
            inner = {f.name: self.encode(getattr(value, f.name), (*path, f.name)) for f in _fields(value)}
            return {"$value": name, "fields": inner}
        raise TypeError(f"{'.'.join(path)} is a {name}, which has no saved form")

    def _place(self, name: str) -> str:
        """A folder of its own for what is called `name`."""
        slug = re.sub(r"[^\w.]+", "-", name).strip("-.") or "part"
        place, number = slug, 1
        while place in self.places:
            number += 1
            place = f"{slug}-{number}"
        self.places.add(place)
        return place


class _Reader:
    """The reverse of `_Writer`."""

    def __init__(self, folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
        self.folder, self.arrays = folder, arrays

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return {key: self.decode(item) for key, item in value.items()}
        held = value[tag]
        if tag == "$float":
            return float(held)
        if tag == "$tuple":
            return tuple(self.decode(item) for item in held)
        if tag == "$map":
            return {self.decode(key): self.decode(item) for key, item in held}
        if tag == "$array":
            return self.arrays[held]
        if tag == "$objects":
            return self._objects(value)
        if tag == "$table":
            return self._table(value)
        if tag == "$config":
            return configs.build(getattr(configs, held), None, **value["values"])
        if tag == "$value":
            return _class(VALUES, held)(**{k: self.decode(v) for k, v in value["fields"].items()})
        return self._folder(tag.removeprefix("$"), held, value["sealed"])

    def _objects(self, value: Mapping[str, Any]) -> np.ndarray:
        items = [self.decode(item) for item in value["$objects"]]
        made = np.empty(len(items), dtype=object)
        for at, item in enumerate(items):  # one by one: lists of one length would become an axis
            made[at] = item
        return made.astype(np.dtype(value["dtype"])).reshape(value["shape"])

    def _table(self, value: Mapping[str, Any]) -> pd.DataFrame:
        columns = {
            name: pd.Series(self.decode(held), index=range(value["rows"])).astype(dtype)
            for name, dtype, held in value["$table"]
        }
        return pd.DataFrame(columns, index=range(value["rows"]))

    def _folder(self, kind: str, place: str, sealed: str) -> Any:
        from veridical.probes.result import ProbeSweep
        from veridical.probes.saved import load_probe
        from veridical.probes.saved_eraser import load_eraser

        read = {"probe": load_probe, "eraser": load_eraser, "sweep": ProbeSweep.load}
        folder = self.folder / place
        if not folder.is_dir():
            raise DamagedFileError(f"{folder} is missing; the folder was cut short")
        read_checked(folder / FOLDERS[kind], sealed)
        return read[kind](folder)


def _class(modules: Mapping[str, str], name: str) -> Any:
    return getattr(importlib.import_module(f"veridical.{modules[name]}"), name)


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value)
