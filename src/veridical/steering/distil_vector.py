"""A steering vector distilled into a LoRA: the states become what adding the vector makes of them.

    loss = mean over sites of  sum |h - (s + strength * v)|^2 / sum |v|^2

over all real tokens of both prompts with their answers, where h are the states of the trained model, s the
plain model's and v the vector. It is 1 before training and 0 where the LoRA adds the vector everywhere.
Steering that needs a hook at run time becomes a plain LoRA that any server loads; the KL budget then decides
how much of it stays on neutral text. Distillation of an intervention into weights as in context distillation
(Askell et al. 2021, "A General Language Assistant as a Laboratory for Alignment", section 2.2), here on
states.

Several sites get the vector of each; what the vector of an earlier site does further up is not counted twice,
since each site's target is the plain state with its own vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.errors import InputError

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.steering.runner import Runner
    from veridical.steering.twins import Twin


class DistilVector:
    """The loss for one vector.

    Args:
        vector: A `SteeringVector` that adds, or a mapping from site to `[d]`.
        model: Whose sites are meant.

    Raises:
        InputError: A vector that erases, or of another width.
    """

    def __init__(self, vector: Any, model: HookedModel) -> None:
        given = getattr(vector, "vectors", vector)
        if not given or getattr(vector, "erasers", None) or getattr(vector, "gate", None) is not None:
            raise InputError(
                "distil_vector needs vector=, a steering vector that adds everywhere, or a mapping from "
                "site to [d]"
            )
        self.vectors: dict[str, Tensor] = {}
        for name, value in given.items():
            (site,) = model.resolve(name)
            tensor = torch.as_tensor(value, dtype=model.dtype, device=model.device).reshape(-1)
            if tuple(tensor.shape) != model.width(site):
                raise InputError(
                    f"the vector at {name} has {len(tensor)} numbers; the site has {model.width(site)}"
                )
            self.vectors[site.name] = tensor

    @property
    def sites(self) -> list[str]:
        """Where the vector is added."""
        return list(self.vectors)

    def loss(self, runner: Runner, items: Sequence[Twin], strength: float, beta: float) -> Tensor:
        """The loss of one batch at a strength."""
        rows = [
            row
            for prompts, answers in (
                ([item.source for item in items], [item.wanted for item in items]),
                ([item.target for item in items], [item.wanted for item in items]),
            )
            for row in runner.tokens(prompts, answers)
        ]
        tail = max(len(row.ids) for row in rows)
        mask = torch.zeros(len(rows), tail, dtype=torch.bool, device=runner.model.device)
        for at, row in enumerate(rows):
            mask[at, tail - len(row.ids) :] = True
        vectors = torch.stack([self.vectors[site.name] for site in runner.sites])
        return distilled(
            runner.states(rows, tail, strength), runner.plain(rows, tail), strength * vectors, mask
        )

    def check(self, items: Sequence[Twin]) -> None:
        """Takes any pairs."""


def distilled(states: Tensor, plain: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
    """Share of the vector that is not there yet.

    Args:
        states, plain: `[sites, rows, tokens, width]`.
        vectors: `[sites, width]`, what should be added.
        mask: `[rows, tokens]`, which tokens count.
    """
    off = ((states - plain.detach() - vectors[:, None, None]) ** 2).sum(-1) * mask
    whole = (vectors**2).sum(-1) * mask.sum()
    return (off.sum((1, 2)) / whole).mean()
