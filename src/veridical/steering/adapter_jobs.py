"""What `veridical steer adapter` and `veridical steer export` do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from veridical.config import to_dict
from veridical.console import said_where, step
from veridical.errors import BudgetError, ConfigError
from veridical.files import write_json
from veridical.provenance import provenance
from veridical.reporting import report
from veridical.running import keep, load_model, load_pairs, part, records, short
from veridical.steering.adapter import Adapter
from veridical.steering.adapter_config import REFT, AdapterConfig
from veridical.steering.export import merged_model, prove, push_adapter
from veridical.steering.neutral import load_texts
from veridical.steering.train import train_adapter
from veridical.steering.verbs import SteerAdapterVerb, SteerExportVerb

log = logging.getLogger(__name__)

INTRO = """\
A LoRA was trained on a model's internals or outputs under a budget: the KL from the plain model on neutral \
text, exact over the vocabulary. Everything below was measured on rows that training did not see, and the \
saved files were measured once more in a fresh process with plain PEFT."""


def adapter(options: SteerAdapterVerb) -> Path:
    """Trains, saves and reports; returns the folder.

    Raises:
        BudgetError: The training did not keep to its budget; what the budget allows is saved.
    """
    options.require("steer adapter")
    if options.objective in REFT:
        raise ConfigError(
            f"objective = {options.objective!r} is no LoRA and cannot be saved as one; it is there for "
            "comparison in vd.train_adapter"
        )
    out = options.out or Path("runs") / f"adapter-{short(str(options.model))}-{short(str(options.data))}"
    with step("model"):
        model = load_model(options)
    with step("data"):
        pairs = load_pairs(options, options.seed)
    log.info("  %s", pairs)
    with step("training"):
        found = train_adapter(
            model, pairs, part(AdapterConfig, options), neutral=load_texts(options.neutral),
            kept=load_texts(options.kept), vector=_vector(options.vector), store=out / "adapter",
        )  # fmt: skip
    for line in found.report.findings():
        log.info("  %s", line)
    found.report.report_section().save(out)
    keep(out, options, model, pairs, metrics={"table": records(found.report.to_frame())})
    log.info("adapter: %s", out / "adapter")
    said_where(
        report(out, out / "report.html", title=f"Adapter for {short(str(options.model))}", intro=INTRO)
    )
    if not found.report.met:
        scale = found.report.facts["scale"]
        raise BudgetError(
            f"training did not keep to the budget of {options.kl_budget:g} nats a token; {out / 'adapter'} "
            f"holds the best that it allows (scaled to {scale:.3g}), and its curve is in the report"
        )
    return out


def export(options: SteerExportVerb) -> Path:
    """Proves an adapter again, merges or pushes it; returns its folder."""
    if options.folder is None:
        raise ConfigError(
            "steer export needs the folder of a saved adapter; see veridical steer export --help"
        )
    found = Adapter.load(options.folder)
    name = options.model or str(found.report.facts["model"])
    with step("model"):
        from veridical.models import load

        model = load(name, device=options.device, dtype=options.model_dtype)
    found.check_base(model)
    with step("proof in a fresh process"):
        proof = prove(found, options.folder, model)
    log.info(
        "  answers move by %.3f nats; KL on neutral text %.4f unmerged, %.4f merged",
        proof["moved"], proof["kl"]["unmerged"], proof["kl"]["merged"],
    )  # fmt: skip
    if options.merged is not None:
        with step("merging"):
            merged_model(found, model, options.merged, options.strength)
        facts = {"adapter": str(options.folder), "strength": options.strength}
        write_json(options.merged / "provenance.json", provenance(**facts, **found.report.made_by()))
        write_json(options.merged / "veridical.json", to_dict(options))
        log.info("merged model: %s", options.merged)
    if options.hub is not None:
        log.info("pushed: %s", push_adapter(options.folder, options.hub))
    return options.folder


def _vector(folder: Path | None) -> Any:
    if folder is None:
        return None
    from veridical.steering.vectors import SteeringVector

    return SteeringVector.load(folder)
