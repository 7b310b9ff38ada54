"""MCC: how well a dictionary finds features that were planted, one latent for each feature.

The mean of the cosines between planted features and the latents that are matched to them, one to one, so
that the sum of cosines is largest (Hungarian matching, `scipy.optimize.linear_sum_assignment`). One to one
matters: with each feature's nearest latent (the mean maximum cosine of Sharkey, Braun and Millidge 2022) a
latent that sits between two features counts for both, and a dictionary that found half of them can look
nearly whole. Decoder norms play no part. A cosine is signed, since a latent adds its direction and never
takes it away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section
    from veridical.saes.base import SAE

FOUND = 0.9
"""Cosine above which a planted feature counts as found."""


@dataclass(frozen=True, repr=False)
class Matching:
    """Planted features and the latents matched to them.

    Attributes:
        latents: `[planted]`, the latent of each feature; -1 where there are fewer latents than features.
        cosines: `[planted]`, its cosine with the feature; 0 where there is none.
        nearest: `[planted]`, the largest cosine of any latent with the feature, shared or not.
    """

    latents: np.ndarray
    cosines: np.ndarray
    nearest: np.ndarray

    @property
    def mcc(self) -> float:
        """Mean cosine over all planted features; one without a latent counts as 0."""
        return float(self.cosines.mean())

    @property
    def found(self) -> float:
        """Share of planted features whose latent has a cosine above 0.9."""
        return float((self.cosines > FOUND).mean())

    def to_frame(self) -> pd.DataFrame:
        """One line per planted feature."""
        return pd.DataFrame(
            {
                "feature": np.arange(len(self.latents)),
                "latent": self.latents,
                "cosine": self.cosines,
                "nearest": self.nearest,
            }
        )

    def figure(self) -> go.Figure:
        """The cosines from best to worst, matched one to one and each with its nearest latent."""
        from veridical.reporting.figures import BLUE, GREY, figure, line_with_band, style

        drawn, order = figure(), np.arange(1, len(self.cosines) + 1)
        line_with_band(
            drawn, order.tolist(), np.sort(self.cosines)[::-1], name="matched one to one", colour=BLUE,
            markers=False,
        )  # fmt: skip
        line_with_band(
            drawn, order.tolist(), np.sort(self.nearest)[::-1], name="nearest latent", colour=GREY,
            dash="dot", markers=False,
        )  # fmt: skip
        title = f"Planted features: mean matched cosine {self.mcc:.3f}, {self.found:.0%} above {FOUND}"
        return style(drawn, title, "planted feature, best first", "cosine", y_range=(-0.02, 1.02))

    def report_section(self) -> Section:
        """Figure and the worst matches."""
        from veridical.reporting.section import Section

        worst = self.to_frame().nsmallest(20, "cosine").round(3)
        return Section(
            title="Planted features found",
            text=f"{self!r}. Matched one to one by the largest sum of cosines.",
            figures=(self.figure(),),
            tables=(("The worst matches", worst),),
            headline=(("MCC", f"{self.mcc:.3f}"),),
        )

    def __repr__(self) -> str:
        return (
            f"Matching(MCC {self.mcc:.3f} over {len(self.cosines)} planted features, {self.found:.0%} found "
            f"above {FOUND})"
        )


def match_features(dictionary: Tensor | SAE, planted: Tensor) -> Matching:
    """Matches latents to planted features one to one.

    Args:
        dictionary: Decoder directions `[latents, d]` of any length, or an SAE, for its `W_dec`.
        planted: The features' directions `[planted, d]`, of any length but 0.

    Raises:
        InputError: Shapes that do not fit, or a planted feature of length 0.
        NonFiniteError: NaN or infinity on either side.
    """
    rows = _rows(getattr(dictionary, "W_dec", dictionary), "the dictionary")
    truth = _rows(planted, "the planted features")
    if rows.shape[1] != truth.shape[1]:
        raise InputError(
            f"the dictionary has width {rows.shape[1]}, the planted features {truth.shape[1]}; expected one "
            "width"
        )
    if not bool((truth.norm(dim=1) > 0).all()):
        raise InputError("a planted feature has length 0; leave it out")
    # A latent of length 0 points nowhere: its cosine is 0 with everything.
    cosines = (_unit(truth) @ _unit(rows).T).numpy()
    latents, matched = np.full(len(truth), -1), np.zeros(len(truth))
    features, chosen = _assign(cosines)
    latents[features], matched[features] = chosen, cosines[features, chosen]
    return Matching(latents, matched, cosines.max(1))


def _assign(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cosines, maximize=True)


def _unit(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1)


def _rows(values: Any, what: str) -> Tensor:
    rows = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if rows.dim() != 2 or 0 in rows.shape:
        raise InputError(f"{what} have shape {tuple(rows.shape)}; expected [rows, d], one SAE at a time")
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError(f"{what} hold NaN or infinity")
    return rows
