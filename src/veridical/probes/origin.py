"""Where a fitted probe came from: what it reads, on which rows, and how it scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Origin:
    """What a card must say of a probe.

    Attributes:
        site: The site it reads; None for a probe that was fitted by hand.
        tokens: The token selection that the activations were collected with.
        target: Label column that it predicts.
        where: Conditions on the rows that it was fitted on.
        model: Name or path of the model.
        model_fingerprint: `HookedModel.fingerprint()` of the model that the activations came from.
        data_fingerprint: Fingerprint of the activations.
        metrics: Figures on held-out pairs, with intervals, and the controls.
        rows: Counts of rows and pairs for fitting and test, and what was left out.
        notes: Plain sentences on what the figures do and do not show.
        seed: Seed of folds, bootstraps and shuffles.
        thresholds: Decision values above which the probe calls a row positive, set on out-of-fold scores of
            the fitted pairs: `balanced` (recall plus specificity largest) and `fpr1` (1 % of the negatives
            above it). Empty for a probe that was fitted by hand.
        calibration: `slope` and `intercept` of Platt's curve on the decision values, from the same scores.
    """

    site: str | None = None
    tokens: str | None = None
    target: str | None = None
    where: tuple[str, ...] = ()
    model: str | None = None
    model_fingerprint: str | None = None
    data_fingerprint: str | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    rows: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seed: int | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, float] = field(default_factory=dict)

    def said(self) -> str:
        """Label, site and AUROC in a few words."""
        auroc, low, high = (self.metrics.get(f"auroc{end}") for end in ("", "_low", "_high"))
        figure = "" if auroc is None else f", AUROC {auroc:.3f}"
        spread = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        return f"{self.target} at {self.site}{figure}{spread}"

    def facts(self) -> dict[str, Any]:
        """Seed, model and fingerprints, for the provenance of what is saved."""
        return {
            "seed": self.seed,
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "data_fingerprint": self.data_fingerprint,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Origin:
        """The reverse of `to_dict`."""
        return cls(**{**saved, "where": tuple(saved["where"]), "notes": tuple(saved["notes"])})
