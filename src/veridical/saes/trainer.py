"""Many sparse autoencoders at once over one stream of activations.

Members of like shape make a group and are stepped together; groups take turns on the same batch. Nothing in
training is random but initial weights and the stream's order, both of which follow from seeds, so a run that
is killed goes on from its last checkpoint to the very same weights.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veridical.config import build, to_dict
from veridical.errors import ConfigError, DamagedFileError, DiskFullError, InputError
from veridical.progress import bar
from veridical.provenance import fingerprint, provenance
from veridical.saes.base import SAE, Loss
from veridical.saes.checkpoint import Folder
from veridical.saes.config import TRANSCODERS, SAEConfig
from veridical.saes.group import Group, Member, shape_key
from veridical.saes.kinds import kind
from veridical.saes.measure import Figures, measure
from veridical.saes.origin import SAEOrigin
from veridical.saes.runs import Run, SAERuns
from veridical.saes.stream import Batch, Stream, as_stream, check_finite, check_size
from veridical.saes.tracking import Tracking

log = logging.getLogger(__name__)
SAMPLE = 8192
"""Training vectors from which scales, biases and variances are estimated."""
HISTORY = 200
"""Figures that are kept of a member's course, about."""
LATENT_BYTES = 64 << 20
"""Dense latents that exist at a time while measuring."""


def train_saes(
    data: Any,
    configs: SAEConfig | Sequence[SAEConfig] | None = None,
    *,
    model: Any = None,
    read: str | int = "all",
    store: str | Path | None = None,
    holdout: float = 0.02,
    seed: int = 0,
    checkpoint_minutes: float = 5.0,
    device: str | torch.device | None = None,
    tracker: str | None = None,
    project: str = "veridical",
    progress: bool | None = None,
    **options: Any,
) -> SAERuns:
    """Trains sparse autoencoders together, in one pass over the data unless their configs ask for more.

    Args:
        data: `Activations`; vectors `[rows, d]`; a mapping of site to such; an iterable of batches of these,
            or a function that returns one; with `model`, texts as `collect` takes them.
        configs: One config or several; made from `options` when not given.
        model: Run this model on the data as training goes on, storing nothing.
        read: Tokens of each text that a running model's vectors are read at, as `collect` names them.
        store: Folder for checkpoints and finished SAEs. A run that was stopped goes on from there.
        holdout: Share of the vectors that is never trained on and that figures are measured on; whole texts
            (or pairs) of a store. 0 measures on a sample of the training vectors.
        seed: Seed of the order of the vectors and of what is held out.
        checkpoint_minutes: Minutes between checkpoints; the last two are kept.
        device: Where to train; a GPU if there is one.
        tracker: `trackio` or `wandb`: log every member as a run of its own there; nothing is sent when not
            given.
        project: Project that the tracker's runs are put into.
        progress: Progress bar; by default only on a terminal or in a notebook.
        **options: Fields of `SAEConfig`, for all configs.

    Returns:
        The trained SAEs and their figures on held-out vectors. A member that diverged is there without one.

    Raises:
        ConfigError: A config that fits no data of this width; names the option.
        InputError: Data, sites or sizes that do not fit.
        NonFiniteError: NaN or infinity in the data.
        StoreMismatchError: The store holds a run of something else.
    """
    wanted = _configs(configs, options)
    sites = [site for config in wanted for site in config.reads]
    tokens = max((config.tokens or 0 for config in wanted), default=0)
    stream = as_stream(data, model=model, sites=sites, holdout=holdout, seed=seed, read=read, tokens=tokens)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    training = _Training(stream, wanted, chosen, progress)
    if store is not None:
        asked = {"seed": seed, "holdout": holdout, "configs": [to_dict(config) for config in wanted]}
        training.keep_in(Folder(store, {**asked, "data": stream.identity}), checkpoint_minutes * 60)
    training.track(tracker, project)
    return training.run()


class _Training:
    """A run: groups, what is finished, and where the stream stands."""

    def __init__(
        self, stream: Stream, configs: list[SAEConfig], device: torch.device, progress: bool | None
    ) -> None:
        self.stream, self.device, self.progress = stream, device, progress
        self.folder: Folder | None = None
        self.tracking: Tracking | None = None
        self.every = float("inf")
        self.steps, self.seconds = 0, 0.0
        self.size = max(config.batch for config in configs)
        self.runs: dict[str, Run] = {}
        self.members = self._named(configs)
        self.groups = self._grouped(self._first())

    @cached_property
    def sample(self) -> Batch:
        """Training vectors for scales, biases and variances; asked for before the stream moves, so that it is
        the same whenever a member starts."""
        return self.stream.sample(SAMPLE)

    def keep_in(self, folder: Folder, every: float) -> None:
        """Takes up the run that a folder holds, and keeps checkpoints there every so many seconds."""
        self.folder, self.every = folder, every
        found = folder.latest()
        if found is not None:
            self._restore(*found)

    def track(self, tracker: str | None, project: str) -> None:
        """Sends figures to a tracker from here on, if one is named."""
        if tracker is not None:
            configs = {member.name: to_dict(member.config) for member in self.members}
            store = None if self.folder is None else fingerprint([str(self.folder.path.absolute())])
            self.tracking = Tracking(tracker, project, configs, store)

    def run(self) -> SAERuns:
        """Trains until every member is done."""
        check_finite(self.sample, "in a sample of the training vectors")
        if self.steps == 0:
            check_finite(self.stream.held_out, "among the held-out vectors")
            for group in self.groups:
                group.stack.calibrate(*self._read(group.members[0].config, self.sample))
        with bar(self._length(), "SAEs", "tokens", self.progress) as shown:
            shown.update(self.steps * self.size)
            if self.groups:
                self._train(shown)
        facts = provenance(data=self.stream.identity, seconds=round(self.seconds, 3))
        return SAERuns(tuple(self.runs[member.name] for member in self.members), facts)

    # Steps

    def _train(self, shown: Any) -> None:
        before, began = self.seconds, time.monotonic()
        kept = began
        while self.groups:
            for batch in self.stream.batches(self.size):
                check_finite(batch, f"after {self.steps * self.size:,} training vectors")
                for group in list(self.groups):
                    self._step(group, batch)
                self.steps += 1
                moved = self._settle()
                shown.update(self.size)
                self.seconds = before + time.monotonic() - began
                if self.groups and time.monotonic() - kept >= self.every:
                    self._checkpoint()
                    kept = time.monotonic()
                if moved or not self.groups:
                    break
        self._checkpoint()

    def _settle(self) -> bool:
        """What happens between two steps: nothing here; a sweep judges its members and starts others. Says
        whether the stream was moved, so that batches come from elsewhere."""
        return False

    def _step(self, group: Group, batch: Batch) -> None:
        x, y = self._read(group.members[0].config, batch)
        for at in range(0, len(x), group.batch):
            part = slice(at, at + group.batch)
            self._look(group, group.step(x[part], None if y is x else y[part]))
            if not group.members:
                self.groups.remove(group)
                return

    def _look(self, group: Group, loss: Loss) -> None:
        """Keeps figures now and then, and lets go who is done or no longer finite."""
        total = loss.total.detach()
        finite = total.isfinite().tolist()
        for number, (member, sound) in enumerate(list(zip(group.members, finite))):
            every = max(member.tokens // HISTORY, 1)
            if member.seen // every > (member.seen - group.batch) // every or member.done or not sound:
                parts = {name: float(value[number]) for name, value in loss.parts.items()}
                member.history.append({"tokens": member.seen, "loss": float(total[number]), **parts})
                if self.tracking is not None:
                    self.tracking.log(member.name, member.seen, {"loss": float(total[number]), **parts})
        leaving: list[tuple[Member, str | None]] = []
        for member, sound in zip(group.members, finite):
            if not sound:
                rate = member.config.learning_rate(group.d_in)
                reason = (
                    f"its loss became {member.history[-1]['loss']} after {member.seen:,} tokens (learning "
                    f"rate {rate:g})"
                )
                log.warning("%s is cancelled: %s", member.name, reason)
                leaving.append((member, reason))
            elif member.done:
                leaving.append((member, None))
        self._finish(group, leaving)

    def _finish(self, group: Group, leaving: Sequence[tuple[Member, str | None]]) -> None:
        """Lets members go, each with the reason why it is cancelled, or None where it is done."""
        if leaving:
            saes = group.remove([member.name for member, _ in leaving])
            for (member, cancelled), sae in zip(leaving, saes):
                self._keep(member, sae, cancelled)

    def _keep(self, member: Member, sae: SAE | None, cancelled: str | None) -> None:
        if self.folder is not None:
            facts = {"cancelled": cancelled, "seen": member.seen, "history": _plain(member.history)}
            weights = {} if sae is None or cancelled else sae.state_dict()
            self.folder.write_member(member.name, weights, facts)
        run = self.runs[member.name] = self._run(member, sae, cancelled)
        if self.tracking is not None:
            last = {} if run.figures is None else asdict(run.figures)
            held_out = {f"held_out/{name}": value for name, value in last.items()}
            self.tracking.finish(member.name, member.seen, held_out, cancelled is not None)

    def _run(self, member: Member, sae: SAE | None, cancelled: str | None) -> Run:
        folded = None if sae is None or cancelled else sae.folded()
        figures = None if folded is None else self._measure(folded)
        if folded is not None and figures is not None:
            folded.origin = SAEOrigin(
                **self.stream.facts,
                trained_on=member.seen,
                metrics={**asdict(figures), "explained_variance": figures.explained_variance},
            )
            if member.config.site is None and not member.config.sites and self.stream.facts:
                folded.configs = (replace(member.config, site=self.stream.site(None)),)
        return Run(member.name, member.config, folded, figures, member.seen, tuple(member.history), cancelled)

    def _measure(self, sae: SAE) -> Figures:
        x, y = self._read(sae.config, self.stream.held_out or self.sample)
        size = max(LATENT_BYTES // (4 * sae.width), 1)
        return measure(sae, ((x[at : at + size], y[at : at + size]) for at in range(0, len(x), size)))[0]

    # Members

    def _first(self) -> list[Member]:
        """The members that begin at once."""
        return self.members

    def _length(self) -> int | None:
        """Tokens that will be read, where that is known."""
        return max(member.tokens for member in self.members)

    def _named(self, configs: list[SAEConfig]) -> list[Member]:
        names: dict[str, int] = {}
        made = []
        for config in configs:
            self._check(config)
            names[config.label] = names.get(config.label, 0) + 1
            again = f"-{names[config.label]}" if names[config.label] > 1 else ""
            tokens = config.tokens or (self.stream.vectors or 0) // self.size * self.size
            made.append(Member(config.label + again, config, tokens // config.batch * config.batch))
        return made

    def _check(self, config: SAEConfig) -> None:
        config.check(self._widths(config)[0])
        if self.size % config.batch:
            raise ConfigError(
                f"{config.label}: batch is {config.batch}, which does not divide the largest, {self.size}: "
                "members share their batches"
            )
        if config.tokens is None and self.stream.vectors is None:
            raise ConfigError(
                f"{config.label}: give tokens, as how long a pass over these data is, is not known"
            )
        check_size(self.size, self.stream.vectors)
        if config.tokens is not None and config.tokens < config.batch:
            raise ConfigError(
                f"{config.label}: tokens is {config.tokens}, less than a batch of {config.batch}"
            )

    def _grouped(self, members: list[Member]) -> list[Group]:
        by_shape: dict[Hashable, list[Member]] = {}
        for member in members:
            by_shape.setdefault(shape_key(member.config, *self._widths(member.config)), []).append(member)
        return [Group(some, *self._widths(some[0].config), self.device) for some in by_shape.values()]

    def _sites(self, config: SAEConfig) -> list[str]:
        """The stream's names of what a config reads: input and target, or a crosscoder's sites."""
        if config.architecture in TRANSCODERS and not config.reads:
            raise ConfigError(f"{config.label}: a transcoder needs site and target_site")
        return [self.stream.site(name) for name in config.reads or (None,)]

    def _widths(self, config: SAEConfig) -> tuple[int, int]:
        widths = [self.stream.widths[site] for site in self._sites(config)]
        if config.architecture == "crosscoder":
            if len(set(widths)) > 1:
                raise InputError(f"{config.label}: sites have widths {widths}; a crosscoder needs one width")
            return sum(widths), sum(widths)
        return widths[0], widths[-1]

    def _read(self, config: SAEConfig, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a config from a batch, on the device."""
        parts = [batch[site].to(self.device) for site in self._sites(config)]
        if config.architecture == "crosscoder":
            together = torch.cat(parts, dim=1)
            return together, together
        return parts[0], parts[-1]

    # Checkpoints

    def _checkpoint(self) -> None:
        if self.folder is None:
            return
        tensors = {
            f"{number}.{name}": value
            for number, group in enumerate(self.groups)
            for name, value in group.tensors().items()
        } | self._own_tensors()
        state = {
            "steps": self.steps,
            "seconds": self.seconds,
            "stream": self.stream.state(),
            "finished": list(self.runs),
            "groups": [[member_state(member) for member in group.members] for group in self.groups],
            **self._own_state(),
        }
        try:
            self.folder.write(self.steps, tensors, state)
        except DiskFullError as error:
            if not self.groups:
                raise
            log.warning("no checkpoint after %s steps, training goes on: %s", f"{self.steps:,}", error)

    def _own_tensors(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps beside those of the groups: none here."""
        return {}

    def _own_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside members and stream: nothing here."""
        return {}

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        by_name = {member.name: member for member in self.members}
        for name in state["finished"]:
            self._restore_finished(by_name[name])
        self.groups = []
        for number, saved in enumerate(state["groups"]):
            some = [by_name[one["name"]] for one in saved]
            for member, one in zip(some, saved):
                member.seen, member.history = one["seen"], one["history"]
            group = Group(some, *self._widths(some[0].config), self.device)
            own = f"{number}."
            group.load_tensors(
                {name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)}
            )
            self.groups.append(group)
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.stream.restore(state["stream"])

    def _restore_finished(self, member: Member) -> None:
        found = self.folder.member(member.name) if self.folder is not None else None
        if found is None:
            raise DamagedFileError(
                f"the checkpoint says that {member.name} is finished, but its weights are gone"
            )
        tensors, facts = found
        member.seen, member.history = facts["seen"], facts["history"]
        sae = kind(member.config.architecture)(member.config, *self._widths(member.config)).to(self.device)
        if not facts["cancelled"]:
            sae.load_state_dict(tensors)
        self.runs[member.name] = self._run(member, sae, facts["cancelled"])


def _configs(configs: SAEConfig | Sequence[SAEConfig] | None, options: dict[str, Any]) -> list[SAEConfig]:
    given = [configs] if isinstance(configs, SAEConfig) else list(configs or [SAEConfig()])
    for config in given:
        if not isinstance(config, SAEConfig):
            raise InputError(f"configs hold a {type(config).__name__}; expected SAEConfig")
    return [build(SAEConfig, config, **options) for config in given]


def member_state(member: Member) -> dict[str, Any]:
    """What a checkpoint keeps of a member beside its tensors."""
    return {"name": member.name, "seen": member.seen, "history": _plain(member.history)}


def _plain(history: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """The figures as JSON values, which have no NaN."""
    return [{name: value if math.isfinite(value) else None for name, value in one.items()} for one in history]
