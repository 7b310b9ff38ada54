"""The jobs of `veridical prefer` that make preferences: by a constitution, and from labellers' rankings."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from veridical.config import to_dict
from veridical.console import said_where, step
from veridical.files import write_bytes, write_json
from veridical.preference.agreement import Agreement, agreement
from veridical.preference.config import ConstitutionConfig
from veridical.preference.constitutional import constitutional_data
from veridical.preference.guidelines import HHH, load_criteria, load_rankings, preferences_from, votes
from veridical.preference.principles import load_principles
from veridical.preference.verbs import PreferConstitutionVerb, PreferGuidelinesVerb, require
from veridical.provenance import provenance
from veridical.reporting import report
from veridical.reporting.section import Section
from veridical.running import part, short

log = logging.getLogger(__name__)

CONSTITUTION = """\
A model answered prompts, criticised its answers by principles drawn from a file, and wrote them again; then \
a model said which of two answers is better, asked in both orders. What was asked and what was written is in \
trace.jsonl, word for word."""
GUIDELINES = """\
Labellers ranked completions under written criteria. Of every two completions of a prompt the better ranked \
is preferred; ties and two fails say nothing, and the margin is the share of the votes for less the share \
against."""


def constitution(options: PreferConstitutionVerb) -> Path:
    """Critiques, revisions and labels by a model under principles; returns the folder."""
    require(options, "prefer constitution", "model", "data")
    out = options.out or Path("runs") / f"constitution-{short(options.model)}-{short(options.data)}"
    principles = load_principles(options.principles)  # a mistake in the file costs no loading of a model
    with step("model"):
        model, judge = (_loaded(name, options) for name in (options.model, options.judge))
    with step(f"{len(principles)} principles of {principles.name}"):
        found = constitutional_data(
            model, str(options.data), out, principles, part(ConstitutionConfig, options), judge=judge
        )
    for line in found.findings():
        log.info("  %s", line)
    write_json(out / "config.json", to_dict(options))
    title = f"Constitution: {short(options.model)}"
    said_where(report(out, out / "report.html", title=title, intro=CONSTITUTION))
    return out


def guidelines(options: PreferGuidelinesVerb) -> Path:
    """Preferences from rankings, and the agreement of those who ranked; returns the folder."""
    require(options, "prefer guidelines", "data")
    out = options.out or Path("runs") / f"guidelines-{short(options.data)}"
    criteria = HHH if options.criteria is None else load_criteria(options.criteria)
    rankings = load_rankings(str(options.data))
    cast = votes(rankings, criteria)
    preferences = preferences_from(rankings, criteria, short(options.data))
    rows = [
        {
            "prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected, "margin": row.margin,
            "group": row.group,
        }
        for row in preferences.rows
    ]  # fmt: skip
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    write_bytes(out / "preferences.jsonl", lines.encode("utf-8", "replace"))
    counts = {str(name): int(count) for name, count in cast["outcome"].value_counts().items()}
    log.info("  %d rankings, %d pairs: %s", len(rankings), len(cast), _listed(counts))
    labellers = sorted({ranking.labeller for ranking in rankings})
    agreed = agreement(rankings, options.seed) if len(labellers) > 1 else None
    _keep(out, options, cast, counts, agreed)
    title = f"Guidelines: {short(options.data)}"
    said_where(report(out, out / "report.html", title=title, intro=GUIDELINES))
    return out


def _keep(
    out: Path, options: PreferGuidelinesVerb, cast: Any, counts: dict[str, int], agreed: Agreement | None
) -> None:
    """The pairs as the run's own section, the agreement as a part of it."""
    names = {"preferred": "preferred", "tie": "ties", "level": "level votes", "fail": "fails on both sides"}
    said = [f"Of {len(cast)} pairs of completions: {_listed({names[key]: n for key, n in counts.items()})}."]
    if agreed is None:
        said.append("Only one labeller ranked, so nothing can be said about agreement.")
    else:
        agreed.save(out / "agreement")
        for line in agreed.findings():
            log.info("  %s", line)
    shown = cast.drop(columns=["group"]).assign(prompt=[str(prompt) for prompt in cast["prompt"]])
    Section(
        title=f"Preferences of {short(options.data)}",
        text="\n\n".join(said),
        tables=(("Some pairs", shown.head(12).round(4)),),
        headline=(("preferences", str(counts.get("preferred", 0))),),
    ).save(out)
    write_json(out / "config.json", to_dict(options))
    write_json(out / "provenance.json", provenance(verb="prefer guidelines", seed=options.seed))
    write_json(out / "metrics.json", {"pairs": len(cast), **counts})


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _loaded(name: str | None, options: PreferConstitutionVerb) -> Any:
    from veridical.models import load

    if name is None:
        return None
    return load(name, device=options.device, dtype=options.model_dtype, check=False)
