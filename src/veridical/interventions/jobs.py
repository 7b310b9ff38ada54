"""What `veridical patch` does: the exact sweep, its gradient estimate beside it, and the circuit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical.config import to_dict
from veridical.console import said_where, step
from veridical.errors import ConfigError
from veridical.files import write_json
from veridical.interventions.material import Material, evenly_long, material
from veridical.interventions.verbs import PatchVerb
from veridical.provenance import provenance
from veridical.reporting import report
from veridical.running import load_model, records, save_below, short
from veridical.sites import Site

if TYPE_CHECKING:
    import pandas as pd

    from veridical.hooked import HookedModel
    from veridical.interventions.attribution import Attribution
    from veridical.interventions.patched import Patched

log = logging.getLogger(__name__)

PATCHED = """\
Two runs that differ in their input: activations of one are put into the other, one place at a time, and \
what the model then says is measured. A recovered fraction of 1 means that this place alone takes the \
metric all the way to the other run's value, 0 that it does nothing. What is found holds for rows like \
these."""


def patch(options: PatchVerb) -> Path:
    """Patches, attributes, and finds the circuit where asked; returns the folder."""
    from veridical.interventions.patching import patch as sweep

    options.require("patch", "model")
    rows = material(options)
    out = options.out or Path("runs") / f"patch-{short(str(options.model))}-{short(rows.name)}"
    with step("model"):
        model = load_model(options)
        source = load_model(replace(options, model=options.source)) if options.source else None
    rows = evenly_long(
        model, rows, _positive(options.examples, "examples"), aligned=options.align is not None
    )
    asked = _asked(options, rows)
    with step(f"patching {', '.join(options.sites)}"):
        heads: Any = "all" if any(site.split(".")[0] in _BY_HEAD for site in options.sites) else None
        patched = sweep(
            model, rows.clean, rows.corrupt, sites=list(options.sites), heads=heads, source=source,
            bootstrap=options.bootstrap, seed=options.seed, batch_tokens=options.batch_tokens, **asked,
        )  # fmt: skip
    log.info("  %s", patched)
    patched.save(out / "patched")
    metrics: dict[str, Any] = {"rows": len(rows), "patched": records(patched.to_frame())}
    if options.attribution and options.metric != "rank" and source is None:
        with step("attribution patching"):
            metrics["attribution"] = _attributed(out, model, rows, options, asked, patched)
    if options.circuit:
        with step("circuit"):
            metrics["circuit"] = _circuit(out, model, rows, options, asked)
    write_json(out / "config.json", to_dict(options))
    facts = {"verb": "patch", "model": str(model.path), "model_fingerprint": model.fingerprint()}
    write_json(out / "provenance.json", provenance(**facts, data=rows.name, seed=options.seed))
    write_json(out / "metrics.json", metrics)
    title = f"Where {short(str(options.model))} decides"
    said_where(report(out, out / "report.html", title=title, intro=PATCHED))
    return out


_BY_HEAD = ("q", "k", "v", "z", "pattern")


def _asked(options: PatchVerb, rows: Material) -> dict[str, Any]:
    return {
        "metric": options.metric,
        "answers": rows.answers,
        "wrong": rows.wrong if options.metric == "logit_diff" else None,
        "direction": options.direction,
        "align": options.align,
        "progress": options.progress,
    }


def _attributed(
    out: Path,
    model: HookedModel,
    rows: Material,
    options: PatchVerb,
    asked: dict[str, Any],
    patched: Patched,
) -> dict[str, Any]:
    """Attribution patching at the same places; how far it agrees with the exact effects."""
    from veridical.interventions.attributing import attribute

    found = attribute(
        model, rows.clean, rows.corrupt, method="atp", sites=list(options.sites),
        batch_tokens=options.batch_tokens, **asked,
    )  # fmt: skip
    save_below(found, out / "attribution")
    agreement = agreed(patched, found)
    for kind, value in agreement.items():
        log.info("  %s: correlation with the exact effects %.3f", kind, value)
    return {"correlation": agreement, "table": records(found.to_frame())}


def agreed(patched: Patched, found: Attribution) -> dict[str, float]:
    """Pearson's correlation of estimated and exact effects over the places of each kind of site."""
    import numpy as np

    exact, estimated = _by_place(patched.to_frame(), "effect"), _by_place(found.to_frame(), "score")
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for place in exact.keys() & estimated.keys():
        by_kind.setdefault(Site.parse(place[0]).kind, []).append((exact[place], estimated[place]))
    made = {}
    for kind, values in by_kind.items():
        ours, theirs = np.array(values).T
        if len(values) > 2 and ours.std() > 0 and theirs.std() > 0:
            made[kind] = float(np.corrcoef(ours, theirs)[0, 1])
    return made


def _by_place(frame: pd.DataFrame, value: str) -> dict[tuple[str, str, int], float]:
    """Mean effect or score by site, position and head (-1 for the whole site)."""
    from veridical.probes.data import missing

    found = {}
    for line in frame.to_dict("records"):
        if not missing(line[value]):
            head = -1 if missing(line.get("head")) else int(line["head"])
            found[Site.parse(str(line["site"])).short, str(line["position"]), head] = float(line[value])
    return found


def _circuit(
    out: Path, model: HookedModel, rows: Material, options: PatchVerb, asked: dict[str, Any]
) -> dict[str, Any]:
    from veridical.interventions.circuit import find_circuit

    wanted = {name: asked[name] for name in ("metric", "answers", "wrong", "align", "progress")}
    found = find_circuit(
        model, rows.clean, rows.corrupt, faithfulness=options.faithfulness, bootstrap=options.bootstrap,
        seed=options.seed, batch_tokens=options.batch_tokens, **wanted,
    )  # fmt: skip
    found.save(out / "circuit")
    log.info("  %s", found)
    return {"edges": records(found.to_frame())}


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ConfigError(f"{name} = {value}: expected 1 or more")
    return value
