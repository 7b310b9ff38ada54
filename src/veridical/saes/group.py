"""Members of like shape, stepped as one batched computation, each with its own learning rate, seed and clock.

The members' weights are one stack. Adam sees a member's part of it as parameters of their own, in a group of
their own, so members differ in learning rate, begin and end at different times, and come and go. What a
member computes does not depend on who is beside it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veridical.errors import InputError
from veridical.saes.base import SAE, Loss
from veridical.saes.config import PENALISED, SAEConfig
from veridical.saes.kinds import kind

EPS = 6.25e-10
"""Adam's epsilon (Gao et al. 2024): gradients of rare latents are small, and 1e-8 would damp them."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Member:
    """One SAE in training.

    Attributes:
        name: What it is called in the run.
        config: Its config.
        tokens: Tokens that it is trained on, a whole number of batches.
        seen: Tokens it has been trained on.
        history: Figures now and then: tokens, loss and its parts.
    """

    name: str
    config: SAEConfig
    tokens: int
    seen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether its training is over."""
        return self.seen >= self.tokens

    @property
    def rate(self) -> float:
        """Factor on the learning rate of the next step: up from 0, level, down to 0."""
        after = self.seen + self.config.batch
        rising, falling = self.config.warmup * self.tokens, self.config.decay * self.tokens
        up = min(1.0, after / rising) if rising > 0 else 1.0
        down = min(1.0, (self.tokens - self.seen) / falling) if falling > 0 else 1.0
        return min(up, down)

    @property
    def ramp(self) -> float:
        """Factor on the sparsity penalty of the next step."""
        rising = self.config.sparsity_warmup * self.tokens
        return min(1.0, (self.seen + self.config.batch) / rising) if rising > 0 else 1.0


def shape_key(config: SAEConfig, d_in: int, d_out: int) -> Hashable:
    """What members of one group share."""
    return (
        config.architecture,
        config.reads,
        config.latents(d_in),
        d_in,
        d_out,
        config.batch,
        config.normalise,
        config.dtype,
        config.skip,
        config.widths(d_in) if config.architecture == "matryoshka" else (),
    )


class Group:
    """Members of one shape and their optimiser.

    Args:
        members: Configs that agree in `shape_key`.
        d_in: Width of the inputs.
        d_out: Width of the outputs.
        device: Where to train.

    Attributes:
        members: The members, in the order of the stack.
        stack: Their weights.
        silent: Tokens since each latent was last above 1e-3, `[N, F]`.
    """

    def __init__(
        self, members: Sequence[Member], d_in: int, d_out: int, device: torch.device | str = "cpu"
    ) -> None:
        self.d_in, self.d_out, self.device = d_in, d_out, torch.device(device)
        self.key = shape_key(members[0].config, d_in, d_out)
        self.members: list[Member] = []
        self.stack: SAE
        self.silent = torch.zeros(0)
        self._views: list[dict[str, nn.Parameter]] = []
        made = kind(members[0].config.architecture)([one.config for one in members], d_in, d_out)
        self._assemble(list(members), made.to(self.device), [{} for _ in members])
        self.silent = torch.zeros(len(members), made.width, dtype=torch.int64, device=self.device)

    @property
    def batch(self) -> int:
        """Tokens in one step."""
        return self.members[0].config.batch

    def step(self, x: Tensor, y: Tensor | None = None) -> Loss:
        """One step of every member on inputs `[B, d_in]` and targets `[B, d_out]`, raw units."""
        stack = self.stack
        stack.zero_grad(set_to_none=True)
        ramp = stack.each([one.ramp for one in self.members]) if self._penalised else 1.0
        loss = stack.loss(x, y, dead=self.dead(), ramp=ramp)
        loss.total.sum().backward()
        stack.remove_parallel_gradient()
        for number, (member, options) in enumerate(zip(self.members, self.optimiser.param_groups)):
            options["lr"] = member.config.learning_rate(self.d_in) * member.rate
            for name, view in self._views[number].items():
                grad = getattr(stack, name).grad
                view.grad = None if grad is None else grad[number]
        self.optimiser.step()
        stack.normalise_decoder()
        self.silent += len(x)
        self.silent[loss.fired] = 0
        for member in self.members:
            member.seen += len(x)
        return loss

    def dead(self) -> Tensor:
        """Booleans `[N, F]`: latents silent for longer than their member allows."""
        clocks = [one.config.dead_clock(one.tokens) for one in self.members]
        return self.silent >= torch.tensor(clocks, device=self.device)[:, None]

    def add(self, member: Member, sae: SAE) -> None:
        """Takes a further member in, with its own clock at 0; the others' numbers stay as they are.

        Raises:
            InputError: It has another shape than the group.
        """
        if shape_key(member.config, self.d_in, self.d_out) != self.key:
            raise InputError(f"{member.name} has another shape than {self.stack!r}")
        saes = [self.stack.member(number) for number in range(len(self.members))]
        states = [self._moments(number) for number in range(len(self.members))]
        silent = torch.zeros(1, self.stack.width, dtype=torch.int64, device=self.device)
        self.silent = torch.cat([self.silent, silent])
        stack = type(self.stack).stack([*saes, sae.to(self.device)])
        self._assemble([*self.members, member], stack, [*states, {}])

    def remove(self, names: Sequence[str]) -> list[SAE]:
        """Lets members go and returns their SAEs, scales not folded; the others' numbers stay as they are."""
        numbers = [self._number(name) for name in names]
        gone = [self.stack.member(number) for number in numbers]
        rest = [other for other in range(len(self.members)) if other not in numbers]
        if rest:
            saes = [self.stack.member(other) for other in rest]
            states = [self._moments(other) for other in rest]
            self.silent = self.silent[rest]
            self._assemble([self.members[other] for other in rest], type(self.stack).stack(saes), states)
        else:
            self.members = []
        return gone

    def tensors(self) -> dict[str, Tensor]:
        """Everything that decides the next step, by name, with a leading member axis where members differ."""
        found = {f"weights.{name}": value for name, value in self.stack.state_dict().items()}
        found["silent"] = self.silent
        moments = [self._moments(number) for number in range(len(self.members))]
        for name in self._views[0]:
            for moment in MOMENTS:
                # A member before its first step has none; it does not read these zeros back either.
                found[f"{moment}.{name}"] = torch.stack(
                    [
                        own[name][moment] if name in own else torch.zeros_like(views[name])
                        for own, views in zip(moments, self._views)
                    ]
                ).detach()
        return found

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `tensors` of the same members gave; steps are counted from what they have seen."""
        weights = {name: value for name, value in tensors.items() if name.startswith("weights.")}
        self.stack.load_state_dict({name.removeprefix("weights."): value for name, value in weights.items()})
        self.silent.copy_(tensors["silent"])
        states: list[dict[str, dict[str, Tensor]]] = []
        for number, member in enumerate(self.members):
            state: dict[str, dict[str, Tensor]] = {}
            for name in self._views[0]:
                if member.seen:
                    state[name] = {moment: tensors[f"{moment}.{name}"][number] for moment in MOMENTS}
            states.append(state)
        self._assemble(self.members, self.stack, states)

    def own_tensors(self, number: int) -> dict[str, Tensor]:
        """Copies of what decides one member's next step, in main memory: `tensors` without what all share."""
        return {name: each[number].detach().cpu().clone() for name, each in self._each_member().items()}

    def load_own_tensors(self, found: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Takes up what `own_tensors` gave, by number of the member; the others stay as they are."""
        tensors = self.tensors()
        for number, own in found.items():
            for name, value in own.items():
                tensors[name][number] = value.to(self.device)
        self.load_tensors(tensors)

    def _each_member(self) -> dict[str, Tensor]:
        """Tensors with a leading member axis."""
        own = {f"weights.{name}" for name, _ in self.stack.named_parameters()}
        own |= {f"weights.{name}" for name in self.stack.member_buffers}
        return {
            name: value
            for name, value in self.tensors().items()
            if name in own or not name.startswith("weights.")
        }

    def _number(self, name: str) -> int:
        return [member.name for member in self.members].index(name)

    @property
    def _penalised(self) -> bool:
        return self.stack.architecture in PENALISED

    def _moments(self, number: int) -> dict[str, dict[str, Tensor]]:
        """Adam's moments of one member by parameter; empty before its first step."""
        found = {}
        for name, view in self._views[number].items():
            state = self.optimiser.state.get(view, {})
            if state:
                found[name] = {moment: state[moment] for moment in MOMENTS}
        return found

    def _assemble(self, members: list[Member], stack: SAE, moments: list[dict[str, Any]]) -> None:
        """Makes the optimiser anew over views of the stack, each with its moments so far."""
        self.members, self.stack = members, stack
        self._views = [
            {name: nn.Parameter(value.data[number]) for name, value in stack.named_parameters()}
            for number in range(len(members))
        ]
        groups = [
            {"params": list(views.values()), "lr": 0.0, "betas": member.config.betas}
            for views, member in zip(self._views, members)
        ]
        self.optimiser = torch.optim.Adam(groups, eps=EPS, fused=True)
        for member, views, states in zip(members, self._views, moments):
            steps = member.seen // member.config.batch
            for name, state in states.items():
                self.optimiser.state[views[name]] = {
                    "step": torch.tensor(float(steps), dtype=torch.float32, device=views[name].device),
                    **{moment: value.to(self.device).clone() for moment, value in state.items()},
                }
