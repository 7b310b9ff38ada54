"""What `veridical compare` does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical.comparison.compressed import compressed
from veridical.comparison.config import CompareConfig
from veridical.comparison.verbs import CompareVerb
from veridical.config import BeliefConfig, to_dict
from veridical.console import said_where, step
from veridical.errors import ConfigError
from veridical.files import write_json
from veridical.probes.origin import Origin
from veridical.provenance import provenance
from veridical.reporting import report
from veridical.running import BELIEF_LABELS, check_beliefs_into, limited, part, records, short

if TYPE_CHECKING:
    from veridical.pairs import Pairs

log = logging.getLogger(__name__)

COMPARED = """\
A policy and the model that it started from read the same text, and everything is measured in one pass of \
both. What holds here holds for rows like these. A KL on the given text and one on the policy's own samples \
are different quantities and are never mixed."""


SEVERAL = """\
Several policies, each beside the model that it started from and beside each other. Every model reads the \
text once and is asked each question once. Inside, what training changed in the streams is compared, in any \
basis; outside, which options it made likelier. What holds here holds for rows like these."""


def compare(options: CompareVerb) -> Path:
    """Loads the models, compares them, and writes the report; returns the folder."""
    options.require("compare", *(() if options.compress else ("policy",)), "data")
    _refuse(options)
    return _several(options) if len(options.policy) > 1 else _pair(options)


def _refuse(options: CompareVerb) -> None:
    """Options that do not go together.

    Raises:
        ConfigError: They are named.
    """
    if options.compress and (options.policy or not options.reference):
        raise ConfigError("--compress makes the policy from --reference; give a reference and no policy")
    alone = {"--trained-on": options.trained_on, "--reward": options.reward}
    if (given := [name for name, value in alone.items() if value]) and len(options.policy) < 2:
        raise ConfigError(f"{given[0]} is for several policies; {len(options.policy)} arrived")
    if len(options.policy) > 1:
        if options.probes or options.saes:
            raise ConfigError(
                "probes and SAEs are for one policy and its reference; several policies arrived"
            )
        if options.reference is None:
            raise ConfigError("several policies need --reference, the model that all of them started from")


def _pair(options: CompareVerb) -> Path:
    from veridical.comparison.comparing import compare as measure
    from veridical.comparison.duo import load_pair, pair_of
    from veridical.models import load
    from veridical.probes import load_probe
    from veridical.saes import load_sae

    probes = [load_probe(folder) for folder in options.probes]
    saes = [load_sae(folder) for folder in options.saes]
    with step("models"):
        if options.compress:
            reference = load(options.reference, **_loading(options))
            duo = pair_of(compressed(reference, options.compress), reference)
        else:
            duo = load_pair(options.policy[0], reference=options.reference, **_loading(options))
    pairs = _pairs(options)
    wanted = {str(getattr(probe, "origin_", Origin()).target) for probe in probes}
    if (wanted & BELIEF_LABELS) - set(pairs.columns) and {"question", "options"} <= set(pairs.columns):
        with step("beliefs"):
            beliefs = BeliefConfig(progress=options.progress)
            pairs = check_beliefs_into(_out(options) / "beliefs", duo.reference, pairs, beliefs)
    with step("comparing"):
        found = measure(duo, pairs, probes, saes, config=part(CompareConfig, options))
    metrics = {"table": records(found.to_frame()), "findings": found.findings()}
    title = f"{short(duo.policy.path)} against {short(duo.reference.path)}"
    return _kept(options, found, pairs, metrics, title, COMPARED)


def _several(options: CompareVerb) -> Path:
    from veridical.comparison.several import compare_many

    pairs = _pairs(options)
    with step("comparing"):
        found = compare_many(
            options.policy, options.reference, pairs, trained_on=options.trained_on, reward=options.reward,
            config=part(CompareConfig, options), load=_loading(options),
        )  # fmt: skip
    metrics = {
        "models": records(found.models), "pairs": records(found.pairs), "findings": found.findings(),
    }  # fmt: skip
    title = f"{len(options.policy)} policies against {short(str(options.reference))}"
    return _kept(options, found, pairs, metrics, title, SEVERAL)


def _loading(options: CompareVerb) -> dict[str, Any]:
    return {
        "device": options.device,
        "dtype": options.model_dtype,
        "trust_remote_code": options.trust_remote_code,
    }


def _pairs(options: CompareVerb) -> Pairs:
    from veridical.pairs import Pairs

    with step("data"):
        pairs = Pairs.load(str(options.data), adapter=options.adapter)
        pairs = pairs if options.limit is None else limited(pairs, options.limit, options.seed)
    log.info("  %s", pairs)
    return pairs


def _kept(
    options: CompareVerb, found: Any, pairs: Pairs, metrics: dict[str, Any], title: str, intro: str
) -> Path:
    """Says what was found, and writes everything and the report."""
    for line in found.findings():
        log.info("  %s", line)
    out = _out(options)
    found.save(out)
    write_json(out / "config.json", to_dict(options))
    write_json(
        out / "provenance.json", provenance(**{**found.made_by(), "verb": "compare", "data": pairs.name})
    )
    write_json(out / "metrics.json", metrics)
    said_where(report(out, out / "report.html", title=title, intro=intro))
    return out


def _out(options: CompareVerb) -> Path:
    policies = (
        "-".join(short(name) for name in options.policy)
        or f"{short(str(options.reference))}-{options.compress}"
    )
    return options.out or Path("runs") / f"compare-{policies}-{short(str(options.data))}"
