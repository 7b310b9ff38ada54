"""The two runs that an attribution compares, in batches: where gradients are taken, and what is put in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.interventions.condition import Direction, check_count, check_direction, warn_of_training
from veridical.interventions.inputs import Inputs
from veridical.interventions.metrics import Metric, as_metric

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


@dataclass(frozen=True)
class Batch:
    """Some rows of both runs.

    Attributes:
        rows: Their numbers among all examples.
        base: Inputs of the run around which the model is linearised.
        source: Inputs of the run whose activations are put in.
        clean: Inputs of the clean run, whichever of the two it is.
        valid: `[batch, pos]` bool, base positions that have a source position.
        matched: `[batch, pos]` int64, that position; 0 where there is none.
        aligned: Whether any position goes with another one than its own.
    """

    rows: Tensor
    base: dict[str, Tensor]
    source: dict[str, Tensor]
    clean: dict[str, Tensor]
    valid: Tensor
    matched: Tensor
    aligned: bool

    @property
    def first_difference(self) -> int:
        """The first column in which any row has another token in the one run than in the other."""
        same = [self.base[name] == self.source[name] for name in ("input_ids", "attention_mask")]
        differs = ~torch.stack(same).all(0).all(0)
        found = differs.nonzero().flatten()
        if self.aligned:
            return 0
        return int(found[0]) if len(found) else len(differs) - 1

    def of_source(self, value: Tensor) -> Tensor:
        """A source value `[batch, pos, ...]` with each base position's partner at that position."""
        if not self.aligned:
            return value
        index = self.matched.to(value.device).view(*self.matched.shape, *[1] * (value.dim() - 2))
        return value.gather(1, index.expand(-1, -1, *value.shape[2:]))

    def where(self, value: Tensor) -> Tensor:
        """`valid` in the number of dimensions of a value `[batch, pos, ...]`, on its device."""
        return self.valid.to(value.device).view(*self.valid.shape, *[1] * (value.dim() - 2))

    def change(self, base: Tensor, source: Tensor) -> Tensor:
        """Source less base, 0 where there is no partner; in float32 at least."""
        exact = torch.promote_types(base.dtype, torch.float32)
        difference = self.of_source(source).to(exact) - base.to(exact)
        return difference.masked_fill(~self.where(difference), 0)


@dataclass(frozen=True)
class Runs:
    """All rows, and the metric that they are judged by.

    Attributes:
        inputs: Clean and corrupt; twice the same where there is no corrupt run.
        metric: Of all rows.
        direction: "denoising": base is corrupt, clean goes in; "noising" the reverse.
        alone: There is no corrupt run.
        batch_tokens: Positions of one batch, padding included.
    """

    inputs: Inputs
    metric: Metric
    direction: Direction
    alone: bool
    batch_tokens: int

    @classmethod
    def of(
        cls,
        model: HookedModel,
        clean: Any,
        corrupt: Any,
        metric: Any,
        *,
        answers: Any = None,
        wrong: Any = None,
        keep: int | None = None,
        align: Any = None,
        direction: Direction = "denoising",
        batch_tokens: int = 4096,
    ) -> Runs:
        """Inputs and metric after every check; see `veridical.interventions.attribute`."""
        check_direction(direction)
        check_count("batch_tokens", batch_tokens)
        inputs = Inputs.of(model, clean, clean if corrupt is None else corrupt, align)
        if corrupt is None:
            inputs = _without_partner(inputs)
        judged = as_metric(metric, model, answers, wrong, keep=keep, inputs=inputs)
        if not judged.differentiable:
            raise InputError(
                f"metric {judged.name!r} counts tokens and has no gradient; use 'logit_diff', 'logprob' or "
                "'prob', or patch with it"
            )
        warn_of_training(model)
        return cls(inputs, judged, direction, corrupt is None, batch_tokens)

    @property
    def pair(self) -> Inputs:
        """Inputs with the base run as `clean` and the source run as `corrupt`."""
        return self.inputs if self.direction == "noising" or self.alone else self.inputs.swapped()

    def batches(self) -> Iterator[Batch]:
        """Rows in order; one batch of all for a function of your own, which sees all rows at once."""
        pair, total = self.pair, len(self.inputs)
        step = max(1, self.batch_tokens // max(1, pair.width))
        if self.metric.targets is None and self.metric.site is None and self.metric.name != "kl":
            step = total
        places = torch.arange(pair.width, device=pair.matched.device)
        for first in range(0, total, step):
            part = slice(first, first + step)
            matched = pair.matched[part]
            valid = (matched >= 0) & pair.mask[part]
            yield Batch(
                rows=torch.arange(total)[part],
                base=_rows(pair.clean, part),
                source=_rows(pair.corrupt, part),
                clean=_rows(self.inputs.clean, part),
                valid=valid,
                matched=matched.clamp(min=0),
                aligned=bool((valid & (matched != places)).any()),
            )

    def metric_for(self, model: HookedModel, batch: Batch) -> Metric:
        """The metric of a batch's rows; a "kl" is from the batch's clean run."""
        from veridical.interventions.gradients import measure

        taken = self.metric.take(batch.rows, len(self.inputs))
        if taken.name != "kl" or taken.function is not None:
            return taken
        plain = Metric("reference", lambda logits: logits[:, -1].sum(-1))
        return taken.with_reference(measure(model, batch.clean, plain)[1].logits)

    def labels(self) -> list[list[str]]:
        """Text at each base position; where the other run has another token, both: "clean | corrupt"."""
        pair, said = self.pair, []
        for row, (own, other) in enumerate(zip(pair.tokens, pair.corrupt_tokens)):
            line = []
            for at, text in enumerate(own):
                partner = int(pair.matched[row, at])
                theirs = other[partner] if partner >= 0 else text
                both = (text, theirs) if self.direction == "noising" else (theirs, text)
                line.append(text if theirs == text else " | ".join(both))
            said.append(line)
        return said


def _rows(inputs: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    # A tensor from inference mode cannot be part of a graph; its copy can.
    return {
        name: value[part].clone() if value.is_inference() else value[part] for name, value in inputs.items()
    }


def rows_of(inputs: dict[str, Tensor], copies: int) -> dict[str, Tensor]:
    """Inputs with all rows `copies` times, one copy after the other."""
    return {name: value.repeat(copies, *[1] * (value.dim() - 1)) for name, value in inputs.items()}


def _without_partner(inputs: Inputs) -> Inputs:
    # The completions of one set of pairs are the right answers; wrong ones come from a corrupt set.
    return replace(inputs, wrong=None)
