"""ReFT, for comparison: a low-rank change of the residual stream itself, which no LoRA can express.

    LoReFT:  h + R^T (W h + b - R h),  R with orthonormal rows      (Wu et al. 2024, "ReFT: Representation
    DiReFT:  h + R^T (W h + b)                                       Finetuning for Language Models", eq. 2,
    3)

    loss = mean over rows of  -log p(wanted answer | source prompt) per token

trained with the language-model loss as there, under the same KL budget as the adapters. Other than there it
acts at every token, not at the first and last of the prompt, so that no position has to be chosen. It needs
a hook at run time and is therefore not exported as a LoRA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.sites import Site
    from veridical.steering.runner import Runner
    from veridical.steering.twins import Twin


class Edit(nn.Module):
    """The change at one site.

    Args:
        width: Of the stream.
        rank: Of the subspace.
        orthonormal: LoReFT; else DiReFT.
    """

    def __init__(self, width: int, rank: int, orthonormal: bool) -> None:
        super().__init__()
        self.orthonormal = orthonormal
        self.read = nn.Linear(width, rank)
        self.base = nn.Linear(width, rank, bias=False)
        nn.init.orthogonal_(self.base.weight)
        if orthonormal:
            torch.nn.utils.parametrizations.orthogonal(self.base, "weight")
        with torch.no_grad():  # no change to begin with
            self.read.weight.copy_(self.base.weight if orthonormal else torch.zeros_like(self.read.weight))
            self.read.bias.zero_()

    def forward(self, value: Tensor) -> Tensor:
        """What is added to `[..., width]`."""
        found = self.read(value)
        if self.orthonormal:
            found = found - self.base(value)
        return found @ self.base.weight


@dataclass(frozen=True, repr=False)
class ReFT:
    """Trained edits.

    Attributes:
        edits: By canonical name of the site.
        factor: What a strength is multiplied with.
    """

    edits: nn.ModuleDict
    factor: float = 1.0

    def __repr__(self) -> str:
        return f"ReFT({len(self.edits)} sites)"

    @property
    def paths(self) -> list[str]:
        """The sites that it changes."""
        return [name.replace("/", ".") for name in self.edits]

    @contextlib.contextmanager
    def on(self, model: HookedModel, strength: float) -> Iterator[None]:
        """The model with the edits at a strength while the context lasts."""
        with acting(model, self.edits, strength * self.factor):
            yield

    def scaled(self, factor: float) -> ReFT:
        """The edits whose strength 1 is these ones' `factor`."""
        return ReFT(self.edits, self.factor * factor)

    def norm(self) -> float:
        """Frobenius norm of the changes' linear maps together."""
        total = 0.0
        with torch.no_grad():
            for edit in self.edits.values():
                first = edit.read.weight - edit.base.weight if edit.orthonormal else edit.read.weight  # type: ignore[union-attr]
                total += float(((edit.base.weight.T @ first).double() ** 2).sum())  # type: ignore[union-attr]
        return abs(self.factor) * total**0.5


def edits_for(model: HookedModel, sites: Sequence[Site], rank: int, orthonormal: bool) -> nn.ModuleDict:
    """Untrained edits for `sites`."""
    made = {
        site.name.replace(".", "/"): Edit(model.width(site)[-1], rank, orthonormal).to(
            model.device, model.dtype
        )
        for site in sites
    }
    return nn.ModuleDict(made)


@contextlib.contextmanager
def acting(model: HookedModel, edits: nn.ModuleDict, strength: float) -> Iterator[None]:
    """The edits on the model at a strength; at 0 nothing."""
    if strength == 0:
        yield
        return

    def write(edit: Any) -> Any:
        return lambda value: value + strength * edit(value)

    with model.hooks(write={name.replace("/", "."): write(edit) for name, edit in edits.items()}):
        yield


def loss(runner: Runner, items: Sequence[Twin], strength: float, beta: float) -> Tensor:
    """The loss of one batch at a strength."""
    rows = runner.tokens([item.source for item in items], [item.wanted for item in items])
    found, counts = runner.logprobs(rows, strength)
    return -(found / counts).mean()


def check(items: Sequence[Twin]) -> None:
    """Takes any pairs."""
