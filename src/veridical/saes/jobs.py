"""What `veridical sae` does: trains SAEs, judges saved ones, shows their features."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical.console import said_where, step
from veridical.errors import ConfigError, InputError
from veridical.reporting import Section, report
from veridical.running import folder_for, load_model, records
from veridical.saes import steps
from veridical.saes.texts import NESTED, cut, load_texts
from veridical.saes.verbs import SAEEvalVerb, SAEFeaturesVerb, SAESweepVerb, SAETrainVerb

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.saes.base import SAE
    from veridical.saes.features import FeatureTable
    from veridical.saes.separate import Separation

log = logging.getLogger(__name__)

TRAINED = """\
A sparse autoencoder (SAE) writes an activation as a sum of a few of many directions, its latents. FVU is \
the share of the variance that it leaves unexplained, L0 the number of latents that it takes for one token; \
a dead latent fires on none of the held-out tokens. Figures are those of texts that no SAE was trained on, \
beside PCA of as many components and a random dictionary of equal size."""
JUDGED = """\
Saved sparse autoencoders on texts, beside PCA of as many components and a random dictionary of equal size. \
FVU is the share of the variance that is left unexplained, L0 the number of latents taken for one token. The \
figures hold for held-out texts only if the texts were not trained on."""
FEATURES = """\
A feature is a latent of a sparse autoencoder: a direction that was useful for reconstruction. What it means \
has to be shown: look at examples drawn at random too, not only at the strongest, and ablate or steer it \
before saying that the model uses it."""
SEPARATE = """\
With many features some separate any two labels by chance, so they were ranked on one half of the pairs and \
are measured on the other, and p counts all of them."""


def train(options: SAETrainVerb) -> Path:
    """Activations, SAEs, their figures on held-out texts, report; returns the folder."""
    from veridical.saes.trainer import train_saes

    configs = steps.members(options)
    out, given = steps.material(options, configs, "sae train")
    with step(f"training {len(configs)} SAE{'s' if len(configs) > 1 else ''}"):
        runs = train_saes(
            **given.asked, configs=configs, store=out / "training", **steps.training_options(options)
        )
    log.info("  %s", runs)
    steps.finish(out, options, runs, given, "sae train")
    log.info("SAEs: %s", out / "saes")
    said_where(report(out, out / "report.html", title=f"SAEs on {given.name}", intro=TRAINED))
    steps.refuse_empty(runs)
    return out


def sweep(options: SAESweepVerb) -> Path:
    """Activations, a sweep, figures of those that came through, report; returns the folder."""
    from veridical.saes.sweep import sweep_saes

    asked = steps.sweep_config(options)
    out, given = steps.material(options, asked.members(), "sae sweep")
    store = options.store or out / "training"
    with step(f"sweep of {len(asked.members())} SAEs"):
        swept = sweep_saes(configs=asked, **given.asked, store=store)
    log.info("  %s", swept)
    log.info("  %s", swept.verdict())
    steps.finish(out, options, swept, given, "sae sweep")
    log.info("SAEs: %s", out / "saes")
    said_where(report(out, out / "report.html", title=f"Sweep of SAEs on {given.name}", intro=TRAINED))
    steps.refuse_empty(swept.runs)
    return out


def evaluate(options: SAEEvalVerb) -> Path:
    """Judges saved SAEs on texts; returns the folder."""
    from veridical.saes.saved import load_sae

    options.require("sae eval", "saes", "model", "data")
    out = options.out or folder_for("sae-eval", options)
    saes = steps.named({folder: load_sae(folder) for folder in options.saes})
    with step("model"):
        model = load_model(options)
    saes = {name: steps.placed(model, sae, options.site) for name, sae in saes.items()}
    pairs = load_texts(out, model, options, options.seed, _columns(options.target, options.where))
    texts, found = cut(model, pairs, options.context), {}
    _drop_sections(out, "latents*")
    for name, sae in saes.items():
        with step(f"figures of {name}: {sae}"):
            found[name] = steps.judged(sae, model, texts, options, options.seed)
        log.info("  %s", found[name])
        section = _with_model(found[name].report_section(), sae, model)
        replace(section, headline=()).save(out / f"figures-{name}")
        if options.target is not None:
            with step(f"{options.target} from few latents of {name}"):
                _few_latents(out, name, sae, model, texts, options)
    if options.target is None:
        _without_labels(pairs).save(out / "latents")
    steps.compared(found).save(out)
    facts = steps.facts(model, pairs) | {"saes": [str(folder) for folder in options.saes]}
    steps.keep(out, options, "sae eval", facts, {"saes": steps.figures(found)})
    title = f"{', '.join(saes)} on {pairs.name}"
    said_where(report(out, out / "report.html", title=title, intro=JUDGED))
    return out


def features(options: SAEFeaturesVerb) -> Path:
    """Index and pages of an SAE's features; returns the folder."""
    from veridical.activations import collect
    from veridical.saes.features import feature_table
    from veridical.saes.saved import load_sae

    options.require("sae features", "sae", "model", "data")
    if options.pages < 1 or options.examples < 1:
        raise ConfigError(f"pages = {options.pages}, examples = {options.examples}: expected 1 or more")
    out = options.out or folder_for("sae-features", options)
    sae = load_sae(Path(str(options.sae)))
    with step("model"):
        model = load_model(options)
    sae = steps.placed(model, sae, options.site)
    pairs = load_texts(out, model, options, options.seed, _columns(options.target, options.where))
    texts = cut(model, pairs, options.context)
    with step("activations"):
        acts = collect(model, texts, steps.reading(options, sae, out / "activations"))
    with step(f"features of {sae}"):
        table = feature_table(sae, acts, examples=options.examples, seed=options.seed)
    log.info("  %s", table)
    listed, separating = most_active(table, options.pages), []
    if options.target is not None:
        with step(f"features that separate {options.target}"):
            between = _separation(sae, model, acts, texts, options)
        log.info("  %s", between)
        separation_section(between).save(out / "between")
        separating = records(between.to_frame())
        listed = [int(line["feature"]) for line in separating][: options.pages]
    with step("pages"):
        write_pages(out, table, list(options.features) or listed, model)
    overview = Section(
        title="What was read", text=f"{sae} at {table.site} of {model.path}, over {pairs.name}."
    )
    _with_model(overview, sae, model).save(out)
    table.to_frame().to_csv(out / "features.csv", index=False)
    figures = {"features": len(table.frequency), "silent": int((table.frequency == 0).sum())}
    steps.keep(
        out, options, "sae features", steps.facts(model, pairs) | {"sae": str(options.sae)},
        {**figures, "tokens": len(acts), "separating": separating},
    )  # fmt: skip
    title = f"Features of {sae.config.label} on {pairs.name}"
    said_where(report(out, out / "report.html", title=title, intro=FEATURES))
    return out


# Features


def most_active(table: FeatureTable, count: int) -> list[int]:
    """The features that fire on most tokens, those that fire on more than a tenth of all left out while
    there are others: a dense feature seldom means anything that can be named."""
    from veridical.saes.measure import DENSE

    use = table.frequency
    order = sorted(range(len(use)), key=lambda feature: (use[feature] > DENSE, -use[feature]))
    return [feature for feature in order if use[feature] > 0][:count]


def separation_section(between: Separation) -> Section:
    """Features that separate two labels, with what their figures mean."""
    section, frame = between.report_section(), between.to_frame()
    headline = ()
    if "auroc" in frame and len(frame):
        first = frame.iloc[0]
        higher = bool(first["chosen_by"] >= 0.5)
        way = "higher" if higher else "lower"
        said = f"AUROC of feature {int(first['feature'])} alone, {way} where {between.sides[1]}"
        headline = ((said, f"{first['auroc'] if higher else 1 - first['auroc']:.3f}"),)
    return replace(section, text=f"{SEPARATE}\n\n{section.text}", headline=headline)


def write_pages(out: Path, table: FeatureTable, listed: Sequence[int], model: HookedModel) -> None:
    """The index, and a page for each of `listed`, as sections in `out`; pages of an earlier run go."""
    _drop_sections(out, "feature-*")
    table.report_section().save(out / "all")
    for at, (feature, page) in enumerate(zip(listed, table.pages(listed, _with_logits(table, model)))):
        page.save(out / f"feature-{at:03d}-{feature}")


def _drop_sections(out: Path, pattern: str) -> None:
    """Deletes sections of an earlier run, which would stand in the report of this one."""
    for old in out.glob(pattern):
        if old.is_dir() and {file.name for file in old.iterdir()} <= {"section.json"}:
            shutil.rmtree(old)


def _with_logits(table: FeatureTable, model: HookedModel) -> HookedModel | None:
    """The model where features have a direct path to its logits, else None."""
    from veridical.saes.logit_effects import logit_effects

    try:
        logit_effects(model, table.sae, [0])
    except InputError as error:
        log.info("  no logit effects: %s", error)
        return None
    return model


def _separation(
    sae: SAE, model: HookedModel, acts: Activations, texts: Any, options: SAEFeaturesVerb
) -> Separation:
    from veridical.activations import collect
    from veridical.saes.separate import separate_labels

    if options.label_tokens != "all":
        acts = collect(model, texts, steps.reading(options, sae, tokens=options.label_tokens))
    return separate_labels(
        sae, acts, str(options.target), where=options.where or None, bootstrap=options.bootstrap,
        seed=options.seed,
    )  # fmt: skip


# Labels


def _few_latents(
    out: Path, name: str, sae: SAE, model: HookedModel, texts: Any, options: SAEEvalVerb
) -> None:
    """Probes on few latents and feature absorption for the label that the options name, as sections."""
    from veridical.activations import collect
    from veridical.saes.absorption import measure_absorption
    from veridical.saes.sparse_probing import sparse_probes

    acts = collect(model, texts, steps.reading(options, sae, tokens=options.label_tokens))
    shared: dict[str, Any] = {"target": options.target, "where": options.where or None}
    shared |= {"bootstrap": options.bootstrap, "seed": options.seed}
    probes = sparse_probes(sae, acts, progress=options.progress, **shared)
    log.info("  %s", probes)
    probes.report_section().save(out / f"latents-{name}")
    probes.to_frame().to_csv(out / f"latents-{name}.csv", index=False)
    try:
        absorbed = measure_absorption(sae, acts, **shared)
    except InputError as error:
        section = _not_absorbed(str(options.target), name, error)
        log.warning(section.text)
    else:
        section = absorbed.report_section()
        log.info("  %s", absorbed)
    section.save(out / f"latents-{name}-absorption")


def _not_absorbed(target: str, name: str, error: InputError) -> Section:
    """Says why absorption was not measured, and what it takes."""
    text = (
        f"Feature absorption of {target} in {name} was not measured: {error}. It is measured on "
        "held-out rows that have the label and on which a linear probe finds it: give more labelled rows "
        "(--limit and --where leave rows out), another --target, or --label-tokens at which it can be read."
    )
    return Section(title=f"Feature absorption: {target}, not measured", text=text)


def _without_labels(pairs: Pairs) -> Section:
    """Says that nothing was measured that needs a label, and which labels these data have."""
    frame = pairs.to_pandas()
    values = {str(name): frame[name].tolist() for name in frame.columns if name not in NESTED}
    two = [
        name
        for name, column in values.items()
        if all(type(one) in (bool, int, str) for one in column) and len(set(column)) == 2
    ]
    have = f"these data have {', '.join(two)}" if two else "these data have no such column"
    text = (
        "Sparse probing and feature absorption were not measured: they need rows labelled with two classes. "
        f"Give --target COLUMN, a column of two values ({have})."
    )
    log.info("  %s", text)
    return Section(title="Labels: not measured", text=text)


def _columns(target: str | None, where: Sequence[str]) -> list[str]:
    """The columns that a target and its conditions name."""
    named = [re.split(r"[=!<>]", condition)[0].strip() for condition in where]
    return [*([target] if target is not None else []), *named]


def _with_model(section: Section, sae: SAE, model: HookedModel) -> Section:
    """The section, saying so where the SAE was trained on another model than it is run on."""
    own = sae.origin.model_fingerprint if sae.origin is not None else None
    if own is None or own == model.fingerprint():
        return section
    said = f"The SAE was trained on another model ({sae.origin.model}) than {model.path}."  # type: ignore[union-attr]
    log.warning(said)
    return replace(section, text=f"{said}\n\n{section.text}")
