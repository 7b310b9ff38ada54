"""Many configs over one stream, bad ones cancelled early, their slots taken by the next on the list.

The trainer is that of `train_saes`. All members go from one rung to the next before anybody goes further: as
many as there are slots are stepped together, set aside at the rung, and the next take their place at once,
over the same vectors, for which the stream is moved back. So every member sees what it would have seen alone,
all are judged together by `halving`, and how many slots there are decides nothing. Those set aside wait in
main memory. What was decided is part of the checkpoint, so a sweep that is killed decides the same again and
ends in the same weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veridical.config import to_dict
from veridical.errors import ConfigError, InputError
from veridical.saes.checkpoint import Folder
from veridical.saes.config import SAEConfig
from veridical.saes.group import Group, Member
from veridical.saes.halving import Arrival, Entrant, Halving, Judgement, peers_of
from veridical.saes.measure import Figures
from veridical.saes.stream import Stream, as_stream
from veridical.saes.sweep_config import SweepConfig, as_sweep
from veridical.saes.swept import SAESweep
from veridical.saes.trainer import _Training, member_state

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
        rungs = {rung for member in self.members for rung in self.halving.rungs(member.name)}
        ends = rungs | {max(member.tokens for member in self.members)}
        self.legs = sorted({-(-end // self.size) * self.size for end in ends})
        self.leg, self.position = 0, 0
        self.begun = self.ended = stream.state()
        self.ahead = [member.name for member in self.members[self.slots :]]
        self.parked: dict[str, dict[str, Tensor]] = {}
        self.arrivals: list[Arrival] = []
        if begin and self.ahead and not stream.rewinds:
            raise InputError(
                f"{self.slots} slots for {len(configs)} members: those that wait read the vectors later, "
                "but this iterator of batches can be read once; give a function that returns one, or no slots"
            )

    def swept(self) -> SAESweep:
        """Trains until nobody is left to train or to start."""
        runs = self.run()
        return SAESweep(
            replace(runs, facts={**runs.facts, "control": self.halving.control}),
            tuple(self.halving.judgements),
            {member.name: member.tokens for member in self.members},
            self.halving.control,
        )

    def _settle(self) -> bool:
        """At a rung: the next take the slots; once all have come to it they are judged, and go on."""
        self.position += self.size
        end = self.legs[self.leg]
        if self.groups and self.position < end:
            return False
        if self.position >= end:
            self.ended = self.stream.state()
        self._arrive()
        if self.ahead:
            self._park()
            self.stream.restore(self.begun)
            self._begin(self.legs[self.leg - 1] if self.leg else 0)
            return True
        self._judge()
        early = self.position < end  # all in the slots were cancelled before the rung
        if self.groups or self.parked:
            self.leg, self.begun = self.leg + 1, self.ended
            if self.parked:
                self._park()
                self.ahead = [member.name for member in self.members if member.name in self.parked]
                self._begin(end)
            if early:
                self.stream.restore(self.begun)
        return early

    def _arrive(self) -> None:
        """Measures those in the slots that have come to a rung of theirs."""
        for name, (group, member) in self._training_now().items():
            if self.halving.due(name, member.seen):
                figures = self._measure(group.stack.member(group.members.index(member)).folded())
                if math.isfinite(figures.fvu):
                    self.arrivals.append(arrival(member, figures))
                else:
                    self._cancel(
                        name, f"its held-out error became {figures.fvu} after {member.seen:,} tokens"
                    )

    def _judge(self) -> None:
        """Lets go those that are cancelled at this rung."""
        order = {member.name: number for number, member in enumerate(self.members)}
        arrivals, self.arrivals = sorted(self.arrivals, key=lambda one: order[one.name]), []
        while arrivals:  # again where one step led past two rungs
            for one in self.halving.judge(arrivals):
                if self.tracking is not None:
                    self.tracking.log(one.name, one.tokens, held_out(one))
                if not one.kept:
                    self._cancel(one.name, one.reason)
            left = [one for one in arrivals if one.name not in self.runs]
            arrivals = [one for one in left if self.halving.due(one.name, one.tokens)]

    def _cancel(self, name: str, reason: str) -> None:
        log.info("%s is cancelled: %s", name, reason)
        if self.parked.pop(name, None) is not None:
            self._keep(next(member for member in self.members if member.name == name), None, reason)
            return
        group, member = self._training_now()[name]
        self._finish(group, [(member, reason)])
        self.groups = [group for group in self.groups if group.members]

    def _park(self) -> None:
        """Sets those in the slots aside."""
        for group in self.groups:
            for number, member in enumerate(group.members):
                self.parked[member.name] = group.own_tensors(number)
        self.groups = []

    def _begin(self, position: int) -> None:
        """Puts the next into the slots, new or set aside at this position of the stream."""
        names, self.ahead = self.ahead[: self.slots], self.ahead[self.slots :]
        self.position = position
        self.groups = self._grouped([member for member in self.members if member.name in names])
        for group in self.groups:
            group.stack.calibrate(*self._read(group.members[0].config, self.sample))
            waited = {
                number: self.parked.pop(member.name)
                for number, member in enumerate(group.members)
                if member.name in self.parked
            }
            group.load_own_tensors(waited)

    def _training_now(self) -> dict[str, tuple[Group, Member]]:
        return {member.name: (group, member) for group in self.groups for member in group.members}

    def _entrant(self, member: Member) -> Entrant:
        config = member.config
        peers = peers_of(config, self._sites(config), self._widths(config)[0], member.tokens)
        return Entrant(member.name, config, peers, member.tokens)

    # What the trainer asks

    def _first(self) -> list[Member]:
        return self.members[: self.slots]

    def _length(self) -> int | None:
        return None

    def _own_tensors(self) -> dict[str, Tensor]:
        return {
            f"parked.{number}.{name}": value
            for number, own in enumerate(self.parked.values())
            for name, value in own.items()
        }

    def _own_state(self) -> dict[str, Any]:
        by_name = {member.name: member for member in self.members}
        return {
            "judgements": self.halving.state(),
            "leg": self.leg,
            "position": self.position,
            "begun": self.begun,
            "ended": self.ended,
            "ahead": self.ahead,
            "parked": [member_state(by_name[name]) for name in self.parked],
            "arrivals": [asdict(one) for one in self.arrivals],
        }

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        super()._restore(tensors, state)
        self.halving.restore(state["judgements"])
        for name in ("leg", "position", "begun", "ended", "ahead"):
            setattr(self, name, state[name])
        self.arrivals = [Arrival(**one) for one in state["arrivals"]]
        by_name, self.parked = {member.name: member for member in self.members}, {}
        for number, saved in enumerate(state["parked"]):
            member, own = by_name[saved["name"]], f"parked.{number}."
            member.seen, member.history = saved["seen"], saved["history"]
            self.parked[member.name] = {
                name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)
            }


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
