"""What `veridical prefer` does: a training, its report, and for rl the frontier and the check for hacking."""

from __future__ import annotations

import logging
from pathlib import Path

from veridical.config import to_dict
from veridical.console import said_where, step
from veridical.files import write_json
from veridical.preference.config import Method, PreferConfig
from veridical.preference.frontier import LEAST_POINTS, frontier
from veridical.preference.hacking import check_hacking
from veridical.preference.reward import load_reward
from veridical.preference.runs import PreferenceRun
from veridical.preference.training import prefer
from veridical.preference.verbs import Preferring, PreferRLVerb
from veridical.reporting import report
from veridical.running import part, records, short

log = logging.getLogger(__name__)

INTRO = """\
A model was trained on preferences, and every checkpoint was loaded from disk and compared with the \
reference that training began at. KL is exact over the vocabulary at each position and taken on the policy's \
own samples; it is another quantity than KL on fixed text."""


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


def _train(method: Method, options: Preferring) -> Path:
    options.require(f"prefer {method}")
    name = f"{method}-{short(str(options.model))}-{short(str(options.data))}"
    out = options.out or Path("runs") / name
    run = prefer(
        method, str(options.model), str(options.data), out, part(PreferConfig, options),
        preferred=options.preferred, reward=options.reward,
    )  # fmt: skip
    if isinstance(options, PreferRLVerb):
        _judge(run, options, out)
    write_json(out / "config.json", to_dict(options))
    write_json(out / "metrics.json", {"checkpoints": records(run.to_frame())})
    for line in run.findings():
        log.info("  %s", line)
    log.info("model: %s", run.folder)
    title = f"{method.upper()} of {short(str(options.model))}"
    said_where(report(out, out / "report.html", title=title, intro=INTRO))
    return out


def _judge(run: PreferenceRun, options: PreferRLVerb, out: Path) -> None:
    """The frontier where it can be fitted, and what moved beside the reward, as sections of the report."""
    if len(run.table) > LEAST_POINTS and (run.table["kl"].iloc[1:] > 0).all():
        with step("frontier"):
            frontier({short(str(options.model)): run}, seed=options.seed).save(out / "frontier")
    judge = None if options.judge is None else load_reward(options.judge).score
    with step("check for reward hacking"):
        check = check_hacking(run, judge, kl_budget=options.kl_budget, seed=options.seed)
    for line in check.findings():
        log.info("  %s", line)
    check.save(out / "hacking")
