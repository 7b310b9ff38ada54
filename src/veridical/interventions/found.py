"""Scores of nodes as they come in, batch by batch, and the result that they make."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from veridical.errors import NonFiniteError
from veridical.interventions.attribution import Attribution
from veridical.interventions.runs import Runs
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


class Found:
    """Scores as they come in, batch by batch."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, values: Tensor) -> None:
        """Rows of one quantity; names that begin with ":" are no sites."""
        self.parts[name].append(values.detach().cpu())

    def joined(self, name: str) -> np.ndarray | None:
        """All rows of a quantity; None if none came."""
        return torch.cat(self.parts[name]).numpy() if name in self.parts else None

    def result(self, model: HookedModel, runs: Runs, method: str, sites: Sequence[Site]) -> Attribution:
        """The attribution that these scores make.

        Raises:
            NonFiniteError: A real position has NaN.
        """
        absent = torch.cat([~batch.valid for batch in runs.batches()]).cpu().numpy()
        scores = {}
        for site in sites:
            values = self.joined(site.name)
            assert values is not None
            if not np.isfinite(values[~absent]).all():
                raise NonFiniteError(
                    f"{model.path} gives NaN or infinity in its values or gradients at {site.short}"
                )
            values[absent] = np.nan
            scores[site.short] = values
        gaps = {site.short: self.joined(f":gap {site.name}") for site in sites}
        totals = {site.short: self.joined(f":total {site.name}") for site in sites}
        return Attribution.of(
            model,
            runs,
            method,
            scores=scores,
            base_metric=self.joined(":base"),
            source_metric=self.joined(":source"),
            gaps={name: gap for name, gap in gaps.items() if gap is not None},
            totals={name: total for name, total in totals.items() if total is not None},
        )
