"""A trained adapter: a plain LoRA, what it was measured to do, and how it acts on a model."""

from __future__ import annotations

import contextlib
import html
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from veridical.errors import InputError
from veridical.probes.fits import MismatchError
from veridical.saved_result import Saved
from veridical.steering.lora import LoRA, lora_scaled, peft_config, put_on
from veridical.steering.reft import ReFT

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.reporting.section import Section


@dataclass(frozen=True, repr=False)
class AdapterReport(Saved):
    """What an adapter was measured to do.

    Attributes:
        table: `measure`, `plain`, `adapted`, `change`, `low`, `high` (95 % interval of the adapted value),
        `n`. dial: Of `veridical.steering.dial.dial`.
        looks: Looks at the training on validation pairs: `step`, `shown`, `margin`, `kl`, `kept`.
        log: Losses, KL and multiplier of every step.
        facts: Model, data, options, fingerprints; `kl`, `kl_budget`, `met`, `scale`, `range`, `norm`,
            `notes`.
    """

    table: pd.DataFrame
    dial: pd.DataFrame
    looks: pd.DataFrame
    log: pd.DataFrame
    facts: Mapping[str, Any]

    @property
    def met(self) -> bool:
        """Whether the training kept to its budget; if not, the adapter was scaled down until it does."""
        return bool(self.facts["met"])

    def to_frame(self) -> pd.DataFrame:
        """`table`."""
        return self.table.copy()

    def value(self, measure: str) -> pd.Series:
        """The line of one measure.

        Raises:
            UnknownNameError: No such measure.
        """
        from veridical.errors import unknown

        found = self.table[self.table["measure"] == measure]
        if not len(found):
            raise unknown("measure", measure, self.table["measure"])
        return found.iloc[0]

    def findings(self) -> list[str]:
        """What it does, in sentences."""
        facts, low_high = self.facts, self.facts["range"]
        said = [
            f"{facts['objective']} on {facts['model']}: {facts['trained']} pairs of {facts['data']}, "
            f"LoRA of rank {facts['rank']} on {facts['modules']} modules, {facts['steps']} steps in "
            f"{facts['seconds']:.0f} s; Frobenius norm of the change {facts['norm']:.2f}, "
            f"{facts['relative_norm']:.1%} of the weights that it changes."
        ]
        first = self.table.iloc[0]
        said.append(
            f"{first['measure']}: {first['plain']:.3f} without, {first['adapted']:.3f} with the adapter "
            f"(n = {int(first['n'])})."
        )
        said.append(
            f"KL on neutral text {facts['kl']:.4f} nats a token; the budget was {facts['kl_budget']:g}."
            + ("" if self.met else f" Training did not keep to it: it was scaled to {facts['scale']:.3g}.")
        )
        said.append(f"Monotone from strength {low_high[0]:g} to {low_high[1]:g}, as measured.")
        return said + list(facts["notes"])

    def figure(self) -> go.Figure:
        """The dial: behaviour and neutral KL against strength."""
        from veridical.reporting import figures

        drawn = figures.figure()
        table: Any = self.dial
        for column, name in (
            ("target", str(self.facts["target"])),
            ("kept", str(self.facts["kept"])),
            ("kl", "KL on neutral text, nats a token"),
        ):
            if table[column].notna().all():
                figures.line_with_band(
                    drawn, table["strength"].tolist(), table[column], None, None, name=name
                )
        return figures.style(drawn, title="Strength dial", x="strength", y="share of rows; nats a token")

    def report_section(self) -> Section:
        """Findings, the dial and the tables."""
        from veridical.reporting.section import Section

        first = self.table.iloc[0]
        return Section(
            title=f"Adapter: {self.facts['objective']} on {self.facts['model']}",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),),
            tables=(
                ("Measured on held-out rows", self.table.round(4)),
                ("By strength", self.dial.round(4)),
                ("Looks at the training", self.looks.round(4)),
            ),
            headline=((f"{first['measure']} (without: {first['plain']:.0%})", f"{first['adapted']:.0%}"),),
        )

    def made_by(self) -> dict[str, Any]:
        """Seed, model and fingerprints, for the provenance."""
        names = ("seed", "objective", "model", "model_fingerprint", "data", "data_fingerprint", "options")
        return {name: self.facts.get(name) for name in names}

    def __repr__(self) -> str:
        first = self.table.iloc[0]
        return (
            f"AdapterReport({first['measure']} {first['plain']:.3f} -> {first['adapted']:.3f}, "
            f"KL {self.facts['kl']:.4f} of {self.facts['kl_budget']:g})"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.table.round(4).to_html(index=False, border=0))


class Adapter:
    """A plain LoRA with its report; acts on the model that it was trained on.

    Attributes:
        lora: Its weights and PEFT's config.
        report: What it was measured to do.
        test: The rows that the report is of, for the proof on export.
    """

    name = "adapter"

    def __init__(self, lora: LoRA | ReFT, report: AdapterReport, test: Pairs | None = None) -> None:
        self.lora, self.report, self.test = lora, report, test

    def __repr__(self) -> str:
        return f"Adapter({self.lora}, {self.report})"

    @property
    def range(self) -> tuple[float, float]:
        """Strengths over which its dial was measured to be monotone."""
        low, high = self.report.facts["range"]
        return float(low), float(high)

    def __call__(
        self, model: HookedModel, strength: float = 1.0, *, merged: bool = True
    ) -> contextlib.AbstractContextManager[None]:
        """The model with the adapter at a strength, while the context lasts; afterwards as before, to the
        bit.

        Args:
            model: The model that it was trained on, plain.
            strength: 1 is as trained, 0 nothing, negative the other way.
            merged: Add it to the weights (as fast as the plain model); else PEFT's layers run beside them.

        Raises:
            InputError: A strength that is not finite.
            MismatchError: Another model, by its fingerprint.
        """
        if not math.isfinite(strength):
            raise InputError(f"strength is {strength}; expected a finite number")
        self.check_base(model)
        low, high = self.range
        if not low <= strength <= high:
            warnings.warn(
                f"strength {strength:g} is outside {low:g} to {high:g}, the range that this adapter was "
                f"measured to be monotone in; {self._nearest(strength)}",
                stacklevel=2,
            )
        return self.on(model, strength, merged=merged)

    @contextlib.contextmanager
    def on(self, model: HookedModel, strength: float = 1.0, *, merged: bool = True) -> Iterator[None]:
        """As a call, without its checks."""
        if merged or strength == 0 or isinstance(self.lora, ReFT):
            with self.lora.on(model, strength):
                yield
        else:
            config = peft_config(self.lora)
            with put_on(model.model, config, self.lora.tensors) as adapted, lora_scaled(adapted, strength):
                yield

    def check_base(self, model: HookedModel) -> None:
        """Refuses a model that is not the one the adapter was trained on.

        Raises:
            MismatchError: Another fingerprint; on other weights its effect is unknown.
        """
        own, found = self.report.facts, model.fingerprint()
        if found != own["model_fingerprint"]:
            raise MismatchError(
                f"this adapter was trained on {own['model']} (fingerprint {own['model_fingerprint'][:12]}), "
                f"not on {model.path} (fingerprint {found[:12]}); on other weights its effect is unknown"
            )

    def save(self, folder: str | Path, model: HookedModel | None = None) -> Path:
        """Writes a PEFT folder with card, report and data, once its effect was proved from the files.

        Args:
            folder: A new folder, or one that an adapter was saved in.
            model: The base; loaded by its name when not given.

        Raises:
            ModelError: Loaded by plain PEFT in a fresh process, it does not do what it was measured to do.
        """
        from veridical.steering.export import save_adapter

        return save_adapter(self, folder, model)

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """What `save` wrote.

        Raises:
            InputError: No adapter there.
            DamagedFileError: A file that is not as it was written.
        """
        from veridical.steering.export import load_adapter

        return load_adapter(folder)

    def report_section(self) -> Section:
        """The report's section."""
        return self.report.report_section()

    def _nearest(self, strength: float) -> str:
        table = self.report.dial
        line = table.iloc[(table["strength"] - strength).abs().argmin()]
        return (
            f"nearest measured: strength {line['strength']:g} with {self.report.facts['target']} "
            f"{line['target']:.3f} and a KL of {line['kl']:.4f} nats a token"
        )
