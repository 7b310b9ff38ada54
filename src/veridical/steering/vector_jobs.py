"""What `veridical steer vector`, `eval` and `propose` do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical.console import said_where, step
from veridical.errors import ConfigError
from veridical.reporting import report
from veridical.running import keep, load_model, load_pairs, records, short
from veridical.steering.neutral import load_texts
from veridical.steering.verbs import SteerEvalVerb, SteerProposeVerb, SteerVectorVerb

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.steering.vectors import SteeringVector

log = logging.getLogger(__name__)

FITTED = """\
A steering vector is added to a model's activations. Its direction comes from labelled pairs, its site from \
validation pairs, and its strength from what it costs: the exact KL from the plain model on neutral text. A \
good reader can steer badly, so measure what it does (`veridical steer eval`)."""
EVALUATED = """\
Interventions on equal footing: what each does to the behaviour on held-out rows, what it leaves as it was, \
and what it costs. The harmonic mean is 0 where one of concept, instruct and fluency is."""
PROPOSED = """\
What to edit in the model, and why: where the behaviour can be read, where it is carried, and where adding a \
direction moves it most at an equal cost. What is proposed holds for pairs like these."""


def vector(options: SteerVectorVerb) -> Path:
    """Fits, calibrates and saves a vector; returns the folder."""
    from veridical.probes import load_probe
    from veridical.steering.vectors import SteeringVector

    options.require("steer vector")
    _asked(options)
    out = options.out or Path("runs") / f"vector-{short(str(options.model))}-{short(str(options.data))}"
    model, pairs = _material(options)
    texts = load_texts(options.neutral)
    with step("direction and site"):
        found = SteeringVector.fit(
            model, pairs, method=options.method, sites=list(options.sites), tokens=options.tokens,
            positions=options.positions, label=options.label, towards=options.towards,
            together=options.together, target_kl=options.target_kl, texts=texts,
            probe=load_probe(options.probe) if options.probe else None, sae=_sae(options.sae),
            feature=options.feature, seed=options.seed, progress=options.progress,
        )  # fmt: skip
        if options.when is not None:
            found = found.when(load_probe(options.when), options.threshold)
    if not found.erasers:
        with step("strength"):
            found = found.calibrate(model, options.target_kl, texts, seed=options.seed)
    log.info("  %s", found)
    found.save(out / "vector")
    found.report_section().save(out)
    if options.gguf:
        log.info("control vector: %s", found.save_gguf(out / "vector.gguf", model))
    if options.merged:
        with step("merging"):
            plain: Any = found.merged(model)
            plain.save_pretrained(out / "merged")
            model.tokenizer.save_pretrained(out / "merged")
    keep(out, options, model, pairs, metrics={"table": records(found.to_frame()), **dict(found.calibrated)})
    title = f"Steering vector for {short(str(options.model))}"
    said_where(report(out, out / "report.html", title=title, intro=FITTED))
    return out


def evaluate(options: SteerEvalVerb) -> Path:
    """Measures interventions and writes the report; returns the folder."""
    from veridical.pairs import Pairs
    from veridical.steering.evaluating import evaluate as measure

    options.require("steer eval")
    if not options.folders and not options.prompts and not options.few_shot:
        raise ConfigError(
            "steer eval needs something to measure: folders of vectors or adapters, --prompts or --few-shot"
        )
    out = options.out or Path("runs") / f"steering-{short(str(options.model))}-{short(str(options.data))}"
    model, pairs = _material(options)
    if "split" not in pairs:
        log.warning(
            "%s has no column split: a part of it is drawn to measure on, which vectors and adapters that "
            "were fitted on it have seen", pairs.name,
        )  # fmt: skip
        pairs = pairs.split(seed=options.seed)
    with step("interventions"):
        given = _interventions(options, model, pairs)
    with step(f"measuring {len(given)} interventions at {len(options.seeds)} seeds"):
        found = measure(
            model, given, pairs, towards=options.towards, label=options.label,
            neutral=load_texts(options.neutral), seeds=options.seeds, strengths=options.strengths,
            requests=Pairs.load(options.requests) if options.requests else None, rows=options.rows,
            answers=options.answers, progress=options.progress,
        )  # fmt: skip
    for line in found.findings():
        log.info("  %s", line)
    found.save(out)
    keep(out, options, model, pairs, metrics={"table": records(found.to_frame())})
    title = f"Steering {short(str(options.model))}"
    said_where(report(out, out / "report.html", title=title, intro=EVALUATED))
    return out


def propose(options: SteerProposeVerb) -> Path:
    """Proposes what to edit and writes the report; returns the folder."""
    from veridical.steering.choose import propose as choose

    options.require("steer propose")
    out = options.out or Path("runs") / f"proposal-{short(str(options.model))}-{short(str(options.data))}"
    model, pairs = _material(options)
    with step("looking where to edit"):
        found = choose(
            model, pairs, label=options.label, towards=options.towards, sites=list(options.sites),
            methods=options.methods, positions=options.positions, target_kl=options.target_kl,
            texts=load_texts(options.neutral), candidates=options.candidates, rows=options.rows,
            seed=options.seed, progress=options.progress,
        )  # fmt: skip
    for line in found.findings():
        log.info("  %s", line)
    found.save(out)
    keep(out, options, model, pairs, metrics={"table": records(found.to_frame())})
    title = f"What to edit in {short(str(options.model))}"
    said_where(report(out, out / "report.html", title=title, intro=PROPOSED))
    return out


def _material(options: Any) -> tuple[HookedModel, Pairs]:
    with step("model"):
        model = load_model(options)
    with step("data"):
        pairs = load_pairs(options, options.seed)
    log.info("  %s", pairs)
    return model, pairs


def _asked(options: SteerVectorVerb) -> None:
    """Refuses options that do not go together, before anything costs time."""
    if options.method == "sae" and options.sae is None:
        raise ConfigError("method sae needs --sae, the folder of a saved SAE")
    if options.threshold is not None and options.when is None:
        raise ConfigError("--threshold is that of --when, the probe that the vector waits for")
    if (options.gguf or options.merged) and (
        options.when is not None or options.positions != "all" or options.method == "leace"
    ):
        raise ConfigError(
            "--gguf and --merged take vectors that are added at every token: no --when, no --positions, and "
            "not leace"
        )


def _sae(folder: Path | None) -> Any:
    if folder is None:
        return None
    from veridical.saes.saved import load_sae

    return load_sae(folder)


def _interventions(options: SteerEvalVerb, model: HookedModel, pairs: Pairs) -> dict[str, Any]:
    """What is measured, by name."""
    from veridical.steering.baselines import FewShot, Prompt, engineered_prompt, random_like
    from veridical.steering.directions import parted
    from veridical.steering.evaluating import PerSeed
    from veridical.steering.vectors import SteeringVector

    given: dict[str, Any] = {}
    for folder, name in zip(options.folders, _names(options.folders)):
        one = given[name] = _saved(folder)
        if isinstance(one, SteeringVector) and one.vectors:
            given[f"random, as long as {name}"] = PerSeed(lambda seed, one=one: random_like(one, seed))
    for number, text in enumerate(options.prompts, 1):
        given["prompt" if len(options.prompts) == 1 else f"prompt {number}"] = Prompt(text)
    train, validation = parted(pairs, options.seed)
    if options.prompts and options.engineered and validation is not None:
        given["engineered prompt"] = engineered_prompt(
            model, validation, options.prompts, towards=options.towards, label=options.label,
            seed=options.seed,
        )  # fmt: skip
    if options.few_shot:
        given["few-shot"] = PerSeed(
            lambda seed: FewShot.of(train, options.few_shot, seed, options.towards, options.label)
        )
    return given


def _saved(folder: Path) -> SteeringVector | Any:
    """The vector or adapter that was saved in a folder."""
    from veridical.adapters import is_adapter
    from veridical.steering.adapter import Adapter
    from veridical.steering.vectors import SteeringVector

    return Adapter.load(folder) if is_adapter(folder) else SteeringVector.load(folder)


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of folders: the last part, with the one before where several have the same."""
    last = [folder.name for folder in folders]
    return [
        name if last.count(name) == 1 else f"{folder.parent.name}/{name}"
        for folder, name in zip(folders, last)
    ]
