"""A sweep over a Ray cluster: every member is a trial of Ray Tune and trains by itself, by the same rules.

On one machine the local engine is quicker, as it steps members of like shape as one computation. Here members
come to their rungs one after another and are judged as they come, so the first at a rung always goes on and
somewhat more is spent; the best of its peers is never cancelled either way. None is cancelled between rungs.

    STORE/run.json           what was asked
    STORE/judgements.json    every decision so far
    STORE/trials/<name>/     the member's own training: checkpoints, and its weights once it is done
    STORE/ray/               what Ray Tune writes

The store has to be a folder that all machines see. A worker that is lost is started again from its member's
last checkpoint, on any machine; a driver that is lost goes on from the store, asking Ray for nothing.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veridical.config import build
from veridical.errors import ConfigError, InputError, VeridicalError
from veridical.files import read_json, write_json
from veridical.saes.checkpoint import MEMBERS, Folder
from veridical.saes.config import SAEConfig
from veridical.saes.group import Member
from veridical.saes.halving import Arrival, Halving
from veridical.saes.runs import Run
from veridical.saes.stream import Stream
from veridical.saes.sweep import _Sweep, arrival, asked, held_out, stream_of
from veridical.saes.sweep_config import SweepConfig
from veridical.saes.swept import SAESweep
from veridical.saes.trainer import _Training

log = logging.getLogger(__name__)
FAILURES = 20
"""Times that a member is started again: machines that are taken away count, and so would an endless fault."""
JUDGEMENTS, TRIALS = "judgements.json", "trials"


def ray_sweep(
    data: Any, sweep: SweepConfig, configs: Sequence[SAEConfig], *, model: Any, read: str | int
) -> SAESweep:
    """What `sweep_saes` does with engine `ray`.

    Raises:
        InputError: Ray is not installed (gives the line that installs it), no store, data that cannot be sent
            to workers, or what a member's training refused.
        VeridicalError: A member kept failing; names it.
    """
    ray = _ray()
    if sweep.store is None:
        raise ConfigError("engine ray needs a store: a folder that every machine of the cluster sees")
    store = sweep.store.absolute()
    stream = stream_of(data, sweep, configs, model=model, read=read)
    Folder(store, asked(stream, sweep, configs))
    plan = _Sweep(stream, list(configs), sweep, begin=False)
    ledger = _Ledger(plan.halving, store / JUDGEMENTS)
    left = [member for member in plan.members if not _over(member, ledger, store)]
    if left:
        shared = {"data": data, "sweep": sweep, "model": model, "read": read, "store": store}
        _check_sendable(ray, shared)
        began = time.monotonic()
        _run_trials(ray, left, ledger, shared, [_asked(plan, member) for member in left])
        plan.seconds = time.monotonic() - began
    for member in plan.members:
        _collect(plan, member, ledger)
    return plan.swept()


class _Ledger:
    """Decisions, on disk before anybody acts on them; the same question again gets the same answer."""

    def __init__(self, halving: Halving, path: Path) -> None:
        self.halving, self.path = halving, path
        if path.is_file():
            halving.restore(read_json(path))

    def cancelled(self, name: str) -> str | None:
        """Why a member was cancelled; None where it was not."""
        return next((one.reason for one in self.halving.of(name) if not one.kept), None)

    def goes_on(self, one: Arrival, rung: int) -> bool:
        """Whether a member goes on from a rung."""
        known = self.halving.of(one.name)
        if len(known) <= rung:
            known += self.halving.judge([one])
            write_json(self.path, self.halving.state())
            if not known[rung].kept:
                log.info("%s is cancelled: %s", one.name, known[rung].reason)
        return known[rung].kept


class _Trial(_Training):
    """One member's training on a worker, which asks at each rung whether to go on."""

    def __init__(self, stream: Stream, config: SAEConfig, sweep: SweepConfig, rungs: Sequence[int]) -> None:
        device = torch.device(sweep.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        super().__init__(stream, [config], device, False)
        self.rungs, self.rung = rungs, 0

    def go(self) -> None:
        """Trains to the end, or until the answer at a rung ends the process."""
        if self.steps:
            _ = self.sample
            self._settle()  # a rung that was reached, but perhaps not answered
        self.run()

    def _settle(self) -> bool:
        while self.groups and self.rung < len(self.rungs):
            group, member = self.groups[0], self.members[0]
            if member.seen < self.rungs[self.rung]:
                return False
            figures = self._measure(group.stack.member(0).folded())
            if not math.isfinite(figures.fvu):
                reason = f"its held-out error became {figures.fvu} after {member.seen:,} tokens"
                self._finish(group, [(member, reason)])
                self.groups = []
                return False
            one = arrival(member, figures)
            if self.tracking is not None:
                self.tracking.log(member.name, member.seen, held_out(one))
            self._checkpoint()  # the answer may be to stop, and a lost worker comes back to this rung
            _report({"rung": self.rung, "arrival": vars(one)})
            self.rung += 1
        return False

    def _own_state(self) -> dict[str, Any]:
        return {"rung": self.rung}

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        super()._restore(tensors, state)
        self.rung = state["rung"]


def _train_member(
    options: dict[str, Any],
    *,
    data: Any,
    sweep: SweepConfig,
    model: Any,
    read: str | int,
    store: Path,
    configs: dict[str, SAEConfig],
    rungs: dict[str, tuple[int, ...]],
    wanted: dict[str, dict[str, Any]],
) -> None:
    """What a worker runs; its stream reads no other sites than its member's."""
    name = options["member"]
    config = configs[name]
    try:
        stream = stream_of(data, sweep, [config], model=model, read=read)
        training = _Trial(stream, config, sweep, rungs[name])
        training.keep_in(Folder(store / TRIALS / name, wanted[name]), sweep.checkpoint_minutes * 60)
        training.track(sweep.tracker, sweep.project)
        training.go()
    except VeridicalError as error:  # trying again would not help
        _report({"refused": f"{name}: {error}"})


def _run_trials(
    ray: Any,
    members: Sequence[Member],
    ledger: _Ledger,
    shared: dict[str, Any],
    wanted: Sequence[dict[str, Any]],
) -> None:
    def stop(_: str, result: dict[str, Any]) -> bool:
        return "rung" in result and not ledger.goes_on(Arrival(**result["arrival"]), result["rung"])

    sweep, store, tune = shared["sweep"], shared["store"], ray.tune
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = tune.with_parameters(
            _train_member,
            **shared,
            configs={member.name: _exact(member) for member in members},
            rungs={member.name: ledger.halving.rungs(member.name) for member in members},
            wanted={member.name: one for member, one in zip(members, wanted)},
        )
        tuner = tune.Tuner(
            tune.with_resources(task, sweep.resources or {"cpu": 1, "gpu": gpus}),
            param_space={"member": tune.grid_search([member.name for member in members])},
            tune_config=tune.TuneConfig(max_concurrent_trials=sweep.slots),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=str(store),
                stop=stop,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=FAILURES),
            ),
        )
        found = ray.cluster_resources()
        log.info(
            "%d members over a Ray cluster of %g cores and %g GPUs",
            len(members),
            found.get("CPU", 0),
            found.get("GPU", 0),
        )
        with _quiet():
            results = tuner.fit()
    finally:
        if own:
            ray.shutdown()
    for result in results:
        if "refused" in (result.metrics or {}):
            raise InputError(result.metrics["refused"])
    for error in results.errors:
        said = " ".join(str(error).split())
        raise VeridicalError(
            f"a member failed {FAILURES} times on the cluster: {said[-300:]}; what is done is in {store}, "
            "and the same call goes on from there"
        )


def _collect(plan: _Sweep, member: Member, ledger: _Ledger) -> None:
    """Puts what became of a member into the plan's runs."""
    folder = Folder(ledger.path.parent / TRIALS / member.name, _asked(plan, member))
    reason = ledger.cancelled(member.name)
    if reason is None:
        plan.folder = folder
        plan._restore_finished(member)
        return
    found = folder.latest()
    saved = found[1]["groups"][0][0] if found else {"seen": 0, "history": []}
    history = tuple(saved["history"])
    plan.runs[member.name] = Run(
        member.name, member.config, None, None, ledger.halving.of(member.name)[-1].tokens, history, reason
    )


def _over(member: Member, ledger: _Ledger, store: Path) -> bool:
    """Whether a member is cancelled or trained to the end."""
    done = store / TRIALS / member.name / MEMBERS / f"{member.name}.json"
    return done.is_file() or ledger.cancelled(member.name) is not None


def _asked(plan: _Sweep, member: Member) -> dict[str, Any]:
    """What decides a member's numbers, for its own folder."""
    return asked(plan.stream, plan.sweep, [_exact(member)])


def _exact(member: Member) -> SAEConfig:
    """The config under which a worker trains: what depends on the other members is written out."""
    return build(SAEConfig, member.config, name=member.name, tokens=member.tokens)


def _check_sendable(ray: Any, shared: dict[str, Any]) -> None:
    for name in ("data", "model"):
        try:
            ray.cloudpickle.dumps(shared[name])
        except Exception as error:
            raise InputError(
                f"{name} is a {type(shared[name]).__name__}, which cannot be sent to the workers of Ray "
                f"({error}); expected a store, tensors, texts, or a function, and a model by name"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Tune's tables and notes to itself: what matters of a sweep is logged here."""
    tune = logging.getLogger("ray.tune")
    before = tune.level
    tune.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tune.setLevel(before)


def _ray() -> Any:
    """Ray, told to send no usage statistics and to write no result files that nobody reads."""
    for variable, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        import_module("ray.cloudpickle")
        import_module("ray.tune")
        return import_module("ray")
    except ImportError as error:
        raise InputError(
            f"engine ray needs Ray Tune ({error}); install it with: pip install 'veridical[cluster]'"
        ) from error


def _report(said: dict[str, Any]) -> None:
    """Tells the driver, and waits until it has heard; the process ends here if the answer is to stop."""
    import_module("ray.tune").report(said)
