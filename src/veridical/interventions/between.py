"""Clean and corrupt runs of the same rows with everything that lies between: what edge patching is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from veridical.errors import InputError
from veridical.interventions.condition import (
    Direction,
    check_count,
    check_direction,
    check_finite,
    warn_of_training,
    warn_of_twins,
)
from veridical.interventions.graph import Graph
from veridical.interventions.inputs import Inputs
from veridical.interventions.metrics import as_metric
from veridical.interventions.rewire import Rewiring
from veridical.models import load
from veridical.probes.evaluate import resample_weights
from veridical.provenance import fingerprint

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


class Between:
    """A model, its clean and corrupt rows, and a metric.

    Attributes:
        model: The model.
        graph: Its nodes and edges.
        inputs: The rows.
        metric: What is measured.
        positions: Which tokens are patched, in words.
        direction: "denoising" patches the clean run into the corrupt one, "noising" the reverse.
        at: `[rows, pos]` bool, positions of the base run that are patched.
    """

    def __init__(
        self,
        model: HookedModel | nn.Module,
        clean: Any,
        corrupt: Any,
        metric: Any,
        *,
        direction: Direction = "denoising",
        positions: int | Sequence[int] | None = None,
        keep: int | None = None,
        answers: Any = None,
        wrong: Any = None,
        align: Any = None,
        batch_tokens: int = 8192,
    ) -> None:
        check_direction(direction)
        check_count("batch_tokens", batch_tokens)
        self.model = model = load(model)
        warn_of_training(model)
        self.graph = Graph.of(model)
        self.inputs = Inputs.of(model, clean, corrupt, align)
        warn_of_twins(self.inputs)
        self.direction: Direction = direction
        self.positions = "all" if positions is None else str(positions)
        self.batch_tokens = batch_tokens
        self.metric = as_metric(metric, model, answers, wrong, keep=keep, inputs=self.inputs)
        self.metric.check(len(self.inputs))
        if self.metric.name == "kl" and self.metric.function is None:
            self.metric = self.metric.with_reference(self._clean_logits())
        base = self.inputs if direction == "noising" else self.inputs.swapped()
        self._base = base
        chosen = chosen_positions(self.inputs.mask, positions) & (self.inputs.matched >= 0)
        if direction == "denoising":
            rows, places = chosen.nonzero(as_tuple=True)
            chosen = torch.zeros_like(chosen)
            chosen[rows, self.inputs.matched[rows, places]] = True
        self.at = chosen & base.mask
        if not bool(self.at.any()):
            raise InputError(
                "no position of the clean rows goes with one of the corrupt rows; nothing to patch"
            )
        self._kept: tuple[tuple[int, ...], Rewiring] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def run(self, work: Callable[[Rewiring], Tensor], rows: Sequence[int] | None = None) -> np.ndarray:
        """What `work` gives for each batch of rows, `[..., rows]` float64, all batches joined."""
        with torch.no_grad():
            parts = [work(rewiring).cpu().double().numpy() for rewiring in self.rewirings(rows)]
        return np.concatenate(parts, axis=-1)

    def ends(self, rows: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The metric of the clean and of the corrupt run, `[rows]` each."""
        found = self.run(lambda x: torch.stack([x.base_metric, x.other_metric]), rows)
        base, other = found
        return (base, other) if self.direction == "noising" else (other, base)

    def weights(self, bootstrap: int, seed: int, rows: Sequence[int] | None = None) -> np.ndarray:
        """How often each row counts in each resample of whole pairs, `[bootstrap, rows]`; no resamples where
        all rows are of one pair."""
        groups = np.arange(len(self)) if self.inputs.groups is None else np.asarray(self.inputs.groups)
        groups = groups if rows is None else groups[list(rows)]
        if len(np.unique(groups)) < 2 or bootstrap < 1:
            return np.zeros((0, len(groups)), np.uint8)
        return resample_weights(groups, bootstrap, seed)

    def facts(self, seed: int) -> dict[str, Any]:
        """What a result says of where it comes from."""
        data = [
            part
            for side in (self.inputs.clean, self.inputs.corrupt)
            for name in sorted(side)
            for part in (name, side[name].cpu().numpy().tobytes())
        ]
        return {
            "model": self.model.path,
            "model_fingerprint": self.model.fingerprint(),
            "data_fingerprint": fingerprint(data),
            "metric": self.metric.name,
            "unit": self.metric.unit,
            "positions": self.positions,
            "seed": seed,
        }

    def batches(self, rows: Sequence[int] | None = None) -> list[list[int]]:
        """Rows that run together: all for a function that sees every row, else as `batch_tokens` allows."""
        numbers = list(range(len(self))) if rows is None else list(rows)
        own = self.metric.targets is None and self.metric.site is None
        size = len(numbers) if own else max(1, self.batch_tokens // self.inputs.width)
        return [numbers[first : first + size] for first in range(0, len(numbers), size)]

    def rewirings(self, rows: Sequence[int] | None = None) -> Iterator[Rewiring]:
        """The runs of each batch of rows; the last one made is kept."""
        for batch in self.batches(rows):
            if self._kept is None or self._kept[0] != tuple(batch):
                self._kept = None
                self._kept = tuple(batch), self._rewiring(batch)
            yield self._kept[1]

    def _rewiring(self, batch: list[int]) -> Rewiring:
        base, index = self._base, torch.tensor(batch, device=self.at.device)
        made = Rewiring(
            self.model,
            self.graph,
            {name: value[index] for name, value in base.clean.items()},
            {name: value[index] for name, value in base.corrupt.items()},
            self.at[index],
            base.matched[index],
            self.metric.take(index, len(self)),
            self.batch_tokens,
        )
        for values in (made.base_metric, made.other_metric):
            check_finite(self.model, self.metric.name, values)
        return made

    def _clean_logits(self) -> Tensor:
        extra: dict[str, Any] = (
            {"logits_to_keep": 1} if "logits_to_keep" in self.model.forward_parameters else {}
        )
        parts = []
        with torch.no_grad():
            for batch in self.batches():
                given = {name: value[batch] for name, value in self.inputs.clean.items()}
                logits = self.model.run({**given, **extra}).logits
                parts.append(logits if logits.dim() == 2 else logits[:, -1:])
        return torch.cat(parts)


def chosen_positions(mask: Tensor, positions: int | Sequence[int] | None) -> Tensor:
    """`[rows, pos]` bool: each row's tokens of those numbers, negative ones counted from its end.

    Raises:
        InputError: A position outside the text of a row.
    """
    if positions is None:
        return torch.ones_like(mask)
    listed = [positions] if isinstance(positions, int) else list(positions)
    if not listed or not all(isinstance(number, int) and not isinstance(number, bool) for number in listed):
        raise InputError(
            f"positions is {positions!r}; expected token numbers such as [3, -1], or None for all"
        )
    made = torch.zeros_like(mask)
    for row, real in enumerate(mask):
        places = real.nonzero().flatten()
        for number in listed:
            if not -len(places) <= number < len(places):
                raise InputError(
                    f"position {number} lies outside row {row}, which has {len(places)} tokens "
                    f"(0 to {len(places) - 1}, or -{len(places)} to -1)"
                )
            made[row, places[number]] = True
    return made
