"""The trainings of `veridical prefer` and their reports; with a reward, frontier and check for hacking."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from veridical.config import to_dict
from veridical.console import said_where, step
from veridical.errors import DiskFullError, VeridicalError
from veridical.files import write_json
from veridical.preference.config import DistilConfig, Method, PreferConfig
from veridical.preference.data import Need, Preferences, load_preferences
from veridical.preference.distil import distil as train_student
from veridical.preference.frontier import LEAST_POINTS, frontier
from veridical.preference.hacking import check_hacking
from veridical.preference.reward import load_reward
from veridical.preference.runs import PreferenceRun
from veridical.preference.training import NEEDS, prefer
from veridical.preference.verbs import PreferDistilVerb, Preferring, PreferRLVerb
from veridical.reporting import report
from veridical.running import part, records, short

log = logging.getLogger(__name__)

LITTLE = 64 * 2**20
"""Bytes of free space below which a failed write is taken for a full disk."""
INTRO = """\
A model was trained on preferences, and every checkpoint was loaded from disk and compared with the \
reference that training began at. KL is exact over the vocabulary at each position and taken on the policy's \
own samples; it is another quantity than KL on fixed text."""


DISTIL = """\
A student was trained to answer as its teacher, and every checkpoint was loaded from disk and held against \
the teacher. KL is exact over the vocabulary at each position and taken on the student's own samples; \
agreement and cross-entropy are on held-out answers."""


def sft(options: Preferring) -> Path:
    """Supervised fine-tuning; returns the folder."""
    return _train("sft", options)


def reward(options: Preferring) -> Path:
    """A reward model; returns the folder."""
    return _train("reward", options)


def dpo(options: Preferring) -> Path:
    """DPO; returns the folder."""
    return _train("dpo", options)


def ipo(options: Preferring) -> Path:
    """IPO; returns the folder."""
    return _train("ipo", options)


def rl(options: PreferRLVerb) -> Path:
    """RLOO; returns the folder."""
    return _train("rl", options)


def distil(options: PreferDistilVerb) -> Path:
    """A student of the model; returns the folder."""
    options.require("prefer distil")
    out = _out("distil", options)
    rows = _rows(options, "prompt" if options.answers == "teacher" else "chosen")
    with _explaining_full_disk(out):
        run = train_student(
            str(options.model), rows, out, part(DistilConfig, options), student=options.student,
            reward=options.reward,
        )  # fmt: skip
    return _keep(run, options, out, DISTIL)


def _out(method: Method, options: Preferring) -> Path:
    name = f"{method}-{short(str(options.model))}-{short(str(options.data))}"
    return options.out or Path("runs") / name


@contextlib.contextmanager
def _explaining_full_disk(out: Path) -> Iterator[None]:
    """A full disk as one line: each library that writes checkpoints has an error of its own for it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, VeridicalError) or not out.exists() or shutil.disk_usage(out).free > LITTLE:
            raise
        raise DiskFullError(
            f"no space left while writing {out}; what was complete before is kept: free some space and run "
            "again"
        ) from error


def _rows(options: Preferring, need: Need) -> Preferences:
    """The data that the options name, cut to `limit` rows drawn at random."""
    rows = load_preferences(str(options.data), options.preferred, need)
    return rows if options.limit is None else rows.limited(options.limit, options.seed)


def _train(method: Method, options: Preferring) -> Path:
    options.require(f"prefer {method}")
    out = _out(method, options)
    rows = _rows(options, NEEDS[method])
    config = part(PreferConfig, options)
    with _explaining_full_disk(out):
        run = prefer(method, str(options.model), rows, out, config, reward=options.reward)
    if "reward" in run.samples:
        _judge(run, options, out)
    return _keep(run, options, out, INTRO)


def _keep(run: PreferenceRun, options: Preferring, out: Path, intro: str) -> Path:
    """What made the run beside it, and its report."""
    write_json(out / "config.json", to_dict(options))
    write_json(out / "metrics.json", {"checkpoints": records(run.to_frame())})
    for line in run.findings():
        log.info("  %s", line)
    log.info("model: %s", run.folder)
    title = f"{run.facts['method'].upper()} of {short(str(options.model))}"
    said_where(report(out, out / "report.html", title=title, intro=intro))
    return out


def _judge(run: PreferenceRun, options: Preferring, out: Path) -> None:
    """Of a run with rewards: the frontier where it can be fitted, and what moved beside the reward."""
    if len(run.table) > LEAST_POINTS and (run.table["kl"].iloc[1:] > 0).all():
        with step("frontier"):
            frontier({short(str(options.model)): run}, seed=options.seed).save(out / "frontier")
    judged, budget = (options.judge, options.kl_budget) if isinstance(options, PreferRLVerb) else (None, None)
    judge = None if judged is None else load_reward(judged).score
    with step("check for reward hacking"):
        check = check_hacking(run, judge, kl_budget=budget, seed=options.seed)
    for line in check.findings():
        log.info("  %s", line)
    check.save(out / "hacking")
