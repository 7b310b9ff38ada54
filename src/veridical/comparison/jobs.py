"""What `veridical compare` does."""

from __future__ import annotations

import logging
from pathlib import Path

from veridical.comparison.verbs import CompareVerb
from veridical.config import BeliefConfig, to_dict
from veridical.console import said_where, step
from veridical.files import write_json
from veridical.probes.origin import Origin
from veridical.provenance import provenance
from veridical.reporting import report
from veridical.running import BELIEF_LABELS, check_beliefs_into, limited, part, records, short

log = logging.getLogger(__name__)

COMPARED = """\
A policy and the model that it started from read the same text, and everything is measured in one pass of \
both. What holds here holds for rows like these. A KL on the given text and one on the policy's own samples \
are different quantities and are never mixed."""


def compare(options: CompareVerb) -> Path:
    """Loads both models, compares them, and writes the report; returns the folder."""
    from veridical.comparison.compare import compare as measure
    from veridical.comparison.config import CompareConfig
    from veridical.comparison.duo import load_pair
    from veridical.pairs import Pairs
    from veridical.probes import load_probe
    from veridical.saes import load_sae

    options.require("compare", "policy", "data")
    probes = [load_probe(folder) for folder in options.probes]
    saes = [load_sae(folder) for folder in options.saes]
    name = f"compare-{short(str(options.policy))}-{short(str(options.data))}"
    out = options.out or Path("runs") / name
    with step("models"):
        duo = load_pair(
            options.policy,
            reference=options.reference,
            device=options.device,
            dtype=options.model_dtype,
            trust_remote_code=options.trust_remote_code,
        )
    with step("data"):
        pairs = Pairs.load(str(options.data), adapter=options.adapter)
        pairs = pairs if options.limit is None else limited(pairs, options.limit, options.seed)
    log.info("  %s", pairs)
    wanted = {str(getattr(probe, "origin_", Origin()).target) for probe in probes}
    if (wanted & BELIEF_LABELS) - set(pairs.columns) and {"question", "options"} <= set(pairs.columns):
        with step("beliefs"):
            beliefs = BeliefConfig(progress=options.progress)
            pairs = check_beliefs_into(out / "beliefs", duo.reference, pairs, beliefs)
    with step("comparing"):
        found = measure(duo, pairs, probes, saes, config=part(CompareConfig, options))
    for line in found.findings():
        log.info("  %s", line)
    found.save(out)
    write_json(out / "config.json", to_dict(options))
    facts = {**found.made_by(), "verb": "compare", "data": pairs.name}
    write_json(out / "provenance.json", provenance(**facts))
    write_json(out / "metrics.json", {"table": records(found.to_frame()), "findings": found.findings()})
    title = f"{short(str(options.policy))} against {short(duo.reference.path)}"
    said_where(report(out, out / "report.html", title=title, intro=COMPARED))
    return out
