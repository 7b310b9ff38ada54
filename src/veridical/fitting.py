"""`veridical probe fit`: from pairs and a model to probes, what they are worth, and the page that says so."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from veridical.config import BeliefConfig, ProbeConfig
from veridical.console import said_where, step
from veridical.errors import ConfigError
from veridical.examples import one_of_each, token_section
from veridical.reporting import Section, report
from veridical.running import (
    check_beliefs_into,
    check_columns,
    collect_into,
    folder_for,
    keep,
    load_model,
    load_pairs,
    part,
    said_cut,
    save_below,
    short,
    sweep_metrics,
    wants_beliefs,
)
from veridical.verbs import ProbeVerb

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.models import HookedModel
    from veridical.pairs import Pairs
    from veridical.probes import ProbeSweep
    from veridical.probes.honesty_report import HonestyReport
    from veridical.probes.learning import LearningCurve

log = logging.getLogger(__name__)

INTRO = """\
A probe is a linear classifier on a model's activations. AUROC is the chance that it scores a random \
positive above a random negative: 0.5 is chance, 1 is perfect. Every figure is measured on pairs that no \
probe was fitted on, and stands beside what the text alone gives away and what shuffled labels give."""
TOKENS = "The best probe at every token of two rows that were held out, one of each class."
PLAIN = "logistic"
"""The estimator whose folders go without its name."""


def fit(options: ProbeVerb) -> Path:
    """Pairs, beliefs if needed, activations, probes, report; returns the folder."""
    options.require("probe")
    estimators = estimators_of(options)
    out = options.out or folder_for("probe", options)
    with step("model"):
        model = load_model(options)
    with step("data"):
        pairs = load_pairs(options, options.seed)
    log.info("  %s", pairs)
    check_columns(options, pairs)
    if wants_beliefs(options, pairs):
        with step("beliefs"):
            pairs = check_beliefs_into(out / "beliefs", model, pairs, part(BeliefConfig, options))
    cut = said_cut(model, pairs, options)
    with step("activations"):
        acts = collect_into(options.store or out / "activations", model, pairs, options)
    sweeps = sweeps_into(out, acts, options, estimators)
    first, sweep = next(iter(sweeps.items()))
    save_below(sweep.calibration(), out / "calibration")
    if options.learning_curve:
        with step("learning curve"):
            save_below(curve_of(acts, sweep, first, options), out / "learning")
    honesty = None
    if options.target == "lied" and options.honesty:
        with step("honesty protocol"):
            honesty = honesty_of(acts, first, options)
            honesty.save(out / "honesty")
    for name, section in (
        ("tokens", tokens_of(model, sweep, acts, pairs)),
        ("data", replace(pairs.report_section(), headline=())),
        ("activations", replace(acts.report_section(), headline=())),
        ("", overview(model, pairs, options, cut)),
    ):
        if section is not None:
            section.save(out / name)
    keep(out, options, model, pairs, metrics=sweep_metrics(sweep))
    if options.keep is not None:
        keep_probes(options.keep, sweeps, honesty)
    title = f"Probes for {options.target}: {short(model.path)} on {pairs.name}"
    page = report(out, out / "report.html", title=title, intro=INTRO)
    for one in sweeps.values():
        log.info("%s", one)
    log.info("best probe: %s", out / "sweep" / "best")
    said_where(page)
    return out


def estimators_of(options: ProbeVerb) -> list[str]:
    """The estimators that are asked for, by name; an unknown one is refused before anything costs time."""
    from veridical.probes.kinds import estimator

    names = [name.strip() for name in options.estimator.split(",") if name.strip()]
    kinds = [estimator(name).name for name in names]
    if not names or len(set(kinds)) < len(kinds):
        raise ConfigError(f"estimator = {options.estimator!r}: expected one, or several different ones")
    return names


def sweeps_into(
    out: Path, acts: Activations, options: ProbeVerb, estimators: list[str]
) -> dict[str, ProbeSweep]:
    """Probes at every site by each estimator; the first in `out/sweep`, others in `out/sweep-NAME`."""
    from veridical.probes import fit_probes

    sweeps: dict[str, ProbeSweep] = {}
    for estimator in estimators:
        with step("probes" if len(estimators) == 1 else f"probes: {estimator}"):
            sweep = fit_probes(acts, part(ProbeConfig, options), probe=estimator)
        folder = out / ("sweep" if not sweeps else f"sweep-{sweep.best().name}")
        sweep.save(folder)
        if sweeps:
            replace(sweep.report_section(), headline=()).save(folder)
        sweeps[estimator] = sweep
    if len(sweeps) > 1:
        compared(list(sweeps.values())).save(out / "estimators")
    return sweeps


def compared(sweeps: list[ProbeSweep]) -> Section:
    """The estimators side by side, each at the site that its own folds chose."""
    import pandas as pd

    from veridical.probes.figure import dots

    lines = []
    for sweep in sweeps:
        line = sweep.to_frame().query("chosen").to_dict("records")[0]
        lines.append(
            {"probe": sweep.best().name, **{k: v for k, v in line.items() if k not in ("chosen", "C")}}
        )
    table = pd.DataFrame(lines)
    target = sweeps[0].config.target
    return Section(
        title=f"Estimators compared on {target}",
        text="All are fitted on the same rows and judged on the same held-out pairs. The site of each is the "
        "one that its own folds chose. Which estimator is best is read off here, on the held-out pairs, so "
        "the best figure is a little flattered; `fold_auroc` is what a choice between them may go by.",
        figures=(dots(table, f"Estimators compared on {target}"),),
        tables=(("At the chosen site, with 95 % intervals by pair", table.round(3)),),
    )


def curve_of(acts: Activations, sweep: ProbeSweep, estimator: str, options: ProbeVerb) -> LearningCurve:
    """AUROC by number of pairs at the site that the sweep chose, on its own held-out pairs."""
    from veridical.probes.learning import learning_curve

    return learning_curve(acts, part(ProbeConfig, options), site=sweep.best_site, probe=estimator)


def honesty_of(acts: Activations, estimator: str, options: ProbeVerb) -> HonestyReport:
    """The lying and the instruction probe side by side, fitted and judged as the options say."""
    from veridical.probes.honesty import honesty_protocol

    shared = {
        name: getattr(options, name) for name in ("folds", "strengths", "bootstrap", "seed", "progress")
    }
    return honesty_protocol(acts, probe=estimator, **shared)


def keep_probes(place: Path, sweeps: dict[str, ProbeSweep], honesty: HonestyReport | None) -> None:
    """The best probe of each estimator, and the one for monitoring, in folders named after `place`."""
    folders = {}
    for sweep in sweeps.values():
        name = sweep.best().name
        folder = place if name == PLAIN else place.with_name(f"{place.name}-{name}")
        folders[sweep.best().save(folder)] = None
    if honesty is not None:
        first = next(iter(folders))
        folders[honesty.monitor.save(first.with_name(f"{first.name}-monitor"))] = None
    log.info("kept: %s", ", ".join(map(str, folders)))


def overview(model: HookedModel, pairs: Pairs, options: ProbeVerb, cut: str) -> Section:
    """What was run on what, in a few sentences."""
    condition = f", on rows where {' and '.join(options.where)}" if options.where else ""
    text = (
        f"Column {options.target} of {pairs.name} ({len(pairs):,} rows) is predicted from {options.sites} "
        f"of {model.path}, a model with {model.n_layers} layers of width {model.d_model}. Token selection: "
        f"{options.tokens}{condition}."
    )
    return Section(title="What was run", text=f"{text}\n\n{cut}" if cut else text)


def tokens_of(model: HookedModel, sweep: ProbeSweep, acts: Activations, pairs: Pairs) -> Section | None:
    """The best probe over two rows that were held out, one of each class."""
    rows = one_of_each(acts, sweep.config, pairs.texts)
    return token_section(model, sweep.best(), pairs, rows, TOKENS)
