"""A preference training as a result: what every checkpoint does, and where its weights are."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

RESAMPLES = 1000
AVERAGED = ("reward", "kl", "entropy", "length", "ended", "repetition")
"""Columns of the samples whose means the table has."""
NAMES = {
    "reward": "mean reward",
    "kl": "KL to the reference, nats per answer",
    "accuracy": "preferences in the right order",
}


@dataclass(frozen=True, repr=False)
class PreferenceRun(Saved):
    """One training, measured at the start and at every checkpoint, each loaded from disk.

    Attributes:
        table: One line per checkpoint (`step` 0 is the reference): means over the sampled answers of
            `reward` (where there is a reward model), `kl` (nats per answer, exact over the vocabulary at each
            position, on the policy's own samples), `entropy` (nats per token), `length`, `ended`,
            `repetition`; and over held-out preferences `accuracy`, `chosen` and `rejected` (change of log p
            against the reference, nats). For a reward model `accuracy` and `margin` alone.
        samples: Every sampled answer, with its checkpoint.
        log: The training's own log by step.
        facts: Method, model, data, options and fingerprints.
    """

    table: pd.DataFrame
    samples: pd.DataFrame
    log: pd.DataFrame
    facts: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Folder of the final model."""
        return Path(self.facts["folder"]) / "model"

    def to_frame(self) -> pd.DataFrame:
        """`table`, with 95 % intervals of reward and KL over prompts."""
        frame = self.table.copy()
        for name in ("reward", "kl"):
            if name in self.samples:
                bounds = [
                    interval(self.at(step)[name].to_numpy(), self.facts["seed"]) for step in frame["step"]
                ]
                frame[f"{name}_low"], frame[f"{name}_high"] = map(list, zip(*bounds))
        return frame

    def at(self, step: int) -> pd.DataFrame:
        """The samples of one checkpoint, one line per prompt, in the same order for every checkpoint."""
        return pd.DataFrame(self.samples[self.samples["step"] == step]).reset_index(drop=True)

    def findings(self) -> list[str]:
        """What changed from the reference to the last checkpoint, in sentences."""
        first, last = self.table.iloc[0], self.table.iloc[-1]
        facts = self.facts
        said = [
            f"{facts['method'].upper()} on {facts['model']}: {int(last['step'])} steps, {facts['rows']} rows "
            f"of {facts['data']}, {facts['weights']}. The saved weights were loaded again for every figure."
        ]
        if "accuracy" in self.table and np.isfinite(last["accuracy"]):
            where = "held out" if facts["held_out"] else "of the training, as none are held out"
            said.append(f"It puts {last['accuracy']:.1%} of the preferences {where} in the right order.")
        if "chosen" in self.table:
            said.append(
                f"The chosen answers changed by {last['chosen']:+.2f} nats against the reference, the "
                f"rejected by {last['rejected']:+.2f}."
            )
        if "kl" in self.table:
            said.append(
                f"On its own samples it is {last['kl']:.2f} nats per answer from the reference; entropy went "
                f"from {first['entropy']:.3f} to {last['entropy']:.3f} nats per token, length from "
                f"{first['length']:.1f} to {last['length']:.1f} tokens."
            )
        if "reward" in self.table:
            said.append(f"Mean reward went from {first['reward']:+.3f} to {last['reward']:+.3f}.")
        return said

    def figure(self) -> go.Figure:
        """Reward against KL where there is a reward, else KL by step; of a reward model, accuracy by step."""
        from veridical.reporting import figures

        frame, drawn = self.to_frame(), figures.figure()
        by_kl = "reward" in frame
        column = "reward" if by_kl else "kl" if "kl" in frame else "accuracy"
        figures.line_with_band(
            drawn, frame["kl" if by_kl else "step"].tolist(), frame[column], frame.get(f"{column}_low"),
            frame.get(f"{column}_high"), name=NAMES[column], hover=[f"step {step}" for step in frame["step"]],
        )  # fmt: skip
        return figures.style(
            drawn, title=f"{self.facts['method'].upper()} of {self.facts['model']}",
            x=NAMES["kl"] if by_kl else "step", y=NAMES[column],
        )  # fmt: skip

    def report_section(self) -> Section:
        """Findings, the curve, the table, and some answers side by side."""
        from veridical.reporting.section import Section

        tables = [("Every checkpoint", self.to_frame().round(4))]
        if len(self.samples):
            tables.append(("Answers to the same prompts, first and last", self._side_by_side().head(12)))
        return Section(
            title=f"{self.facts['method'].upper()} of {self.facts['model']}",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),),
            tables=tuple(tables),
        )

    def _side_by_side(self) -> pd.DataFrame:
        steps = self.table["step"]
        first, last = (self.at(step) for step in (steps.iloc[0], steps.iloc[-1]))
        return pd.DataFrame(
            {"prompt": first["prompt"], "reference": first["answer"], "policy": last["answer"]}
        )

    def made_by(self) -> dict[str, Any]:
        """Seed, model and fingerprints, for the provenance."""
        names = ("seed", "method", "model", "model_fingerprint", "data", "data_fingerprint", "options")
        return {name: self.facts[name] for name in names}

    def __repr__(self) -> str:
        last = self.table.iloc[-1]
        said = ", ".join(f"{name} {last[name]:.3g}" for name in self.table.columns if name != "step")
        what = f"{self.facts['method']} of {self.facts['model']}"
        return f"PreferenceRun({what}, {len(self.table)} checkpoints: {said})"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.to_frame().round(4).to_html(index=False, border=0))


def averages(samples: pd.DataFrame) -> dict[str, float]:
    """Means over the answers of one checkpoint."""
    return {name: float(np.mean(samples[name].to_numpy(float))) for name in AVERAGED if name in samples}


def interval(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % interval of the mean over resampled prompts."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)
