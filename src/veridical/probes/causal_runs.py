"""Many runs of a model over the same rows, each with one edit along a direction at one site.

What comes before the first edited token is the same in every run. Where the model keeps a key/value cache it
is computed once for each batch, and each run goes on from a copy of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from veridical import scoring
from veridical.errors import InputError, ModelError, NonFiniteError

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

At = Literal["prompt_last", "prompt", "completion", "all"]
"""Tokens to edit: the last of the prompt, all of the prompt, the given ones of the answer, or all."""
Edit = tuple[float, int]
"""Strength (NaN ablates) and number of the direction (-1: no edit)."""


class Runs:
    """A model, rows with answers, a site, and directions to edit along.

    Attributes:
        means: `[k]` float64, mean of the unedited activations along each direction, over the edited tokens.
        unit: Their standard deviation along the first direction.
        mean_norm: Their mean norm.
    """

    def __init__(
        self, model: HookedModel, site: str, plan: scoring.Plan, at: At, directions: np.ndarray
    ) -> None:
        self.model, self.site, self.plan = model, site, plan
        self.directions = torch.as_tensor(directions, dtype=torch.float32)
        self.masks = [_chosen(plan, batch, at) for batch in plan.batches]
        self.weights = _row_weights(plan, at)
        if not any(bool(mask.any()) for mask in self.masks):
            raise InputError(
                f"there is no token to edit with at={at!r}: every answer has one token, which is only "
                "predicted; use at='prompt_last'"
            )
        self.means, self.unit, self.mean_norm = self._statistics()

    def run(self, edits: Sequence[Edit], progress: bool | None = None) -> list[list[np.ndarray]]:
        """For every edit the log-probabilities of each row's answers.

        Raises:
            NonFiniteError: The model gives NaN; says after which edit.
            ModelError: An edit changed nothing, to the last bit, beside the run without one.
        """
        from veridical.progress import bar

        sums = np.zeros((len(edits), len(self.plan.scored)))
        with bar(len(edits) * len(self.masks), "edits", "batches", progress) as shown:
            for batch, mask in zip(self.plan.batches, self.masks):
                forward = self._prepared(batch, mask)
                for number, edit in enumerate(edits):
                    scoring.read_off(self.plan, batch, forward(edit), sums[number])
                    shown.update(1)
        clean = next((sums[number] for number, edit in enumerate(edits) if edit[1] < 0), None)
        for found, (strength, which) in zip(sums, edits):
            if not np.isfinite(found).all():
                raise NonFiniteError(f"{self.model.path} gives NaN after {_said(strength)} at {self.site}")
            if which >= 0 and strength != 0 and clean is not None and np.array_equal(found, clean):
                raise ModelError(
                    f"{_said(strength)} at {self.site} changed no log-probability, to the last bit: nothing "
                    "that comes after reads the edited tokens there"
                )
        return [self.plan.split(found) for found in sums]

    def _statistics(self) -> tuple[Tensor, float, float]:
        """How the unedited activations lie along the directions, at the tokens that will be edited."""
        along, norms, weights = [], [], []

        def read(value: Tensor, mask: Tensor, counts: Tensor) -> None:
            x = value.reshape(*value.shape[:2], -1)[mask.to(value.device)].double()
            along.append((x @ self.directions.to(x.device, torch.float64).T).cpu())
            norms.append(x.norm(dim=-1).cpu())
            weights.append(counts[:, None].expand(mask.shape)[mask])

        for batch, mask in zip(self.plan.batches, self.masks):
            counts = self.weights[batch]
            with torch.no_grad():
                reading = {self.site: lambda x, mask=mask, counts=counts: read(x, mask, counts)}
                self.model.run(self._inputs(batch), read=reading, stop=True)
        lengths, share = torch.cat(along), torch.cat(weights) / torch.cat(weights).sum()
        means = share @ lengths
        unit = float((share @ (lengths[:, 0] - means[0]).square()).sqrt())
        norm = float(share @ torch.cat(norms))
        if not np.isfinite([unit, norm]).all():
            raise NonFiniteError(f"{self.model.path} gives NaN or infinity at {self.site} on these rows")
        if unit <= 1e-9 * norm:
            raise InputError(f"the activations at {self.site} do not vary along the direction on these rows")
        return means, unit, norm

    def _inputs(self, batch: list[int]) -> dict[str, Any]:
        return self.model.batch([self.plan.rows[row] for row in batch], padding_side="left")

    def _prepared(self, batch: list[int], mask: Tensor) -> Callable[[Edit], Tensor]:
        """A function from an edit to the logits at the last positions of a batch."""
        model, inputs = self.model, self._inputs(batch)
        count = scoring.positions(self.plan, batch)
        columns = mask.any(0).nonzero()
        # The tokens that predict an answer must be in the part that is run again.
        cut = min(int(columns[0]) if len(columns) else mask.shape[1], mask.shape[1] - count)
        taken = {"past_key_values", "use_cache"} <= model.forward_parameters and model.generates
        cache = self._prefix(inputs, cut) if taken and cut > 0 else None
        if cache is None:
            cut = 0
        tail = {k: v[:, cut:] if k != "attention_mask" else v for k, v in inputs.items()}
        if "logits_to_keep" in model.forward_parameters:
            tail["logits_to_keep"] = count
        mask = mask[:, cut:].to(model.device)

        def forward(edit: Edit) -> Tensor:
            given = dict(tail)
            if cache is not None:
                given |= {"past_key_values": copy.deepcopy(cache), "use_cache": True}
            write = {} if edit[1] < 0 else {self.site: lambda value: self._edited(value, mask, edit)}
            with torch.no_grad():
                return model.run(given, write=write).logits[:, -count:]

        return forward

    def _prefix(self, inputs: dict[str, Any], cut: int) -> Any:
        """The key/value cache after the first `cut` tokens; None from a model that gives none."""
        given = {name: value[:, :cut] for name, value in inputs.items()}
        if "logits_to_keep" in self.model.forward_parameters:
            given["logits_to_keep"] = 1
        with torch.no_grad():
            output = self.model.run({**given, "use_cache": True}).output
        return getattr(output, "past_key_values", None)

    def _edited(self, value: Tensor, mask: Tensor, edit: Edit) -> Tensor:
        strength, which = edit
        flat = value.reshape(*value.shape[:2], -1)
        x, u = flat.float(), self.directions[which].to(flat.device)
        if np.isnan(strength):
            new = x - ((x @ u) - float(self.means[which]))[..., None] * u
        else:
            new = x + strength * self.unit * u
        return torch.where(mask.to(flat.device)[..., None], new.to(flat.dtype), flat).reshape(value.shape)


def _chosen(plan: scoring.Plan, batch: list[int], at: At) -> Tensor:
    """`[rows, tokens]` bool: the tokens to edit in a batch that is padded on the left."""
    ends = plan.prompt_tokens()
    width = max(len(plan.rows[row]) for row in batch)
    mask = torch.zeros(len(batch), width, dtype=torch.bool)
    for place, row in enumerate(batch):
        start = width - len(plan.rows[row])
        border = start + ends[row]
        spans = {"prompt_last": (border - 1, border), "prompt": (start, border)}
        low, high = {**spans, "completion": (border, width), "all": (start, width)}[at]
        mask[place, low:high] = True
    return mask


def _row_weights(plan: scoring.Plan, at: At) -> Tensor:
    """How often each input row counts: a prompt counts once, however many rows its answers take."""
    if at in ("completion", "all"):
        return torch.ones(len(plan.rows), dtype=torch.float64)
    weights = torch.zeros(len(plan.rows), dtype=torch.float64)
    for first in np.cumsum([0, *plan.counts[:-1]]):
        weights[plan.scored[int(first)].row] += 1
    return weights


def _said(strength: float) -> str:
    return "ablating the direction" if np.isnan(strength) else f"adding {strength:+g} standard deviations"
