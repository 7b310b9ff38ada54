"""Saved steering vectors: a sealed folder of safetensors and JSON with a card; their section of a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.errors import DamagedFileError
from veridical.provenance import provenance
from veridical.sealed import digest, read_checked, read_sealed, write_sealed
from veridical.steering.gate import Gate
from veridical.steering.vectors import SteeringVector

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

GATE, ERASERS, SEAL = "gate", "erasers", "config.json"
USE = """```python
import veridical as vd

vector = vd.SteeringVector.load("this folder")
with vector(model, strength=1.0):
    model.generate("...")
```"""
LIMITS = (
    "It belongs to the model whose fingerprint is given; another checkpoint has other directions.",
    "What it does was measured on data like those named here; on other prompts measure again, beside a "
    "random direction of the same length and a prompt that asks for the same.",
)


def save_vector(vector: SteeringVector, folder: str | Path) -> Path:
    """Saves a vector; the folders of its gate and erasers first, what seals all of it last."""
    folder = Path(folder)
    below: dict[str, str] = {}
    if vector.gate is not None:
        vector.gate.probe.save(folder / GATE)
        below[GATE] = digest((folder / GATE / SEAL).read_bytes())
    for number, eraser in enumerate(vector.erasers.values()):
        place = f"{ERASERS}-{number}"
        eraser.save(folder / place)
        below[place] = digest((folder / place / SEAL).read_bytes())
    gate = vector.gate
    config: dict[str, Any] = {
        "steering_vector": vector.method,
        "positions": vector.positions,
        "erased": list(vector.erasers),
        "gate": None if gate is None else {"threshold": gate.threshold, "keep": gate.keep},
        "facts": dict(vector.facts),
        "calibrated": dict(vector.calibrated),
        "below": below,
    }
    facts = {
        name: vector.facts.get(name) for name in ("seed", "model", "model_fingerprint", "data_fingerprint")
    }
    arrays = {site: np.asarray(v, dtype=np.float64) for site, v in vector.vectors.items()}
    metrics = {"table": vector.to_frame().astype(object).where(lambda x: x.notna(), None).to_dict("records")}
    metrics |= {"calibrated": dict(vector.calibrated), "choice": vector.facts.get("choice", [])}
    return write_sealed(
        folder, config, arrays, metrics=metrics, provenance=provenance(**facts), card=_card(vector)
    )


def load_vector(folder: str | Path) -> SteeringVector:
    """Loads a saved vector.

    Raises:
        InputError: No steering vector in `folder`.
        DamagedFileError: A file is missing, cut short or altered.
    """
    from veridical.probes.saved import load_probe
    from veridical.probes.saved_eraser import load_eraser

    folder = Path(folder)
    config, arrays = read_sealed(folder, "steering_vector", "steering vector")
    for place, expected in config["below"].items():
        if not (folder / place).is_dir():
            raise DamagedFileError(f"{folder / place} is missing; the folder was cut short")
        read_checked(folder / place / SEAL, expected)
    gate = None
    if config["gate"] is not None:
        gate = Gate(load_probe(folder / GATE), config["gate"]["threshold"], config["gate"]["keep"])
    erasers = {
        site: load_eraser(folder / f"{ERASERS}-{number}") for number, site in enumerate(config["erased"])
    }
    return SteeringVector(
        arrays, erasers, config["steering_vector"], config["positions"], gate, config["facts"],
        config["calibrated"],
    )  # fmt: skip


def section(vector: SteeringVector) -> Section:
    """The vector as a section of a report."""
    from veridical.reporting.section import Section

    tables = [("Where it acts", vector.to_frame().round(4))]
    choice = vector.facts.get("choice")
    if choice:
        name = f"{vector.facts['choice_of']}: probability of what is wanted on validation pairs, at equal KL"
        tables.append((name, pd.DataFrame(choice).round(4)))
    figures = (_curve(vector),) if vector.calibrated else ()
    return Section(
        title="Steering vector", text="\n\n".join(_sentences(vector)), figures=figures, tables=tuple(tables)
    )


def _curve(vector: SteeringVector) -> go.Figure:
    from veridical.reporting import figures

    figure = figures.figure()
    figure.add_scatter(
        x=vector.calibrated["strengths"], y=vector.calibrated["kl"], mode="lines+markers", name="KL"
    )
    return figures.style(figure, "What the vector costs on neutral text", "strength", "KL, nats a token")


def _sentences(vector: SteeringVector) -> list[str]:
    facts = vector.facts
    said = [f"{vector!r}."]
    if "rows" in facts:
        said.append(
            f"Fitted on {facts['rows']} of {facts['rows_given']} rows of {facts['data']} ({facts['pairs']} "
            f"pairs), read at {facts['tokens']}; positive strengths go towards {facts['label']} "
            f"{facts['towards']}."
        )
    if vector.calibrated:
        kl = vector.calibrated["kl"][-1]
        said.append(f"Strength 1 costs {kl:.4f} nats a token on {vector.calibrated['texts']}.")
    return said


def _card(vector: SteeringVector) -> str:
    parts = ["# Steering vector", "\n\n".join(_sentences(vector)), USE]
    parts += ["## Limits", "\n".join(f"- {line}" for line in LIMITS)]
    model = vector.facts.get("model")
    if model:
        parts.insert(2, f"Model: `{model}`, fingerprint `{vector.facts.get('model_fingerprint')}`.")
    return "\n\n".join(parts) + "\n"
