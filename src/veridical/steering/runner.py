"""Forward passes of a training: the model with the LoRA at a strength, and the plain one.

Rows are padded on the left, so that what two rows end with alike lies at the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.steering.twins import Row, Tokens, Twin, shared

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.sites import Site

ROOM = 1 << 24
"""Numbers of the plain model that are kept (64 MB in float32); beyond it they are computed again."""


@dataclass(frozen=True)
class Gap:
    """States of one batch of contrasts on what both sides end with: the shared end of the question, and the
    wanted answer.

    Attributes:
        states: `[sites, rows, tokens, width]`, of the model that is trained, under the source prompt.
        source, target: Likewise of the plain model, under the source and the target prompt.
        mask: `[rows, tokens]` bool; False where the two sides are not the same tokens.
    """

    states: Tensor
    source: Tensor
    target: Tensor
    mask: Tensor


class Runner:
    """Passes of a model in training.

    Args:
        model: The handle; its module carries the layers that are trained.
        sites: Sites whose states are read.
        changed: Makes a context in which the trained change acts at a strength; 0 is the plain model.
    """

    def __init__(self, model: HookedModel, sites: Sequence[Site], changed: Any) -> None:
        self.model, self.sites, self.changed = model, list(sites), changed
        self.tokens = Tokens(model)
        self._states: dict[tuple[int, ...], Tensor] = {}
        self._logprobs: dict[tuple[int, ...], float] = {}
        self._room = ROOM

    def gap(self, items: Sequence[Twin], strength: float) -> Gap:
        """States of `items` at `strength`, and what they should move from and to."""
        wanted = [item.wanted for item in items]
        source = self.tokens([item.source for item in items], wanted)
        target = self.tokens([item.target for item in items], wanted)
        ends = [shared(one, other) for one, other in zip(source, target)]
        states = self.states(source, max(ends), strength)
        mask = torch.zeros(len(items), max(ends), dtype=torch.bool, device=states.device)
        for row, end in enumerate(ends):
            mask[row, max(ends) - end :] = True
        return Gap(states, self.plain(source, max(ends)), self.plain(target, max(ends)), mask)

    def states(self, rows: Sequence[Row], tail: int, strength: float) -> Tensor:
        """`[sites, rows, tail, width]`: states at the last `tail` tokens of each row."""
        inputs = self.model.batch([row.ids for row in rows], padding_side="left")
        with self.changed(strength):
            run = self.model.run(inputs, read=self.sites, stop=True)
        found = torch.stack([run.values[site.name][:, -tail:] for site in self.sites])
        short = tail - found.shape[2]
        return torch.nn.functional.pad(found, (0, 0, short, 0)) if short > 0 else found

    def plain(self, rows: Sequence[Row], tail: int) -> Tensor:
        """The plain model's states, likewise; 0 where a row is shorter."""
        new = [row for row in dict.fromkeys(rows) if row.ids not in self._states]
        made: dict[tuple[int, ...], Tensor] = {}
        if new:
            width = max(len(row.ids) for row in new)
            with torch.no_grad():
                found = self.states(new, width, 0.0)
            for at, row in enumerate(new):
                made[row.ids] = found[:, at, width - len(row.ids) :].clone()
            size = sum(value.numel() for value in made.values())
            if size <= self._room:
                self._room -= size
                self._states.update(made)
        kept = [made.get(row.ids, self._states.get(row.ids)) for row in rows]
        shape = (len(self.sites), len(rows), tail, kept[0].shape[-1])  # type: ignore[union-attr]
        out = torch.zeros(shape, dtype=kept[0].dtype, device=kept[0].device)  # type: ignore[union-attr]
        for at, value in enumerate(kept):
            part = value[:, -tail:]  # type: ignore[index]
            out[:, at, tail - part.shape[1] :] = part
        return out

    def logprobs(self, rows: Sequence[Row], strength: float) -> tuple[Tensor, Tensor]:
        """Sum of log p over each row's answer `[rows]`, and the answer's tokens `[rows]`."""
        with self.changed(strength):
            return self._sums(rows)

    def plain_logprobs(self, rows: Sequence[Row]) -> Tensor:
        """The plain model's, each computed once."""
        new = [row for row in dict.fromkeys(rows) if row.ids not in self._logprobs]
        if new:
            with torch.no_grad(), self.changed(0.0):
                found, _ = self._sums(new)
            self._logprobs.update({row.ids: float(value) for row, value in zip(new, found)})
        return torch.tensor([self._logprobs[row.ids] for row in rows], device=self.model.device)

    def _sums(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        longest = max(row.answer for row in rows)
        inputs: dict[str, Any] = self.model.batch([row.ids for row in rows], padding_side="left")
        if "logits_to_keep" in self.model.forward_parameters:
            inputs["logits_to_keep"] = longest + 1
        logits = self.model.run(inputs).logits[:, -longest - 1 : -1]
        ids = inputs["input_ids"][:, -longest:]
        counts = torch.tensor([row.answer for row in rows], device=ids.device)
        mask = torch.arange(longest, device=ids.device) >= (longest - counts)[:, None]
        log = logits.to(torch.promote_types(torch.float32, logits.dtype)).log_softmax(-1)
        chosen = log.gather(-1, ids[..., None])[..., 0]
        return (chosen * mask).sum(-1), counts
