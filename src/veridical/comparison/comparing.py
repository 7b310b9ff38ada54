"""Compares a policy with its reference: outputs and representations in one pass, then samples and weights.

Each part is a function from what was asked to tables by name, and `PARTS` lists them in order; what reads the
one pass over both models is a `Measure`, and `MEASURES` lists those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from veridical.comparison.behaviour import behaviour
from veridical.comparison.cka import CKA
from veridical.comparison.comparison import Comparison
from veridical.comparison.config import CompareConfig
from veridical.comparison.crosscoder import Drawn, crosscoded
from veridical.comparison.directions import Directions
from veridical.comparison.drift import Drift
from veridical.comparison.influence import Kept
from veridical.comparison.lens import LensDivergence, MeanDifference
from veridical.comparison.outputs import Outputs
from veridical.comparison.probe_transfer import ProbeRows, transferred, usable
from veridical.comparison.procrustes import procrustes_frame
from veridical.comparison.resampling import Resampling
from veridical.comparison.rows import Rows, are_ids, rows_of
from veridical.comparison.sae_shift import Firing, readable, shifted
from veridical.comparison.samples import sample
from veridical.comparison.streaming import Meter, stream
from veridical.comparison.weights import weight_change
from veridical.comparison.where import where_tables
from veridical.config import build, to_dict
from veridical.saes.logit_effects import token_text

if TYPE_CHECKING:
    from veridical.comparison.duo import Duo

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Asked:
    """What a part works on.

    Attributes:
        duo: The two models.
        data: What was given to compare on.
        rows: The same in tokens.
        probes, saes: Fitted on the reference.
        config: Options.
        resampling: Weights of pairs for intervals.
    """

    duo: Duo
    data: Any
    rows: Rows
    probes: Sequence[Any]
    saes: Sequence[Any]
    config: CompareConfig
    resampling: Resampling

    @property
    def is_text(self) -> bool:
        """Whether prompts can be continued: texts, chats or pairs, and not token ids."""
        return not (hasattr(self.data, "dtype") or are_ids(self.data))


def compare(
    duo: Duo,
    pairs: Any,
    probes: Sequence[Any] = (),
    saes: Sequence[Any] = (),
    config: CompareConfig | None = None,
    **options: Any,
) -> Comparison:
    """Measures what changed between a policy and its reference.

    Outputs and residual streams of all layers are measured in one pass of each model over the pairs, and
    nothing of it is stored. A second, short pass reads the policy's own samples, for outputs alone. Measures
    that do not apply to the two models are left out and named in `findings`.

    Args:
        duo: The two models, from `load_pair`.
        pairs: `Pairs`, texts, chats or token ids. A label (see `CompareConfig.label`) gives directions,
            completions give figures for answers, questions with options give behaviour.
        probes: Linear probes of the reference (fitted, or from `load_probe`): read on the policy and back,
            and their directions held against the change of the weights. `pairs` need the probe's label.
        saes: Sparse autoencoders of the reference, run on both models.
        config: Options.
        **options: Options by name.

    Raises:
        InputError: Data or options that do not fit.
        DataError: Rows that cannot be tokenised.
    """
    config = build(CompareConfig, config, **options)
    rows = rows_of(duo, pairs, config.label, max_length=config.max_length, on_long=config.on_long)
    resampling = Resampling(config.bootstrap, seed=config.seed)
    asked = Asked(duo, pairs, rows, tuple(probes), tuple(saes), config, resampling)
    tables: Tables = {}
    for part in PARTS:
        tables |= part(asked)
    return Comparison({name: table for name, table in tables.items() if len(table)}, _facts(asked))


def site_pairs(duo: Duo) -> dict[str, tuple[str, str]]:
    """Sites of the residual stream that go together, (policy, reference), from the first block's input on, by
    what they are called."""
    if not (duo.policy.n_layers and duo.reference.n_layers):
        return {}
    sites = [("resid_pre.0", "resid_pre.0")]
    sites += [(f"resid_post.{a}", f"resid_post.{b}") for a, b in duo.layers]
    return {a if a == b else f"{a} and {b}": (a, b) for a, b in sites}


# What reads the one pass


@dataclass(frozen=True)
class Measure:
    """Something that is taken on the way.

    Attributes:
        meters: What takes it.
        tables: What it found, once the pass is over.
        sites: Sites that it reads, by name, (policy, reference).
    """

    meters: Sequence[Meter]
    tables: Callable[[], Tables]
    sites: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def one_pass(asked: Asked) -> Tables:
    """Tables of every measure of outputs and representations, from one pass of both models over the rows."""
    measures = [made for measure in MEASURES if (made := measure(asked)) is not None]
    sites: dict[str, tuple[str, str]] = {}
    for measure in measures:
        sites |= measure.sites
    meters = [meter for measure in measures for meter in measure.meters]
    stream(
        asked.duo, asked.rows, meters, asked.resampling, sites=sites, logits=asked.duo.applies("KL"),
        batch_tokens=asked.config.batch_tokens, progress=asked.config.progress,
    )  # fmt: skip
    tables: Tables = {}
    for measure in measures:
        tables |= measure.tables()
    return tables


def _outputs(asked: Asked) -> Measure | None:
    if not asked.duo.applies("KL"):
        return None
    meter = Outputs(asked.duo.vocabulary, asked.resampling)
    return Measure([meter], lambda: _output_tables(asked.duo, asked.rows, meter))


def _geometry(asked: Asked) -> Measure | None:
    sites = site_pairs(asked.duo)
    if not sites:
        return None
    meter, kept = CKA(list(sites)), Kept(list(sites), asked.resampling)

    def tables() -> Tables:
        found = {"cka": meter.frame(kept)}
        if asked.duo.applies("Procrustes"):
            found["procrustes"] = procrustes_frame(meter.sites, meter.products, kept)
        return found

    return Measure([meter, kept], tables, sites)


def _drift(asked: Asked) -> Measure | None:
    sites = site_pairs(asked.duo)
    if not sites or not asked.duo.applies("drift"):
        return None
    meter = Drift(list(sites), asked.resampling)
    return Measure(
        [meter], lambda: {"drift": meter.frame(), "drift by position": meter.position_frame()}, sites
    )


def _directions(asked: Asked) -> Measure | None:
    sites, rows = site_pairs(asked.duo), asked.rows
    if not sites or not asked.duo.applies("directions") or len(set(rows.labels.tolist()) - {-1}) != 2:
        return None
    meter = Directions(list(sites), rows.labels, rows.groups, asked.resampling)
    return Measure([meter], lambda: {"directions": meter.frame()}, sites)


def _difference(asked: Asked) -> Measure | None:
    sites, duo = site_pairs(asked.duo), asked.duo
    if not sites or not duo.applies("difference lens"):
        return None
    meter = MeanDifference(list(sites), asked.resampling)
    return Measure(
        [meter], lambda: {"difference lens": meter.frame(duo, lambda id: token_text(duo.policy, id))}, sites
    )


def _lens(asked: Asked) -> Measure | None:
    sites = site_pairs(asked.duo)
    if not sites or not asked.duo.applies("logit-lens divergence"):
        return None
    meter = LensDivergence(asked.duo, list(sites), asked.resampling, asked.config.lens_tokens)
    return Measure([meter], lambda: {"logit-lens divergence": meter.frame()}, sites)


def _probes(asked: Asked) -> Measure | None:
    if not asked.probes:
        return None
    wanted, missing = usable(asked.probes, asked.duo, asked.data, asked.rows)
    meter = ProbeRows(wanted, asked.rows, asked.data)
    return Measure(
        [meter] if wanted else [],
        lambda: transferred(wanted, meter, asked.duo, asked.resampling, missing),
        {each.site: (each.site, each.site) for each in wanted},
    )


def _saes(asked: Asked) -> Measure | None:
    if not asked.saes:
        return None
    readable_ones, missing = readable(asked.saes, asked.duo)
    meters = [Firing(name, site, sae, asked.resampling) for name, site, sae in readable_ones]
    return Measure(
        meters, lambda: shifted(meters, missing), {meter.site: (meter.site, meter.site) for meter in meters}
    )


def _crosscoder(asked: Asked) -> Measure | None:
    config, duo = asked.config, asked.duo
    if config.crosscoder is None or not duo.applies("crosscoder"):
        return None
    short = duo.policy.resolve(config.crosscoder)[0].short
    sites = {name: pair for name, pair in site_pairs(duo).items() if pair[0] == short}
    sites = sites or {short: (short, short)}
    meter = Drawn(next(iter(sites)), asked.resampling, config.crosscoder_tokens)
    return Measure([meter], lambda: crosscoded(meter, config, lambda id: token_text(duo.policy, id)), sites)


MEASURES: tuple[Callable[[Asked], Measure | None], ...] = (
    _outputs, _geometry, _drift, _directions, _difference, _lens, _probes, _saes, _crosscoder,
)  # fmt: skip
"""What reads the one pass; each says None where it does not apply."""


def _output_tables(duo: Duo, rows: Rows, meter: Outputs) -> Tables:
    def names(token: int) -> str:
        return token_text(duo.policy, token)

    return {
        f"outputs on {rows.source}": meter.frame(),
        f"outputs by position on {rows.source}": meter.position_frame(),
        f"shifted tokens on {rows.source}": meter.shift_frame(names),
        f"tokens before the difference on {rows.source}": meter.token_frame(names),
        f"calibration on {rows.source}": meter.calibration_frame(),
        f"texts on {rows.source}": meter.text_frame(names),
    }


# The other parts


def samples(asked: Asked) -> Tables:
    """Outputs on the policy's own samples, from a second, short pass."""
    duo, config = asked.duo, asked.config
    if not (config.samples and asked.is_text and duo.applies("policy samples")):
        return {}
    rows = sample(
        duo, asked.data, count=config.samples, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, on_long=config.on_long, seed=config.seed,
    )  # fmt: skip
    meter = Outputs(duo.vocabulary, asked.resampling)
    stream(duo, rows, [meter], asked.resampling, batch_tokens=config.batch_tokens, progress=config.progress)
    return _output_tables(duo, rows, meter)


def conduct(asked: Asked) -> Tables:
    """Behaviour and generations."""
    return behaviour(asked.duo, asked.data, asked.config) if asked.is_text else {}


def where(asked: Asked) -> Tables:
    """Where in the network the difference in behaviour sits."""
    if not (asked.config.where and asked.is_text and asked.duo.applies("cross-model patching")):
        return {}
    return where_tables(asked.duo, asked.data, asked.config)


def weights(asked: Asked) -> Tables:
    """Changes of the weights, and along the probes' directions."""
    if not (asked.config.weights and asked.duo.applies("weights")):
        return {}
    directions = {}
    for at, probe in enumerate(asked.probes):
        site = str(getattr(getattr(probe, "origin_", None), "site", "") or "")
        directions[f"probe {at} {site}".strip()] = probe.direction_
    found = weight_change(asked.duo, directions)
    return {
        "weights": found.modules,
        "weights by layer": found.by_layer(),
        "weight spectra": found.spectra,
        "weights along directions": found.overlaps,
    }


PARTS: tuple[Callable[[Asked], Tables], ...] = (one_pass, samples, conduct, where, weights)
"""The parts of a comparison, in the order in which their tables are shown."""


def _facts(asked: Asked) -> dict[str, Any]:
    duo, rows, config = asked.duo, asked.rows, asked.config
    return {
        "policy": duo.policy.path,
        "policy_fingerprint": duo.policy.fingerprint(),
        "reference": duo.reference.path,
        "reference_fingerprint": duo.reference.fingerprint(),
        "data": rows.name,
        "data_fingerprint": rows.fingerprint,
        "notes": list(duo.notes),
        "not_applicable": dict(duo.not_applicable),
        "options": {name: value for name, value in to_dict(config).items() if name != "progress"},
        "seed": config.seed,
        "said": (
            f"{len(rows)} rows of {rows.name}, {rows.tokens} tokens. KL is over the whole vocabulary, policy "
            f"to reference. Intervals are 95 %, over {config.bootstrap} Poisson resamples of whole pairs."
        ),
    }
