"""The steps of `veridical sae`: the data of a training, figures of finished SAEs, what is kept of a run."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical.config import CollectConfig, build, to_dict
from veridical.console import step
from veridical.devices import usable
from veridical.errors import ConfigError, DataError
from veridical.files import write_json
from veridical.probes.card import interval, number
from veridical.provenance import provenance
from veridical.reporting import Section
from veridical.running import folder_for, limited, load_model, part, records
from veridical.saes.config import SAEConfig
from veridical.saes.runs import SAERuns
from veridical.saes.sweep_config import SweepConfig
from veridical.saes.swept import SAESweep
from veridical.saes.texts import cut, held_rows, load_texts, parted

if TYPE_CHECKING:
    import pandas as pd

    from veridical.activations import Activations
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.saes.base import SAE
    from veridical.saes.evaluation import Evaluation
    from veridical.saes.verbs import SAESweepVerb, SAETraining, SAETrainVerb, Texts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """What a training reads.

    Attributes:
        asked: Arguments of `train_saes` that say where vectors come from.
        held: Texts or activations that nothing is trained on.
        model: The model; None where a store is read.
        name: What to call the data.
        facts: Model and data with their fingerprints.
    """

    asked: Mapping[str, Any]
    held: Any
    model: HookedModel | None
    name: str
    facts: Mapping[str, Any]


def members(options: SAETrainVerb) -> list[SAEConfig]:
    """The configs that the options and their `saes` ask for.

    Raises:
        UnknownNameError: A key of `saes` that is no option of an SAE.
        ConfigError: A name that is no name of a folder.
    """
    base = part(SAEConfig, options)
    listed = [{key.replace("-", "_"): value for key, value in one.items()} for one in options.saes]
    made = [build(SAEConfig, base, **one) for one in listed] or [base]
    for config in made:
        config.check_name()
    return made


def sweep_config(options: SAESweepVerb) -> SweepConfig:
    """The members and the rules of a sweep.

    Raises:
        ConfigError: No members, or rules that could judge nobody.
    """
    made = part(SweepConfig, options)
    members = made.members()
    for config in members:
        config.check_name()
    _ = made.rules
    longest = max(config.tokens or math.inf for config in members)
    if made.first is not None and made.first >= longest:
        raise ConfigError(
            f"first = {made.first}: nobody would be judged: no member trains on more than {longest:,} tokens"
        )
    return made


def material(options: SAETraining, configs: Sequence[SAEConfig], verb: str) -> tuple[Path, Material]:
    """The folder of a run, and what it trains on: a store, the texts of a running model, or a new store.

    Raises:
        ConfigError: Neither a store nor model and data, or both; no site; nothing to hold out.
    """
    if options.eval_texts < 1:
        raise ConfigError(f"eval_texts = {options.eval_texts}: expected 1 or more")
    if options.device is not None:
        usable(options.device)
    if options.activations is not None:
        return _stored(options)
    options.require(verb)
    sites = tuple(dict.fromkeys(site for config in configs for site in config.reads))
    if not sites:
        raise ConfigError(f"{verb} needs --site (or `site:` in its recipe), such as resid_post.4")
    out = options.out or folder_for("sae", options)
    with step("model"):
        model = load_model(options)
    seen, held = parted(
        load_texts(out, model, options, options.order_seed), options.holdout, options.order_seed
    )
    data = cut(model, seen, options.context)
    held = cut(model, limited(held, options.eval_texts, options.order_seed), options.context)
    if options.on_the_fly:
        asked = {"data": data, "model": model, "read": options.read}
    else:
        with step("activations"):
            asked = {"data": _collected(out / "activations", model, data, sites, options)}
        log.info("  %s", asked["data"])
    return out, Material(asked, held, model, seen.name, facts(model, seen))


def _stored(options: SAETraining) -> tuple[Path, Material]:
    from veridical.activations import Activations
    from veridical.saes.pooled import row_groups

    given = [f"--{name}" for name in ("model", "data") if getattr(options, name)]
    if given or options.on_the_fly:
        raise ConfigError(
            f"--activations takes the place of {' and '.join(given) or '--on-the-fly'}: give one or the other"
        )
    folder = Path(str(options.activations))
    acts = Activations.open(folder)
    split = acts.rows["split"].to_numpy() if "split" in acts.rows.columns else None
    held = held_rows(row_groups(acts), split, options.holdout, options.order_seed)
    log.info("%s", acts)
    made = {"model": acts.request.model["path"], "model_fingerprint": acts.request.model["fingerprint"]}
    made |= {"data": str(folder), "data_fingerprint": acts.fingerprint}
    out = options.out or Path("runs") / f"sae-{folder.resolve().name}"
    judged_on = _few(acts.filter(held), options.eval_texts, options.order_seed)
    return out, Material({"data": acts.filter(~held)}, judged_on, None, folder.name, made)


def _few(acts: Activations, count: int, seed: int) -> Activations:
    """At most `count` texts (or pairs), drawn with the seed."""
    import numpy as np

    from veridical.saes.pooled import row_groups

    groups = row_groups(acts)
    if len(names := np.unique(groups)) <= count:
        return acts
    kept = np.random.default_rng(seed).choice(names, size=count, replace=False)
    return acts.filter(np.isin(groups, kept))


def _collected(
    folder: Path, model: HookedModel, data: Any, sites: Sequence[str], options: SAETraining
) -> Activations:
    from veridical.activations import collect

    wanted = {"sites": tuple(sites), "tokens": options.read, "dtype": options.store_dtype, "store": folder}
    config = build(CollectConfig, None, **wanted, batch_tokens=options.batch_tokens)
    return collect(model, data, config, progress=options.progress)


def training_options(options: SAETraining) -> dict[str, Any]:
    """Arguments of `train_saes` that are no part of the data."""
    return {
        "seed": options.order_seed,
        "checkpoint_minutes": options.checkpoint_minutes,
        "device": options.device,
        "tracker": options.tracker,
        "project": options.project,
        "progress": options.progress,
    }


def finish(out: Path, options: SAETraining, made: SAERuns | SAESweep, from_: Material, verb: str) -> None:
    """Judges every SAE that was trained to the end, saves it, and writes the run's sections and figures."""
    runs = made if isinstance(made, SAERuns) else made.runs
    found: dict[str, Evaluation] = {}
    for run in runs:
        if run.sae is None:
            continue
        with step(f"figures of {run.name}"):
            found[run.name] = judged(run.sae, from_.model, from_.held, options, options.order_seed)
        log.info("  %s", found[run.name])
        save(run.sae, found[run.name], from_.name, out / "saes" / run.name)
        if options.keep is not None:
            save(run.sae, found[run.name], from_.name, options.keep / run.name)
    section = made.report_section()
    replace(section, headline=() if runs is made else section.headline[:1]).save(out / "runs")
    if found:
        compared(found).save(out)
        first = min(found.values(), key=lambda one: one.metrics["fvu"].value)
        replace(first.report_section(), headline=()).save(out / "figures")
    metrics = {"training": records(made.to_frame()), "saes": figures(found)}
    if isinstance(made, SAESweep):
        metrics |= {
            "judgements": records(made.rungs()),
            "share_of_tokens": made.share,
            "control": made.control,
        }
    keep(out, options, verb, from_.facts, metrics)


def refuse_empty(runs: SAERuns) -> None:
    """Ends a run that gave no SAE as a failed one, once its report is written.

    Raises:
        DataError: Every member was cancelled; says why the first was.
    """
    if all(run.sae is None for run in runs):
        first = next(iter(runs))
        raise DataError(
            f"none of {len(runs)} SAEs was trained to the end; {first.name} was cancelled: {first.cancelled}"
        )


def save(sae: SAE, found: Evaluation, data: str, folder: Path) -> None:
    """Saves a trained SAE with its figures on held-out texts of `data`."""
    from veridical.saes.saved import origin_of

    held = found.counts["texts"]
    said = f"Trained on texts of {data}; figures are those of {held:,} texts (or pairs) held out."
    sae.origin = replace(origin_of(sae), metrics=found.to_dict(), notes=(said, *found.findings()))
    sae.save(folder)


def judged(sae: SAE, model: HookedModel | None, held: Any, options: Texts, seed: int) -> Evaluation:
    """Figures on held-out texts: inside the model where the SAE was made for all tokens of one that predicts
    tokens, else of the activations alone."""
    from veridical.activations import collect
    from veridical.saes.evaluate import evaluate_sae

    shared: dict[str, Any] = {"bootstrap": options.bootstrap, "seed": seed, "progress": options.progress}
    if model is None:
        return evaluate_sae(sae, held, **shared)
    inside = model.kind == "causal" and sae.config.architecture != "crosscoder" and options.read == "all"
    if inside:
        return evaluate_sae(sae, model, held, batch_tokens=options.batch_tokens, **shared)
    return evaluate_sae(sae, collect(model, held, reading(options, sae)), **shared)


def reading(
    options: Texts, sae: SAE, store: Path | None = None, tokens: str | int | None = None
) -> CollectConfig:
    """What to collect for an SAE: its sites, at the tokens that the options name."""
    return build(
        CollectConfig, None, sites=sae.config.reads, tokens=options.read if tokens is None else tokens,
        store=store, batch_tokens=options.batch_tokens, progress=options.progress,
    )  # fmt: skip


def compared(found: Mapping[str, Evaluation]) -> Section:
    """Sparsity against what is left unexplained for several SAEs, beside PCA and random dictionaries."""
    from veridical.saes.evaluation import frontier

    best = min(found.items(), key=lambda item: item[1].metrics["fvu"].value)
    headline = [
        (f"variance explained by {best[0]}, L0 {best[1].metrics['l0'].value:.3g}",
         f"{best[1].metrics['explained_variance'].value:.1%}"),
    ]  # fmt: skip
    headline += [
        (f"left unexplained by {name} (FVU)", number(value.value))
        for name, value in best[1].baselines.items()
    ]
    text = (
        "Lower left is better. What is explained compares only between SAEs of about equal L0; the least FVU "
        f"is {number(best[1].metrics['fvu'].value)} ({best[0]})."
    )
    return Section(
        title="Sparsity and reconstruction on held-out texts",
        text="\n\n".join([text, *best[1].notes]),
        figures=(frontier(list(found.values())),),
        tables=(("Figures on held-out texts, 95 % intervals over texts", _table(found)),),
        headline=tuple(headline),
    )


def figures(found: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Figures by SAE, as JSON values."""
    return [{"name": name, **one.to_dict()} for name, one in found.items()]


def facts(model: HookedModel, pairs: Pairs) -> dict[str, Any]:
    """Model and data with their fingerprints."""
    made = {"model": str(model.path), "model_fingerprint": model.fingerprint()}
    return {**made, "data": pairs.name, "data_fingerprint": pairs.fingerprint}


def keep(folder: Path, options: Any, verb: str, facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Writes config.json, provenance.json and metrics.json."""
    write_json(folder / "config.json", to_dict(options))
    write_json(folder / "provenance.json", provenance(verb=verb, **facts, seed=options.seed))
    write_json(folder / "metrics.json", dict(metrics))


def placed(model: HookedModel, sae: SAE, site: str | None) -> SAE:
    """The SAE at the site given or its own, after a check that the model has it.

    Raises:
        ConfigError: It says no site, and none was given.
    """
    import copy

    if site is not None:
        own, there = sae.config.site, [str(found) for found in model.resolve(site)]
        if own is not None and own not in (site, *there):
            log.warning("%s was trained at %s; as asked, it is read at %s", sae.config.label, own, site)
        sae = copy.copy(sae)
        sae.configs = (replace(sae.config, site=site),)
    if not sae.config.reads:
        raise ConfigError(f"{sae!r} does not say which site it reads; give --site")
    for name in sae.config.reads:
        model.resolve(name)
    return sae


def named(saes: Mapping[Path, SAE]) -> dict[str, SAE]:
    """SAEs by the shortest name of their folders that tells them apart."""
    for depth in range(1, 1 + max(len(folder.parts) for folder in saes)):
        names = ["-".join(folder.parts[-depth:]) for folder in saes]
        if len(set(names)) == len(names):
            break
    else:
        raise DataError("a folder was given twice")
    return {re.sub(r"[^\w.+-]+", "-", name).strip("-."): sae for name, sae in zip(names, saes.values())}


def _table(found: Mapping[str, Evaluation]) -> pd.DataFrame:
    import pandas as pd

    lines = []
    for name, one in found.items():
        line: dict[str, Any] = {"SAE": name, "latents": one.counts["latents"]}
        for key, label in (("l0", "L0"), ("fvu", "FVU")):
            value = one.metrics[key]
            line[label] = interval(value.value, value.low, value.high)
        for kind in ("PCA", "random"):
            near = [value for label, value in one.baselines.items() if kind in label]
            line[f"FVU of {kind}"] = number(near[0].value) if near else ""
        if one.loss is not None:
            value = one.loss["recovered"]
            line["cross-entropy recovered"] = interval(value.value, value.low, value.high)
        lines.append({**line, "dead": number(one.dead), "dense": number(one.dense)})
    return pd.DataFrame(lines)
