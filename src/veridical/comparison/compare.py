"""Compares a policy with its reference: outputs and representations in one pass, then samples and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from veridical.comparison.behaviour import behaviour
from veridical.comparison.cka import CKA
from veridical.comparison.comparison import Comparison
from veridical.comparison.config import CompareConfig
from veridical.comparison.directions import Directions
from veridical.comparison.drift import Drift
from veridical.comparison.lens import LensDivergence, MeanDifference
from veridical.comparison.outputs import Outputs
from veridical.comparison.procrustes import procrustes_frame
from veridical.comparison.resampling import Resampling
from veridical.comparison.rows import Rows, are_ids, rows_of
from veridical.comparison.samples import sample
from veridical.comparison.streaming import Meter, stream
from veridical.comparison.weights import weight_change
from veridical.comparison.where import where_tables
from veridical.config import build, to_dict
from veridical.saes.logit_effects import token_text

if TYPE_CHECKING:
    from veridical.comparison.duo import Duo


def compare(
    duo: Duo,
    pairs: Any,
    probes: Sequence[Any] = (),
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
        probes: Linear probes, whose directions are held against the change of the weights.
        config: Options.
        **options: Options by name.

    Raises:
        InputError: Data or options that do not fit.
        DataError: Rows that cannot be tokenised.
    """
    config = build(CompareConfig, config, **options)
    rows = rows_of(duo, pairs, config.label, max_length=config.max_length, on_long=config.on_long)
    resampling = Resampling(config.bootstrap, seed=config.seed)
    tables = one_pass(duo, rows, config, resampling)
    if config.samples and duo.applies("policy samples") and not _is_tokens(pairs):
        tables |= _sampled(duo, pairs, config, resampling)
    if not _is_tokens(pairs):
        tables |= behaviour(duo, pairs, config)
    if config.where and duo.applies("cross-model patching") and not _is_tokens(pairs):
        tables |= where_tables(duo, pairs, config)
    if config.weights and duo.applies("weights"):
        tables |= _weighed(duo, probes)
    return Comparison(
        {name: table for name, table in tables.items() if len(table)}, _facts(duo, rows, config)
    )


def site_pairs(duo: Duo) -> tuple[list[tuple[str, str]], list[str]]:
    """Sites that go together, (policy, reference), from the first block's input on, and what to call them."""
    if not (duo.policy.n_layers and duo.reference.n_layers):
        return [], []
    sites = [("resid_pre.0", "resid_pre.0")]
    sites += [(f"resid_post.{a}", f"resid_post.{b}") for a, b in duo.layers]
    return sites, [a if a == b else f"{a} and {b}" for a, b in sites]


def one_pass(duo: Duo, rows: Rows, config: CompareConfig, resampling: Resampling) -> dict[str, pd.DataFrame]:
    """Tables of every measure of outputs and representations, from one pass of both models over `rows`."""
    sites, names = site_pairs(duo)
    meters: dict[str, Meter] = {}
    if duo.applies("KL"):
        meters["outputs"] = Outputs(duo.vocabulary, resampling)
    if sites:
        meters["cka"] = CKA(names)
        if duo.applies("drift"):
            meters["drift"] = Drift(names, resampling)
        if duo.applies("directions") and len(set(rows.labels.tolist()) - {-1}) == 2:
            meters["directions"] = Directions(names, rows.labels, rows.groups, resampling)
        if duo.applies("difference lens"):
            meters["difference"] = MeanDifference(names, resampling)
        if duo.applies("logit-lens divergence"):
            meters["lens"] = LensDivergence(duo, names, resampling, config.lens_tokens)
    stream(
        duo, rows, list(meters.values()), resampling, sites=sites, logits="outputs" in meters,
        batch_tokens=config.batch_tokens, progress=config.progress,
    )  # fmt: skip
    tables: dict[str, pd.DataFrame] = {}
    for name, meter in meters.items():
        if isinstance(meter, Outputs):
            tables |= _output_tables(duo, rows, meter)
        elif isinstance(meter, Drift):
            tables |= {"drift": meter.frame(), "drift by position": meter.position_frame()}
        elif isinstance(meter, CKA):
            tables["cka"] = meter.frame()
            if duo.applies("Procrustes"):
                tables["procrustes"] = procrustes_frame(names, meter.products)
        elif isinstance(meter, LensDivergence):
            tables["logit-lens divergence"] = meter.frame()
        elif isinstance(meter, MeanDifference):
            tables["difference lens"] = meter.frame(duo, lambda token: token_text(duo.policy, token))
        elif isinstance(meter, Directions):
            tables[name] = meter.frame()
    return tables


def _output_tables(duo: Duo, rows: Rows, meter: Outputs) -> dict[str, pd.DataFrame]:
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


def _sampled(duo: Duo, pairs: Any, config: CompareConfig, resampling: Resampling) -> dict[str, pd.DataFrame]:
    rows = sample(
        duo, pairs, count=config.samples, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, on_long=config.on_long, seed=config.seed,
    )  # fmt: skip
    meter = Outputs(duo.vocabulary, resampling)
    stream(duo, rows, [meter], resampling, batch_tokens=config.batch_tokens, progress=config.progress)
    return _output_tables(duo, rows, meter)


def _weighed(duo: Duo, probes: Sequence[Any]) -> dict[str, pd.DataFrame]:
    directions = {}
    for at, probe in enumerate(probes):
        site = str(getattr(getattr(probe, "origin_", None), "site", "") or "")
        directions[f"probe {at} {site}".strip()] = probe.direction_
    found = weight_change(duo, directions)
    return {
        "weights": found.modules,
        "weights by layer": found.by_layer(),
        "weight spectra": found.spectra,
        "weights along directions": found.overlaps,
    }


def _is_tokens(data: Any) -> bool:
    return hasattr(data, "dtype") or are_ids(data)


def _facts(duo: Duo, rows: Rows, config: CompareConfig) -> dict[str, Any]:
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
