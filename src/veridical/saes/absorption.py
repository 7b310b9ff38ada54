"""Feature absorption: a latent that should fire for a label and is silent, as a more special one took over.

Chanin et al. 2024 (arXiv:2409.14507): where a feature implies another ("short" implies "starts with s"), an
SAE saves an active latent by writing the general direction into the special latent, and the general latent
goes silent there. It is measured here as in SAEBench (Karvonen et al. 2025, arXiv:2503.09532), which needs no
run of the model:

1. A linear probe for the label on the activations gives the direction p of the feature.
2. Main latents: k-sparse probes of growing k; a further latent counts while it raises F1 by more than 0.03
   (a feature that is split over several latents is no absorption). So a special latent that takes over more
   than a few percent of the rows can count as a main one: the figure is a lower bound.
3. On held-out rows with the label, on which the probe is right: a row is fully absorbed if no main latent
   fires, while the latent with the largest contribution along p has a cosine with p of at least 0.025 and
   makes up at least 0.4 of the row's length along p. The absorption fraction asks the same in part: what up
   to three other latents with a cosine of at least 0.1 supply, of what they and the main latents supply
   together.

Length along p is taken from the decoder bias, which is no latent's doing (SAEBench takes it from 0).
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical import config as configs
from veridical.config import ProbeConfig
from veridical.errors import DataError, InputError
from veridical.probes import evaluate
from veridical.probes.card import interval
from veridical.probes.data import Source, Task, Where, as_conditions, choose_rows, read_source
from veridical.probes.evaluate import Estimate
from veridical.probes.logistic import LogisticProbe
from veridical.saes.row_norm import RowNormalised
from veridical.saes.sparse_probing import rank_latents, vectors
from veridical.saes.units import unscaled

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.reporting.section import Section
    from veridical.saes.base import SAE

SPLIT_GAIN = 0.03
MOST_SPLITS = 10
FULL_COSINE = 0.025
PART_COSINE = 0.1
LEAST_SHARE = 0.4
MOST_ABSORBERS = 3
SILENT = 1e-8


@dataclass(frozen=True, repr=False)
class Absorption:
    """How much of a label's feature is absorbed by latents that are not its own.

    Attributes:
        target: The label.
        main: Its own latents.
        full: Share of rows with the label on which none of them fires and another latent takes their place.
        fraction: Mean absorption fraction of these rows.
        silent: Share of these rows on which no main latent fires, absorbed or not.
        absorbers: One line per absorbing latent: the rows that it absorbs and its cosine with the direction.
        probe_f1: F1 of the linear probe on the held-out pairs.
        main_f1: F1 of the probe on the main latents there.
        counts: Rows and pairs that were judged.
        notes: What a reader should know.
    """

    target: str
    main: tuple[int, ...]
    full: Estimate
    fraction: Estimate
    silent: Estimate
    absorbers: pd.DataFrame
    probe_f1: float
    main_f1: float
    counts: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One line with every figure."""
        return pd.DataFrame(
            [
                {
                    "target": self.target,
                    "main": ", ".join(map(str, self.main)),
                    **self.full.columns("full"),
                    **self.fraction.columns("fraction"),
                    **self.silent.columns("silent"),
                    "probe_f1": self.probe_f1,
                    "main_f1": self.main_f1,
                    **self.counts,
                }
            ]
        )

    def report_section(self) -> Section:
        """The figures and the absorbing latents as a section of a report."""
        from veridical.reporting.section import Section

        text = (
            f"The label has {len(self.main)} latent(s) of its own ({', '.join(map(str, self.main))}), which "
            f"are silent on {_said(self.silent)} of the rows with the label; on {_said(self.full)} another "
            f"latent wholly takes their place, and {_said(self.fraction)} of the feature is absorbed on "
            "average."
        )
        return Section(
            title=f"Feature absorption: {self.target}",
            text="\n\n".join([text, *self.notes]),
            tables=(
                ("Figures, 95 % intervals over pairs", self.to_frame().round(3)),
                ("Latents that absorb", self.absorbers.round(3)),
            ),
            headline=((f"absorbed: {self.target}", _said(self.full)),),
        )

    def __repr__(self) -> str:
        return (
            f"Absorption({self.target}: {_said(self.full)} of rows absorbed, fraction "
            f"{_said(self.fraction)}; main latents {list(self.main)}, {self.counts['rows']} rows)"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().round(3).to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{table}"


def measure_absorption(
    sae: SAE,
    acts: Activations | Mapping[str, Any],
    config: ProbeConfig | None = None,
    *,
    target: Any = None,
    groups: Any = None,
    where: Where | None = None,
    **options: Any,
) -> Absorption:
    """Measures how much of a label's feature other latents absorb.

    Args:
        sae: One SAE of the activations of a single site.
        acts: Activations with its site and the labels of `Pairs`, or a mapping of site to vectors.
        config: Options as for `fit_probes`; keyword `options` win over it.
        target: Label column of two classes, or labels `[n]`; the second class is the feature being there.
        groups: `[n]`, pair of each vector, where `acts` is a mapping.
        where: Conditions on the rows, as in `fit_probes`.
        **options: Fields of `ProbeConfig`: `test_fraction`, `bootstrap`, `seed`, ...

    Raises:
        InputError: An SAE that normalises each row.
        UnknownNameError: A column or option that does not exist.
        DataError: Empty data, one class, too few pairs, or a label that the linear probe cannot read either.
    """
    from veridical.probes.data import TARGET
    from veridical.probes.sweep import check_config

    if target is not None:
        options["target"] = target if isinstance(target, str) else TARGET
    if where is not None:
        options["where"] = as_conditions(where)
    config = configs.build(ProbeConfig, config, **options)
    check_config(config)
    if isinstance(sae, RowNormalised):
        raise InputError("absorption compares lengths across rows, and this SAE normalises each row")
    sae = unscaled(sae)
    source = read_source(acts, target, groups, None, None)
    task = choose_rows(source, config, config.where)
    latents, plain = vectors(sae, acts)
    probe = LogisticProbe().fit(plain[task.fit], task.positive[task.fit])
    main, main_f1 = _main(latents, source, task, config)
    right = probe.decision_function(plain[task.test]) > 0
    truth = task.positive[task.test]
    rows = task.test[truth & right]
    if not len(rows):
        raise DataError(
            f"the linear probe finds {config.target} on no held-out row: there is no feature to absorb"
        )
    return _judged(sae, latents[rows], plain[rows], probe.direction_, main, source.groups[rows], config, {
        "probe_f1": _f1(right, truth), "main_f1": main_f1,
    })  # fmt: skip


def _main(
    latents: np.ndarray, source: Source, task: Task, config: ProbeConfig
) -> tuple[tuple[int, ...], float]:
    """The label's own latents, and F1 on the held-out rows of a probe on them.

    F1 while choosing is that of out-of-fold calls within the fitted pairs.
    """
    from veridical.pairs.splits import folds

    positive = task.positive[task.fit]
    order = rank_latents(_positive_only(latents[task.fit], positive), positive, MOST_SPLITS)
    parts = folds(source.groups[task.fit], config.folds, config.seed, positive)
    best, kept = -1.0, 1
    for k in range(1, len(order) + 1):
        x, called = latents[np.ix_(task.fit, order[:k])], np.zeros(len(task.fit), dtype=bool)
        for train, held in parts:
            if len(np.unique(positive[train])) == 2:
                called[held] = LogisticProbe().fit(x[train], positive[train]).decision_function(x[held]) > 0
        found = _f1(called, positive)
        if found <= best + SPLIT_GAIN:
            break
        best, kept = found, k
    main = order[:kept]
    probe = LogisticProbe().fit(latents[np.ix_(task.fit, main)], positive)
    called = probe.decision_function(latents[np.ix_(task.test, main)]) > 0
    return tuple(map(int, main)), _f1(called, task.positive[task.test])


def _positive_only(latents: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Latents with those silenced that are weaker where the label is there: a feature fires for its label."""
    stronger = latents[positive].mean(0) > latents[~positive].mean(0)
    return np.where(stronger, latents, 0)


def _judged(
    sae: SAE,
    latents: np.ndarray,
    plain: np.ndarray,
    direction: np.ndarray,
    main: tuple[int, ...],
    groups: np.ndarray,
    config: ProbeConfig,
    scores: dict[str, float],
) -> Absorption:
    W_dec, bias = (value.detach().double().cpu().numpy() for value in (sae.W_dec, sae.b_dec))
    along = W_dec @ direction
    norms = np.linalg.norm(W_dec, axis=1)
    cosines = np.divide(along, norms, out=np.zeros(len(along)), where=norms > 0)
    length = (plain - bias) @ direction
    supplied = latents * along  # what each latent adds along the direction, [rows, F]
    own = np.zeros(len(along), dtype=bool)
    own[list(main)] = True
    silent = np.asarray((latents[:, own] < SILENT).all(1))
    others = np.where(own, -np.inf, supplied)
    strongest = others.argmax(1)
    share = np.divide(
        others[np.arange(len(others)), strongest], length, out=np.zeros(len(length)), where=length > 0
    )
    full = silent & (length > 0) & (cosines[strongest] >= FULL_COSINE) & (share >= LEAST_SHARE)
    fraction = _fractions(supplied, own, cosines, length)
    weights = evaluate.resample_weights(groups, config.bootstrap, config.seed)
    counts = np.bincount(strongest[full], minlength=len(along))
    found = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    notes = []
    if scores["probe_f1"] < 0.6:
        notes.append(
            f"The linear probe itself has F1 {scores['probe_f1']:.2f}: the feature is hardly there to be "
            "absorbed."
        )
    return Absorption(
        target=config.target,
        main=main,
        full=evaluate.share(full.astype(np.float64), weights),
        fraction=evaluate.share(fraction, weights),
        silent=evaluate.share(silent.astype(np.float64), weights),
        absorbers=pd.DataFrame(
            {
                "latent": found,
                "rows": counts[found],
                "share": counts[found] / len(full),
                "cosine": cosines[found],
            }
        ),
        counts={"rows": len(plain), "pairs": len(np.unique(groups))},
        notes=tuple(notes),
        **scores,
    )


def _fractions(supplied: np.ndarray, own: np.ndarray, cosines: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Absorption fraction of each row, from 0 to 1."""
    candidates = np.where(~own & (cosines >= PART_COSINE), np.maximum(supplied, 0), 0)
    count = min(MOST_ABSORBERS, candidates.shape[1])
    absorbed = -np.sort(-candidates, axis=1)[:, :count].sum(1)
    mine = supplied[:, own].sum(1)
    missing = length - mine
    taken = np.minimum(absorbed, missing)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(mine <= 0, 1.0, np.clip(taken / (taken + mine), 0, 1))
        counted = (missing > 0) & (length > 0) & (absorbed / length >= LEAST_SHARE)
    return np.asarray(np.where(counted, part, 0.0))


def _f1(called: np.ndarray, truth: np.ndarray) -> float:
    hits = int((called & truth).sum())
    return 2 * hits / max(int(called.sum()) + int(truth.sum()), 1)


def _said(value: Estimate) -> str:
    return interval(value.value, value.low, value.high)
