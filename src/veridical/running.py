"""What each verb does once its options are known to be good: the API in order, and what is kept of it."""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from veridical.config import BeliefConfig, CollectConfig, build, to_dict
from veridical.console import said_where, step
from veridical.errors import ConfigError, unknown
from veridical.files import read_json, write_json
from veridical.provenance import fingerprint, provenance
from veridical.reporting import report
from veridical.verbs import VERBS, CollectVerb, DemoVerb, Inputs, LsVerb, Probing, ReportVerb

if TYPE_CHECKING:
    import pandas as pd

    from veridical.activations import Activations
    from veridical.models import HookedModel
    from veridical.pairs import Pairs
    from veridical.probes import ProbeSweep
    from veridical.saved_result import Saved

log = logging.getLogger(__name__)
Config = TypeVar("Config")

BELIEF_LABELS = frozenset({"believed", "known", "lied", "refused_to_lie", "confused"})


# The verbs


def collect(options: CollectVerb) -> Path:
    """Activations into a store; returns its folder."""
    options.require("collect")
    folder = options.store or folder_for("collect", options)
    with step("model"):
        model = load_model(options)
    with step("data"):
        pairs = load_pairs(options, options.seed)
    log.info("  %s", pairs)
    said_cut(model, pairs, options)
    with step("activations"):
        acts = collect_into(folder, model, pairs, options)
    acts.report_section().save(folder)
    metrics = {"rows": len(pairs), "vectors": len(acts.index), "sites": list(map(str, acts.sites))}
    keep(folder, options, model, pairs, metrics=metrics)
    log.info("%s", acts)
    log.info("store: %s", folder)
    return folder


def assemble(options: ReportVerb) -> Path:
    """Saved runs as one page; returns its path."""
    if not options.folders:
        raise ConfigError(
            "report needs at least one folder that a veridical verb wrote; see veridical report --help"
        )
    page = options.out if options.out.suffix in (".html", ".htm") else options.out / "report.html"
    report(options.folders, page, title=options.title, intro=options.intro)
    write_json(page.with_suffix(".config.json"), to_dict(options))
    write_json(page.with_suffix(".provenance.json"), provenance(verb="report"))
    said_where(page)
    return page


def ls(options: LsVerb) -> None:
    """Prints what is embedded and what a folder holds."""
    from veridical.listing import listing

    log.info("%s", listing(options.folder))


def demo(options: DemoVerb) -> Path:
    """The main job on the embedded organism; returns the page."""
    from veridical.demo import run_demo

    page = run_demo(options.out, progress=options.progress)
    write_json(options.out / "config.json", to_dict(options))
    said_where(page)
    return page


def job(module: str, name: str) -> Callable[[Any], Path]:
    """A job of another module; imported when it is run."""

    def run(options: Any) -> Path:
        return getattr(importlib.import_module(f"veridical.{module}"), name)(options)

    return run


RUN: dict[str, Callable[[Any], Any]] = {
    "demo": demo,
    "collect": collect,
    "probe": job("fitting", "fit"),
    "probe eval": job("probing", "evaluate"),
    "probe transfer": job("probing", "transfer"),
    "probe monitor": job("probing", "monitor"),
    "sae train": job("saes.jobs", "train"),
    "sae sweep": job("saes.jobs", "sweep"),
    "sae eval": job("saes.jobs", "evaluate"),
    "sae features": job("saes.jobs", "features"),
    "patch": job("interventions.jobs", "patch"),
    "prefer sft": job("preference.jobs", "sft"),
    "prefer reward": job("preference.jobs", "reward"),
    "prefer dpo": job("preference.jobs", "dpo"),
    "prefer ipo": job("preference.jobs", "ipo"),
    "prefer rl": job("preference.jobs", "rl"),
    "prefer distil": job("preference.jobs", "distil"),
    "prefer constitution": job("preference.making", "constitution"),
    "prefer guidelines": job("preference.making", "guidelines"),
    "compare": job("comparison.jobs", "compare"),
    "steer adapter": job("steering.adapter_jobs", "adapter"),
    "steer export": job("steering.adapter_jobs", "export"),
    "steer vector": job("steering.vector_jobs", "vector"),
    "steer eval": job("steering.vector_jobs", "evaluate"),
    "steer propose": job("steering.vector_jobs", "propose"),
    "report": assemble,
    "ls": ls,
}


# Their steps


def load_model(options: Inputs) -> HookedModel:
    """The model that the options name."""
    from veridical.models import load

    return load(
        options.model,
        device=options.device,
        dtype=options.model_dtype,
        trust_remote_code=options.trust_remote_code,
    )


def load_pairs(options: Inputs, seed: int) -> Pairs:
    """The data that the options name, cut to `limit` pairs drawn at random."""
    from veridical.pairs import Pairs

    pairs = Pairs.load(str(options.data), adapter=options.adapter)
    return pairs if options.limit is None else limited(pairs, options.limit, seed)


def limited(pairs: Pairs, limit: int, seed: int) -> Pairs:
    """At most `limit` whole pairs, drawn with the seed; rows keep their order."""
    import numpy as np

    groups = np.unique(pairs.groups)
    if len(groups) <= limit:
        return pairs
    kept = np.random.default_rng(seed).choice(groups, size=limit, replace=False)
    return pairs.filter(np.isin(pairs.groups, kept))


def check_beliefs_into(folder: Path, model: HookedModel, pairs: Pairs, config: BeliefConfig) -> Pairs:
    """The pairs with the labels of belief, kept in `folder`; what was asked there before is read back."""
    from veridical.pairs import Pairs, check_beliefs

    asked = fingerprint(
        [model.fingerprint(), pairs.fingerprint, json.dumps(_lasting(config), sort_keys=True)]
    )
    key, file = folder / "asked.json", folder / "pairs.parquet"
    if not (key.is_file() and file.is_file() and read_json(key) == {"asked": asked}):
        key.unlink(missing_ok=True)
        check_beliefs(model, pairs, config).save(file)
        write_json(key, {"asked": asked})
    saved = Pairs.load(f"./{file}" if not file.is_absolute() else file)
    checked = Pairs(saved.dataset, pairs.name, saved.beliefs)
    log.info("  %s", checked.beliefs)
    if checked.beliefs is not None:
        checked.beliefs.report_section().save(folder)
    return checked


def check_columns(options: Probing, pairs: Pairs) -> None:
    """Refuses a target or a condition on a column that the data won't have, before anything costs time.

    Raises:
        UnknownNameError: Names the nearest column.
    """
    columns = [*pairs.columns, *sorted(BELIEF_LABELS)]
    for name in _asked(options):
        if name not in columns:
            raise unknown("column", name, columns)


def collect_into(folder: Path, model: HookedModel, pairs: Pairs, options: CollectConfig) -> Activations:
    """Activations of all rows in a store that goes on where it was stopped."""
    from veridical.activations import collect

    config = part(CollectConfig, options)
    tokens = int(config.tokens) if re.fullmatch(r"-?\d+", str(config.tokens)) else config.tokens
    sites = config.sites.split(",") if isinstance(config.sites, str) else config.sites
    names = tuple(name.strip() for name in sites)
    return collect(model, pairs, build(CollectConfig, config, store=folder, tokens=tokens, sites=names))


def part(cls: type[Config], options: Any) -> Config:
    """The fields of a verb that belong to the API's config `cls`."""
    return build(cls, **{field.name: getattr(options, field.name) for field in fields(cls)})  # type: ignore[arg-type]


# What is kept


def keep(
    folder: Path, options: Any, model: HookedModel, pairs: Pairs, *, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Writes config.json, provenance.json and metrics.json into `folder`; returns the facts of the run."""
    facts = {
        "verb": next(name for name, cls in VERBS.items() if cls is type(options)),
        "model": str(model.path),
        "model_fingerprint": model.fingerprint(),
        "data": pairs.name,
        "data_fingerprint": pairs.fingerprint,
        "seed": getattr(options, "seed", None),
    }
    write_json(folder / "config.json", to_dict(options))
    write_json(folder / "provenance.json", provenance(**facts))
    write_json(folder / "metrics.json", metrics)
    return facts


def save_below(result: Saved, folder: Path) -> None:
    """Saves a result whose figure does not belong at the top of the page."""
    result.save(folder)
    replace(result.report_section(), headline=()).save(folder)


def sweep_metrics(sweep: ProbeSweep) -> dict[str, Any]:
    """The figures of the site that the folds chose, and of every site, as JSON values."""
    return {"best_site": sweep.best_site, "best": sweep.metrics, "sites": records(sweep.to_frame())}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as JSON values; what is not a number becomes null."""
    return json.loads(str(frame.reset_index(drop=True).to_json(orient="records")))


def said_cut(model: HookedModel, pairs: Pairs, options: CollectConfig) -> str:
    """How many rows are longer than the model takes, in words; "" when none is."""
    if options.on_long == "error":
        return ""
    longest = options.max_length or model.context_length or None
    cut = count_cut(model, pairs, longest)
    if not cut:
        return ""
    said = f"{cut:,} of {len(pairs):,} rows are longer than {longest:,} tokens and were cut at the start."
    log.info("  %s", said)
    return said


def count_cut(model: HookedModel, pairs: Pairs, longest: int | None) -> int:
    """Rows with more than `longest` tokens, completion included."""
    from veridical.tokens import encode

    if longest is None or model.tokenizer is None:
        return 0
    prompts, completions, cut = pairs.prompts, pairs.completions, 0
    for start in range(0, len(prompts), 1000):
        rows = slice(start, start + 1000)
        said = None if completions is None else completions[rows]
        found = encode(model.tokenizer, prompts[rows], said, drop_end=model.kind == "causal")
        cut += sum(len(row.ids) > longest for row in found)
    return cut


def _lasting(config: BeliefConfig) -> dict[str, Any]:
    """The options that decide the answers."""
    return {
        name: value for name, value in to_dict(config).items() if name not in ("batch_tokens", "progress")
    }


def wants_beliefs(options: Probing, pairs: Pairs) -> bool:
    """Whether the belief check has to run: asked for, or needed by a column that the data lack."""
    if options.beliefs is not None:
        return options.beliefs
    return bool((_asked(options) & BELIEF_LABELS) - set(pairs.columns))


def _asked(options: Probing) -> set[str]:
    """The columns that the target and the conditions name."""
    return {options.target, *(re.split(r"[=!<>]", condition)[0].strip() for condition in options.where)}


def folder_for(verb: str, options: Inputs) -> Path:
    """Where a run writes when nothing is said."""
    return Path("runs") / f"{verb}-{short(str(options.model))}-{short(str(options.data))}"


def short(name: object) -> str:
    """The last part of a path or hub name, safe for a folder name."""
    last = Path(str(name)).name
    stem = Path(last).stem if re.search(r"\.(csv|tsv|jsonl?|parquet|gz|txt)$", last) else last
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "model"
