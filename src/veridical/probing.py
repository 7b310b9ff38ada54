"""What the further jobs of `veridical probe` do with probes: judge saved ones, transfer, monitor."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical.config import BeliefConfig, CollectConfig, ProbeConfig, to_dict
from veridical.console import said_where, step
from veridical.errors import ConfigError, DataError
from veridical.files import write_json
from veridical.provenance import provenance
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
    records,
    wants_beliefs,
)
from veridical.verbs import ProbeEvalVerb, ProbeMonitorVerb, ProbeTransferVerb, Probing

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.models import HookedModel
    from veridical.pairs import Pairs
    from veridical.probes.monitored import Scores

log = logging.getLogger(__name__)

EVAL = """\
A probe that was fitted before, on data it has not seen. AUROC is the chance that it scores a random \
positive above a random negative: 0.5 is chance, 1 is perfect. It stands beside what the text alone gives \
away."""
TRANSFER = """\
A probe that holds on its own data and nowhere else has read the data set. Rows are what a probe was fitted \
on, columns what it was tested on."""
MOVED = """\
Both models read the same rows. A map between their activations is fitted without a label, and the first \
model's probe is read through it in the second. What it reaches there stands beside the second model's own \
probe, beside maps that were fitted on shuffled pairs, and beside the text alone."""
MONITOR = """\
A probe that runs while the model reads and answers. Its score at a token is the log-odds of its label \
there; the threshold was set when it was fitted, on data like those: on other prompts, measure again."""


def evaluate(options: ProbeEvalVerb) -> Path:
    """Judges a saved probe on other data; returns the folder."""
    from veridical.probes import load_probe
    from veridical.probes.fits import place_for
    from veridical.probes.judged import judge_probe

    options.require("probe eval", "probe", "model", "data")
    out = options.out or folder_for("probe-eval", options)
    probe = load_probe(Path(str(options.probe)))
    log.info("%s", probe)
    with step("model"):
        model = load_model(options)
    site = place_for(model, probe, force=options.force)
    with step("data"):
        pairs = load_pairs(options, options.seed)
    origin = probe.origin_
    wanted = Probing(
        model=options.model,
        data=options.data,
        target=options.target or origin.target or "label",
        where=origin.where if options.where is None else options.where,
        sites=site,
        tokens=origin.tokens or "last",
        seed=options.seed,
    )
    acts = _labelled(out, model, pairs, wanted)
    with step("figures"):
        judged = judge_probe(
            probe, acts, target=wanted.target, where=wanted.where, force=options.force,
            bootstrap=options.bootstrap, seed=options.seed,
        )  # fmt: skip
    judged.save(out / "judged")
    keep(out, options, model, pairs, metrics={"figures": records(judged.to_frame()), **judged.counts})
    log.info("%s", judged)
    said_where(report(out, out / "report.html", title=f"A saved probe on {pairs.name}", intro=EVAL))
    return out


def transfer(options: ProbeTransferVerb) -> Path:
    """Probes of several data sets, or of the parts of one, each on all; returns the folder."""
    from veridical.probes.transfer import transfer_matrix

    options.require("probe transfer")
    names = [name.strip() for name in str(options.data).split(",") if name.strip()]
    if (len(names) > 1) + (options.by is not None) + (options.to_model is not None) != 1:
        raise ConfigError(
            "probe transfer needs one of these: two or more --data separated by commas, one --data with --by "
            "COLUMN, or one --data with --to-model PATH"
        )
    out = options.out or folder_for("probe-transfer", options)
    if options.to_model is not None:
        return _moved(out, options)
    with step("model"):
        model = load_model(options)
    sets: dict[str, Activations] = {}
    for name in names:
        one = replace(options, data=name)
        with step(f"data: {name}"):
            pairs = load_pairs(one, options.seed)
        label = pairs.name if pairs.name not in sets else name
        sets[label] = _labelled(out if len(names) == 1 else out / Path(name).stem, model, pairs, one)
    with step("probes"):
        config = part(ProbeConfig, options)
        acts: Any = sets if options.by is None else next(iter(sets.values()))
        matrix = transfer_matrix(acts, config, by=options.by, probe=options.estimator)
    matrix.save(out / "transfer")
    write_json(out / "config.json", to_dict(options))
    facts = {"verb": "probe transfer", "model": str(model.path), "model_fingerprint": model.fingerprint()}
    write_json(out / "provenance.json", provenance(**facts, data=names, seed=options.seed))
    write_json(out / "metrics.json", {"cells": records(matrix.to_frame())})
    log.info("%s", matrix)
    said_where(report(out, out / "report.html", title="Transfer of probes", intro=TRANSFER))
    return out


def _moved(out: Path, options: ProbeTransferVerb) -> Path:
    """A probe moved to another model through activations of the same rows."""
    from veridical.probes.model_transfer import transfer_to

    sites = options.to_sites or options.sites
    # A store that is named is of the first model.
    second = replace(options, model=options.to_model, sites=sites, store=None)
    acts: list[Activations] = []
    prints: list[str] = []
    for place, one in ((out, options), (out / "to", second)):
        with step(f"model: {one.model}"):
            model = load_model(one)
        with step("data"):
            pairs = load_pairs(one, one.seed)
        prints.append(model.fingerprint())
        acts.append(_labelled(place, model, pairs, one))
    with step("probes"):
        config = part(ProbeConfig, options)
        moved = transfer_to(acts[0], acts[1], config, method=options.method, probe=options.estimator)
    moved.save(out / "transfer")
    write_json(out / "config.json", to_dict(options))
    facts = {"verb": "probe transfer", "model": str(options.model), "model_fingerprint": prints[0]}
    facts |= {"to_model": str(options.to_model), "to_model_fingerprint": prints[1], "data": options.data}
    write_json(out / "provenance.json", provenance(**facts, seed=options.seed))
    write_json(out / "metrics.json", {"figures": records(moved.to_frame()), "fit": moved.fit})
    log.info("%s", moved)
    log.info("moved probe: %s", out / "transfer" / "probe")
    title = f"A probe for {options.target} moved to another model"
    said_where(report(out, out / "report.html", title=title, intro=MOVED))
    return out


def monitor(options: ProbeMonitorVerb) -> Path:
    """Generates with a probe running; returns the folder."""
    from veridical.probes import load_probe

    options.require("probe monitor", "probe", "model")
    out = options.out or Path("runs") / f"probe-monitor-{Path(str(options.model)).name}"
    probe = load_probe(Path(str(options.probe)))
    log.info("%s", probe)
    with step("model"):
        model = load_model(options)
    prompts = _prompts(model, options)
    answers: list[str] = []
    watching = probe.monitor(model, threshold=_threshold(options.threshold), force=options.force)
    with step(f"generating, {len(prompts)} prompts"), watching as scores:
        for start in range(0, len(prompts), options.batch):
            chosen = prompts[start : start + options.batch]
            answers += model.generate(chosen, max_new_tokens=options.max_new_tokens)
    rows = scores.rows()
    rows["answer"] = answers
    scores.to_frame().to_csv(_made(out) / "tokens.csv", index=False)
    rows.to_csv(out / "rows.csv", index=False)
    _monitored(scores, rows, options).save(out / "monitor")
    write_json(out / "config.json", to_dict(options))
    facts = {"verb": "probe monitor", "model": str(model.path), "model_fingerprint": model.fingerprint()}
    write_json(out / "provenance.json", provenance(**facts, probe=str(options.probe), seed=options.seed))
    fired = sum(rows["fired"].tolist())
    write_json(out / "metrics.json", {"rows": len(rows), "fired": fired, "threshold": scores.threshold})
    log.info("fired in %d of %d answers at log-odds above %.3g", fired, len(rows), scores.threshold)
    said_where(report(out, out / "report.html", title=f"{scores.label} while answering", intro=MONITOR))
    return out


def _labelled(out: Path, model: HookedModel, pairs: Pairs, options: Probing) -> Activations:
    """The activations of the pairs, with the labels of belief where they are asked for."""
    log.info("  %s", pairs)
    check_columns(options, pairs)
    if wants_beliefs(options, pairs):
        with step("beliefs"):
            pairs = check_beliefs_into(out / "beliefs", model, pairs, part(BeliefConfig, options))
    with step("activations"):
        return collect_into(options.store or out / "activations", model, pairs, part(CollectConfig, options))


def _prompts(model: HookedModel, options: ProbeMonitorVerb) -> list[Any]:
    """What is answered: the texts given, as chats where there is a template, or the prompts of the data."""
    if bool(options.prompts) == bool(options.data):
        raise ConfigError("probe monitor needs either --prompts or --data")
    if options.batch < 1 or options.max_new_tokens < 1:
        raise ConfigError(
            f"batch = {options.batch}, max_new_tokens = {options.max_new_tokens}: expected 1 or more"
        )
    if options.data:
        return list(load_pairs(options, options.seed).prompts)
    if getattr(model.tokenizer, "chat_template", None):
        system = [{"role": "system", "content": options.system}] if options.system else []
        return [[*system, {"role": "user", "content": text}] for text in options.prompts]
    if options.system:
        raise DataError(f"{model.path} has no chat template, so --system has no place")
    return list(options.prompts)


def _threshold(given: str) -> float | str:
    try:
        return float(given)
    except ValueError:
        return given


def _monitored(scores: Scores, rows: Any, options: ProbeMonitorVerb) -> Section:
    """The first answers token by token, and a line for each."""
    from markupsafe import escape

    shown = rows.head(options.show)
    views = [
        f"<h3>{escape(answer)}</h3>{scores.view(row, call).to_html()}"
        for answer, row, call in zip(*(shown[name].tolist() for name in ("answer", "row", "call")))
    ]
    fired = sum(rows["fired"].tolist())
    return Section(
        title=f"{scores.label} while answering",
        text="\n\n".join(
            [
                f"Fired in {fired} of {len(rows)} answers (log-odds above {scores.threshold:.3g}).",
                *scores.notes,
            ]
        ),
        html=tuple(views),
        tables=(("Every answer", rows.round(3)),),
        headline=(("answers in which the probe fired", f"{fired} of {len(rows)}"),),
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
