"""Many configs over one stream, bad ones cancelled early, their slots taken by the next on the list.

The trainer is that of `train_saes`: members in slots are stepped together, a member that starts later joins
the stream where it stands and sees as many tokens as any other. Between two steps, those that have come to a
rung are measured on held-out vectors and judged by `halving`. What was decided is part of the checkpoint, so
a sweep that is killed decides the same again and ends in the same weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veridical.config import to_dict
from veridical.errors import ConfigError
from veridical.saes.checkpoint import Folder
from veridical.saes.config import SAEConfig
from veridical.saes.group import Group, Member, shape_key
from veridical.saes.halving import Arrival, Entrant, Halving, Judgement, peers_of
from veridical.saes.kinds import kind
from veridical.saes.measure import Figures
from veridical.saes.stream import Stream, as_stream
from veridical.saes.sweep_config import SweepConfig, as_sweep
from veridical.saes.swept import SAESweep
from veridical.saes.trainer import _Training

log = logging.getLogger(__name__)


def sweep_saes(
    data: Any,
    configs: SweepConfig | Sequence[SAEConfig] | dict[str, Any] | str | Path | None = None,
    *,
    model: Any = None,
    read: str | int = "all",
    **options: Any,
) -> SAESweep:
    """Trains the SAEs of a sweep and cancels those that fall behind their peers.

    Args:
        data: What `train_saes` takes: `Activations`, vectors `[rows, d]`, a mapping of site to such, batches,
            or texts with `model`.
        configs: The members: a list of `SAEConfig`; a `SweepConfig`, or a mapping of its fields, with `grid`
            (lists of values by field) and `configs`; or the path of a YAML recipe with such keys.
        model: Run this model on the data as training goes on, storing nothing.
        read: Tokens of each text that a running model's vectors are read at, as `collect` names them.
        **options: Fields of `SweepConfig`: `slots`, `eta`, `rungs`, `control`, `engine`, `store`, ...

    Returns:
        The SAEs that were trained to the end, and every judgement with its reason.

    Raises:
        UnknownNameError: A key, a field or a control that does not exist; names the nearest.
        ConfigError: A config that fits no data of this width, or rules that could judge nobody.
        InputError: Data, sites or sizes that do not fit.
        NonFiniteError: NaN or infinity in the data.
        StoreMismatchError: The store holds a run of something else.
    """
    if configs is None:
        configs = {}
    sweep, members = as_sweep(configs, options)
    if sweep.engine == "ray":
        from veridical.saes.ray_engine import ray_sweep

        return ray_sweep(data, sweep, members, model=model, read=read)
    if sweep.resources:
        raise ConfigError("resources say what a member takes of a Ray cluster; they need engine ray")
    stream = stream_of(data, sweep, members, model=model, read=read)
    training = _Sweep(stream, members, sweep)
    if sweep.store is not None:
        folder = Folder(sweep.store, asked(stream, sweep, members))
        training.keep_in(folder, sweep.checkpoint_minutes * 60)
    training.track(sweep.tracker, sweep.project)
    return training.swept()


def stream_of(
    data: Any, sweep: SweepConfig, members: Sequence[SAEConfig], *, model: Any, read: str | int
) -> Stream:
    """The one stream over which all members train."""
    sites = [site for config in members for site in config.reads]
    tokens = max((config.tokens or 0 for config in members), default=0)
    return as_stream(
        data, model=model, sites=sites, holdout=sweep.holdout, seed=sweep.seed, read=read, tokens=tokens
    )


def asked(stream: Stream, sweep: SweepConfig, members: Sequence[SAEConfig]) -> dict[str, Any]:
    """What decides the numbers of a sweep, as plain JSON values."""
    return {
        "configs": [to_dict(config) for config in members],
        "data": stream.identity,
        "holdout": sweep.holdout,
        "seed": sweep.seed,
        "sweep": {
            name: getattr(sweep, name)
            for name in ("engine", "slots", "eta", "rungs", "first", "grace", "max_dead", "control")
        },
    }


class _Sweep(_Training):
    """A sweep: the trainer, a judge, and a list of those that have not begun.

    Args:
        stream: Where the vectors come from.
        configs: The members.
        sweep: The rules.
        begin: Whether members are made and trained here; without, it only knows what is to be done.
    """

    def __init__(
        self, stream: Stream, configs: list[SAEConfig], sweep: SweepConfig, *, begin: bool = True
    ) -> None:
        self.sweep, self.slots = sweep, (sweep.slots or len(configs)) if begin else 0
        device = torch.device(sweep.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        super().__init__(stream, configs, device, sweep.progress)
        entrants = [self._entrant(member) for member in self.members]
        self.halving = Halving(entrants, sweep.rules, sweep.control)

    def swept(self) -> SAESweep:
        """Trains until nobody is left to train or to start."""
        runs = self.run()
        return SAESweep(
            replace(runs, facts={**runs.facts, "control": self.halving.control}),
            tuple(self.halving.judgements),
            {member.name: member.tokens for member in self.members},
            self.halving.control,
        )

    def _settle(self) -> None:
        """Judges who has come to a rung, lets go who is cancelled, and fills the slots."""
        arrivals = []
        for group in list(self.groups):
            for member in list(group.members):
                if self.halving.due(member.name, member.seen):
                    figures = self._figures(group, member)
                    if math.isfinite(figures.fvu):
                        arrivals.append(arrival(member, figures))
                    else:
                        reason = f"its held-out error became {figures.fvu} after {member.seen:,} tokens"
                        self._cancel(group, member, reason)
        for one in self.halving.judge(arrivals):
            self._tell(one)
            if not one.kept:
                self._cancel(*self._training_now()[one.name], one.reason)
        if arrivals:
            for one in self.halving.overtaken(list(self._training_now())):
                self._cancel(*self._training_now()[one.name], one.reason)
        self.groups = [group for group in self.groups if group.members]
        self._fill()

    def _figures(self, group: Group, member: Member) -> Figures:
        return self._measure(group.stack.member(group.members.index(member)).folded())

    def _cancel(self, group: Group, member: Member, reason: str) -> None:
        log.info("%s is cancelled: %s", member.name, reason)
        self._finish(group, [(member, reason)])

    def _fill(self) -> None:
        """Starts the next on the list while a slot is free."""
        training = self._training_now()
        waiting = [
            member for member in self.members if member.name not in self.runs and member.name not in training
        ]
        for member in waiting[: self.slots - len(training)]:
            self._start(member)

    def _start(self, member: Member) -> None:
        widths = self._widths(member.config)
        inputs: tuple[Tensor, Tensor] = self._read(member.config, self.sample)
        for group in self.groups:
            if group.key == shape_key(member.config, *widths):
                sae = kind(member.config.architecture)(member.config, *widths).to(self.device)
                sae.calibrate(*inputs)
                group.add(member, sae)
                return
        group = Group([member], *widths, self.device)
        group.stack.calibrate(*inputs)
        self.groups.append(group)

    def _training_now(self) -> dict[str, tuple[Group, Member]]:
        return {member.name: (group, member) for group in self.groups for member in group.members}

    def _entrant(self, member: Member) -> Entrant:
        config = member.config
        peers = peers_of(config, self._sites(config), self._widths(config)[0], member.tokens)
        return Entrant(member.name, config, peers, member.tokens)

    def _tell(self, one: Judgement) -> None:
        if self.tracking is not None:
            self.tracking.log(one.name, one.tokens, held_out(one))

    # What the trainer asks

    def _first(self) -> list[Member]:
        return self.members[: self.slots]

    def _length(self) -> int | None:
        return None

    def _own_state(self) -> dict[str, Any]:
        return {"judgements": self.halving.state()}

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        super()._restore(tensors, state)
        self.halving.restore(state["judgements"])


def arrival(member: Member, figures: Figures) -> Arrival:
    """A member at a rung, with its figures there."""
    return Arrival(member.name, member.seen, figures.explained_variance, figures.l0, figures.dead)


def held_out(one: Judgement | Arrival) -> dict[str, float]:
    """Figures at a rung by the names under which they are tracked."""
    return {
        "held_out/explained_variance": one.explained_variance,
        "held_out/l0": one.l0,
        "held_out/dead": one.dead,
    }
