"""Saved sweeps: figures as JSON, coefficients as safetensors, the best probe as a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from veridical import config as configs
from veridical import files
from veridical.config import ProbeConfig
from veridical.errors import InputError
from veridical.probes.evaluate import Estimate
from veridical.probes.kinds import kind
from veridical.probes.origin import Origin
from veridical.probes.result import Labels, ProbeSweep, SiteResult
from veridical.provenance import provenance
from veridical.sealed import FORMAT, canonical, digest, parsed, read_checked, tensor_bytes, unsealed

RESULTS, WEIGHTS, BEST = "sweep.json", "sweep.safetensors", "best"


def save_sweep(sweep: ProbeSweep, folder: str | Path) -> Path:
    """Saves into `folder`; `sweep.json` is written after the weights and seals them with their checksum."""
    folder = Path(folder)
    weights = tensor_bytes(_tensors(sweep))
    files.write_json(folder / "config.json", configs.to_dict(sweep.config))
    facts = sweep.facts
    files.write_json(
        folder / "provenance.json",
        provenance(
            seed=sweep.config.seed,
            model=facts.get("model"),
            model_fingerprint=facts.get("model_fingerprint"),
            data_fingerprint=facts.get("data_fingerprint"),
        ),
    )
    files.write_json(folder / "metrics.json", {"best_site": sweep.best_site, **sweep.metrics})
    sweep.best().save(folder / BEST)
    sweep.report_section().save(folder)
    files.write_bytes(folder / WEIGHTS, weights)
    body = _body(sweep, digest(weights))
    files.write_json(folder / RESULTS, {**body, "checksum": digest(canonical(body))})
    return folder


def load_sweep(folder: str | Path) -> ProbeSweep:
    """Loads what `save_sweep` wrote.

    Raises:
        InputError: No sweep in `folder`.
        DamagedFileError: A file is missing, cut short or altered.
    """
    folder = Path(folder)
    path = folder / RESULTS
    if not path.is_file():
        raise InputError(f"no {RESULTS} in {folder}: expected a folder that a probe sweep was saved in")
    body = unsealed(files.read_json(path), path)
    tensors = parsed(read_checked(folder / WEIGHTS, body["weights"]), folder / WEIGHTS)
    classes = np.array(body["classes"])
    return ProbeSweep(
        config=configs.build(ProbeConfig, None, **body["config"]),
        classes=(body["classes"][0], body["classes"][1]),
        results=tuple(_site(saved, number, tensors, classes) for number, saved in enumerate(body["sites"])),
        best_site=body["best_site"],
        selected_control=tensors["selected_control"],
        text=None if body["text"] is None else {k: _estimate(v) for k, v in body["text"].items()},
        firing=None if body["firing"] is None else pd.DataFrame(body["firing"]),
        counts=body["counts"],
        facts=body["facts"],
        notes=tuple(body["notes"]),
        labels=_labels(tensors),
    )


def _tensors(sweep: ProbeSweep) -> dict[str, np.ndarray]:
    tensors = {"selected_control": np.asarray(sweep.selected_control, dtype=np.float64)}
    if sweep.labels is not None:
        tensors |= {f"labels.{name}": values for name, values in vars(sweep.labels).items()}
    for number, result in enumerate(sweep.results):
        tensors |= {f"{number}.{name}": array for name, array in result.probe.arrays().items()}
        tensors[f"{number}.control"] = np.asarray(result.control, dtype=np.float64)
        for name in ("random", "out_of_fold", "test_scores"):
            tensors[f"{number}.{name}"] = np.asarray(getattr(result, name), dtype=np.float64)
    return tensors


def _body(sweep: ProbeSweep, weights: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "config": configs.to_dict(sweep.config),
        "classes": list(sweep.classes),
        "best_site": sweep.best_site,
        "sites": [
            {
                "site": result.site,
                "kind": result.probe.name,
                "parameters": result.probe.parameters(),
                "n_iter": int(result.probe.n_iter_[0]),
                "converged": result.converged,
                "fold_auroc": result.fold_auroc,
                "metrics": {name: _numbers(value) for name, value in result.metrics.items()},
                "lead_over_text": None if result.lead_over_text is None else _numbers(result.lead_over_text),
                "selectivity": None if result.selectivity is None else _numbers(result.selectivity),
                "origin": result.probe.origin_.to_dict(),
            }
            for result in sweep.results
        ],
        "text": None if sweep.text is None else {k: _numbers(v) for k, v in sweep.text.items()},
        "firing": None if sweep.firing is None else _records(sweep.firing),
        "counts": dict(sweep.counts),
        "facts": dict(sweep.facts),
        "notes": list(sweep.notes),
        "weights": weights,
    }


def _site(
    saved: dict[str, Any], number: int, tensors: dict[str, np.ndarray], classes: np.ndarray
) -> SiteResult:
    probe = kind(saved["kind"]).made(saved["parameters"])
    own = {name.removeprefix(f"{number}."): array for name, array in tensors.items()}
    probe.restore(classes, own, saved["n_iter"])
    probe.origin_ = Origin.from_dict(saved["origin"])
    lead, selectivity = saved["lead_over_text"], saved["selectivity"]
    return SiteResult(
        site=saved["site"],
        probe=probe,
        fold_auroc=saved["fold_auroc"],
        metrics={name: _estimate(value) for name, value in saved["metrics"].items()},
        control=tensors[f"{number}.control"],
        lead_over_text=None if lead is None else _estimate(lead),
        random=tensors[f"{number}.random"],
        out_of_fold=tensors[f"{number}.out_of_fold"],
        test_scores=tensors[f"{number}.test_scores"],
        selectivity=None if selectivity is None else _estimate(selectivity),
        converged=saved["converged"],
    )


def _labels(tensors: dict[str, np.ndarray]) -> Labels | None:
    found = {name.removeprefix("labels."): v for name, v in tensors.items() if name.startswith("labels.")}
    return Labels(**found) if found else None


def _numbers(estimate: Estimate) -> list[float | None]:
    return [v if np.isfinite(v) else None for v in (estimate.value, estimate.low, estimate.high)]


def _estimate(saved: list[float | None]) -> Estimate:
    return Estimate(*(float("nan") if v is None else v for v in saved))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{k: None if v != v else v for k, v in line.items()} for line in frame.to_dict("records")]
