"""Where an SAE came from: what it reads, on what it was trained, and how it scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SAEOrigin:
    """What a card must say of an SAE.

    Attributes:
        model: Name or path of the model whose activations it was trained on.
        model_fingerprint: `HookedModel.fingerprint()` of that model.
        data_fingerprint: Fingerprint of the activations.
        tokens: The token selection that the activations were collected with.
        trained_on: Tokens that it was trained on.
        metrics: Figures on held-out rows, with the ends of their intervals.
        notes: Plain sentences on what the figures do and do not show.
        source: Where it was read from, for an SAE of another library.
    """

    model: str | None = None
    model_fingerprint: str | None = None
    data_fingerprint: str | None = None
    tokens: str | None = None
    trained_on: int | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> SAEOrigin:
        """The reverse of `to_dict`."""
        return cls(**{**saved, "notes": tuple(saved["notes"])})
