"""A probe moved to another model through paired activations.

Both models read the same rows. A map from model B's site to model A's is fitted on the rows of the fitted
pairs, without a label, and A's probe is read through it: `decision(x_b) = decision_A(map(x_b))`, which is
linear in `x_b` and so a probe of B. Two maps are there. Ridge regression predicts; since the map is linear,
regressing A's whole activation and then reading it is the same as regressing the decision value alone, which
is what is done, with the penalty chosen on folds by pair. The orthogonal Procrustes map (Schonemann 1966, "A
generalized solution of the orthogonal Procrustes problem") only turns, and scales once, so it asks more of
the two models. That learned maps between the activations of two models carry interventions over is reported
by Oozeer et al. (2025, arXiv:2503.04429). Beside the moved probe stand B's own and what maps fitted on
shuffled pairs reach.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical import config as configs
from veridical.config import ProbeConfig
from veridical.errors import DataError, unknown
from veridical.probes import evaluate
from veridical.probes.base import LinearProbe
from veridical.probes.card import interval, number
from veridical.probes.crossfit import fold_numbers
from veridical.probes.data import Source, Where, as_conditions, choose_rows, meets, site_name
from veridical.probes.duplicates import without_copies
from veridical.probes.logistic import LogisticProbe
from veridical.probes.origin import Origin
from veridical.probes.result import ProbeSweep
from veridical.probes.sequence import SequenceProbe
from veridical.probes.solver import Design
from veridical.probes.sweep import as_estimator, check_config, run_sweep
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.activations import Activations
    from veridical.reporting.section import Section

Method = Literal["ridge", "procrustes"]
PENALTIES = tuple(10.0**power for power in range(-6, 3))
"""Ridge penalties that are tried, in units of the mean square of a standardised row."""
OWN_A, MOVED, OWN_B, CONTROL, TEXT = (
    "A's probe on A",
    "A's probe moved to B",
    "B's own probe",
    "moved by shuffled pairs",
    "text alone on B",
)


@dataclass(frozen=True, repr=False)
class ModelTransfer(Saved):
    """A probe of model A read in model B.

    Attributes:
        probe: The moved probe: a linear probe on B's site.
        own: B's own sweep, with the same held-out pairs.
        first: A's sweep.
        method: How the map was fitted.
        fit: Share of the variance of A's decision values that the map explains, on folds of the fitted pairs.
        table: One line per probe: `probe`, `site`, `auroc` with its 95 % interval, and `accuracy`.
        control: `[shuffles]`, AUROC of probes moved by maps that were fitted on shuffled pairs.
        lead_over_own: AUROC of the moved probe less that of B's own, over the same resamples.
        cosine: Cosine of the moved and B's own direction, where that is at the same site; else None.
        notes: What should be known about rows and texts.
    """

    probe: LinearProbe
    own: ProbeSweep
    first: ProbeSweep
    method: str
    fit: float
    table: pd.DataFrame
    control: np.ndarray
    lead_over_own: evaluate.Estimate
    cosine: float | None
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One line per probe: where it reads, and its figures on the held-out pairs."""
        return self.table.copy()

    def made_by(self) -> dict[str, Any]:
        """Seed, and model and data of B, whose probe this makes; A's stand in its sweep."""
        return self.probe.origin_.facts()

    def findings(self) -> list[str]:
        """What the figures say, in sentences."""
        lines = {line["probe"]: line for line in self.table.to_dict("records")}
        lead = self.lead_over_own
        said = [
            f"A's probe for {self.first.config.target} ({_said(lines[OWN_A])} on A) has AUROC "
            f"{_said(lines[MOVED])} on B when it is moved by a {self.method} map, and B's own probe has "
            f"{_said(lines[OWN_B])}: a difference of {interval(lead.value, lead.low, lead.high)}.",
            f"The map explains {number(self.fit)} of the variance of A's decision values on folds.",
        ]
        if len(self.control):
            limit = float(np.quantile(self.control, 0.95))
            said.append(
                f"Maps fitted on shuffled pairs reach {number(float(self.control.mean()))} on average and "
                f"stay below {number(limit)} in 95 % of {len(self.control)} draws."
            )
        if self.cosine is not None:
            said.append(f"The cosine of the moved direction and B's own is {self.cosine:.2f}.")
        return [*said, *self.notes]

    def figure(self) -> go.Figure:
        """AUROC of each probe with its interval."""
        from veridical.probes.figure import dots

        return dots(self.table, f"A probe for {self.first.config.target} moved to another model")

    def report_section(self) -> Section:
        """The transfer as a section of a report."""
        from veridical.reporting.section import Section

        lines = {line["probe"]: line for line in self.table.to_dict("records")}
        return Section(
            title=f"Probe for {self.first.config.target} moved to another model",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),),
            tables=(("Figures on held-out pairs", self.table.round(3)),),
            headline=(("AUROC of the moved probe", _said(lines[MOVED])),),
        )

    def __repr__(self) -> str:
        lines = {line["probe"]: line for line in self.table.to_dict("records")}
        shown = ", ".join(f"{name} {_said(lines[name])}" for name in (OWN_A, MOVED, OWN_B))
        return f"ModelTransfer({self.first.config.target}: {shown})"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        table = self.table.round(3).to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{said}{table}"


def transfer_to(
    acts: Activations | Mapping[str, Any],
    other: Activations | Mapping[str, Any],
    config: ProbeConfig | None = None,
    *,
    method: Method = "ridge",
    site: str | None = None,
    other_site: str | None = None,
    probe: LinearProbe | str | None = None,
    target: str | None = None,
    rows: Any = None,
    other_rows: Any = None,
    where: Where | None = None,
    holdout: Where | None = None,
    **options: Any,
) -> ModelTransfer:
    """Fits a probe on model A, moves it to model B, and judges it there beside B's own.

    Args:
        acts: Activations of model A, as for `fit_probes`.
        other: Activations of model B on the same rows in the same order; the labels may differ.
        config: Options; keyword `options` of `ProbeConfig` win over it.
        method: `ridge` or `procrustes`.
        site: A's site; when not given, the one that A's folds choose.
        other_site: B's site; when not given, the one whose map explains most of A's decision values on folds.
        probe: Estimator or its name; logistic when not given.
        target: Label column, in both.
        rows: Table of label columns, for dicts of arrays.
        other_rows: B's table where its labels differ; `rows` when not given.
        where: Conditions on the rows of each.
        holdout: Conditions that mark rows which neither a probe nor the map is fitted on.
        **options: Fields of `ProbeConfig`.

    Raises:
        DataError: Rows that differ, too few pairs, an estimator over sequences.
        UnknownNameError: A site, column, option or method that does not exist.
    """
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    given = {"where": where, "holdout": holdout}
    options |= {name: as_conditions(value) for name, value in given.items() if value is not None}
    if target is not None:
        options["target"] = target
    config = configs.build(ProbeConfig, config, **options)
    check_config(config)
    estimator = as_estimator(probe)
    if isinstance(estimator, SequenceProbe) or estimator.name == "stacked":
        raise DataError(
            f"{estimator.name} reads more than one vector; transfer_to moves probes of one vector"
        )
    a = without_copies(estimator.source(acts, None, None, None, rows), config.allow_duplicates)
    b = estimator.source(other, None, None, None, rows if other_rows is None else other_rows)
    _check_paired(a, b, site, other_site)
    return _Move(a, replace(b, groups=a.groups), config, estimator, method).run(site, other_site)


class _Move:
    """The steps over rows that were checked to be the same; both models share pairs and split."""

    def __init__(self, a: Source, b: Source, config: ProbeConfig, probe: LinearProbe, method: str) -> None:
        self.config, self.probe, self.method = config, probe, method
        self.task_a = choose_rows(a, config, config.where)
        test = np.isin(a.groups, a.groups[self.task_a.test])
        split = np.where(test, "test", "train").astype(object)
        self.a = replace(a, columns={**a.columns, "split": split})
        self.b = replace(b, columns={**b.columns, "split": split})
        self.task_b = choose_rows(self.b, config, config.where)
        free = ~test
        if config.holdout:
            free &= ~meets(a, config.holdout)
        self.paired = np.flatnonzero(free)
        self.folds = fold_numbers(a.groups[free], config.folds, config.seed, np.zeros(len(self.paired)))

    def run(self, site: str | None, other_site: str | None) -> ModelTransfer:
        first = self._sweep(self.a, self.task_a, site)
        probe = first.best()
        # Site of A, then the decision values that B's activations are to give.
        vectors = self.a.vectors(first.best_site, self.paired)
        wanted = torch.from_numpy(probe.decision_function(vectors)).to(vectors)
        sites = [site_name(other_site, self.b.sites)] if other_site else list(self.b.sites)
        maps = {name: self._map(name, probe, vectors, wanted) for name in sites}
        best = max(maps, key=lambda name: maps[name].fit)
        own = self._sweep(self.b, self.task_b, other_site)
        return self._result(first, own, best, maps[best])

    def _sweep(self, source: Source, task: Any, site: str | None) -> ProbeSweep:
        if site is not None:
            source = replace(source, sites=(site_name(site, source.sites),))
        return run_sweep(source, task, self.config, self.probe)

    def _map(self, site: str, probe: LinearProbe, vectors: Tensor, wanted: Tensor) -> ReadThrough:
        x = self.b.vectors(site, self.paired)
        random = np.random.default_rng([self.config.seed, 6])
        shuffles = [random.permutation(len(x)) for _ in range(self.config.shuffles)]
        if self.method == "ridge":
            targets = torch.stack([wanted, *(wanted[torch.from_numpy(s)] for s in shuffles)], 1)
            return ridge_map(x, targets, self.folds)
        coefficients = torch.from_numpy(probe.coef_[0]).to(x)
        intercept = float(probe.intercept_[0])
        read = [procrustes_map(x, vectors, coefficients, intercept)]
        read += [procrustes_map(x, vectors[torch.from_numpy(s)], coefficients, intercept) for s in shuffles]
        predicted = torch.empty_like(wanted)
        for fold in np.unique(self.folds):
            held = torch.from_numpy(self.folds == fold)
            w, shift = procrustes_map(x[~held], vectors[~held], coefficients, intercept)
            predicted[held] = x[held] @ w + shift
        return ReadThrough(
            torch.stack([w for w, _ in read]),
            torch.stack([b for _, b in read]),
            _explained(predicted, wanted),
        )

    def _result(self, first: ProbeSweep, own: ProbeSweep, site: str, found: ReadThrough) -> ModelTransfer:
        held = self.b.vectors(site, self.task_b.test)
        scores = evaluate.settled((held @ found.coefficients.T + found.intercepts).cpu().numpy())
        truth = self.task_b.positive[self.task_b.test]
        weights = evaluate.resample_weights(
            self.b.groups[self.task_b.test], self.config.bootstrap, self.config.seed
        )
        own_scores = own[own.best_site].test_scores
        control = evaluate.auroc(scores[:, 1:], truth)
        moved = LogisticProbe(standardise=self.probe.standardise)
        moved.adopt(
            self.task_b.classes,
            found.coefficients[0].cpu().numpy(),
            found.intercepts[:1].cpu().numpy(),
            1,
        )
        measured = evaluate.measure(scores[:, 0], truth, weights)
        lines = [
            _line(OWN_A, first.best_site, first[first.best_site].metrics),
            _line(MOVED, site, measured),
            _line(OWN_B, own.best_site, own[own.best_site].metrics),
        ]
        if len(control):
            low, high = np.quantile(control, [0.025, 0.975])
            spread = evaluate.Estimate(float(control.mean()), float(low), float(high))
            lines.append(_line(CONTROL, site, {"auroc": spread}))
        if own.text is not None:
            lines.append(_line(TEXT, "text", own.text))
        facts = self.b.facts
        moved.origin_ = Origin(
            site=site,
            tokens=facts.get("tokens"),
            target=self.config.target,
            where=tuple(self.config.where),
            model=facts.get("model"),
            model_fingerprint=facts.get("model_fingerprint"),
            data_fingerprint=facts.get("data_fingerprint"),
            metrics={
                **{name: value for name, value in lines[1].items() if isinstance(value, float)},
                **({} if own.text is None else own.text["auroc"].columns("text_auroc")),
            },
            rows={
                "paired_vectors": len(self.paired),
                "test_vectors": len(truth),
                "test_positive": int(truth.sum()),
            },
            notes=(
                f"B's own probe has AUROC {_said(lines[2])} at {own.best_site} on the same held-out pairs.",
                f"Moved from {first.best_site} of {self.a.facts.get('model') or 'another model'} by a "
                f"{self.method} map fitted on {len(self.paired)} paired vectors.",
            ),
            seed=self.config.seed,
        )
        same = own.best_site == site
        return ModelTransfer(
            probe=moved,
            own=own,
            first=first,
            method=self.method,
            fit=found.fit,
            table=pd.DataFrame(lines),
            control=control,
            lead_over_own=evaluate.difference(scores[:, 0], own_scores, truth, weights),
            cosine=float(moved.direction_ @ own.best().direction_) if same else None,
            notes=tuple(dict.fromkeys((*self.a.notes, *self.b.notes))),
        )


@dataclass(frozen=True)
class ReadThrough:
    """A probe of one model as one of another, through maps: `[1 + shuffles, d]` and `[1 + shuffles]`, true
    pairs first; fit on folds."""

    coefficients: Tensor
    intercepts: Tensor
    fit: float


def ridge_map(x: Tensor, targets: Tensor, folds: np.ndarray) -> ReadThrough:
    """Ridge regression of `targets` `[n, k]` on `x` `[n, d]`; the penalty is that of the first, by folds."""
    design = Design.of(x)
    rows, size = design.rows[:, :-1], float(design.rows[:, :-1].square().sum(1).mean())
    penalties = torch.tensor(PENALTIES, dtype=torch.float64, device=x.device) * size * len(x)
    predicted = rows.new_empty(len(x), len(penalties))
    for fold in np.unique(folds):
        held = torch.from_numpy(folds == fold).to(x.device)
        weights, shift = _regress(rows[~held], targets[~held, :1], penalties)
        predicted[held] = rows[held] @ weights[..., 0].T + shift[:, 0]
    fits = [_explained(predicted[:, at], targets[:, 0]) for at in range(len(penalties))]
    # The strongest penalty wins ties.
    best = max(range(len(fits)), key=lambda at: (round(fits[at], 9), at))
    weights, shift = _regress(rows, targets, penalties[best : best + 1])
    coefficients, intercepts = design.raw(torch.cat([weights[0], shift]))
    return ReadThrough(coefficients, intercepts, fits[best])


def _regress(rows: Tensor, targets: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `[p, r, k]` and intercepts `[p, k]` of least squares with each penalty."""
    mean, level = rows.mean(0), targets.mean(0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    pulled = vectors.T @ (centred.T @ (targets - level))
    weights = vectors @ (pulled / (values[:, None].clamp_min(0) + penalties[:, None, None]))
    return weights, level - mean @ weights


def procrustes_map(x: Tensor, y: Tensor, coefficients: Tensor, intercept: float) -> tuple[Tensor, Tensor]:
    """A probe of `y` `[n, e]` as one of `x` `[n, d]`, `[d]` and `[]`: through the best turn and scale."""
    centre_x, centre_y = x.mean(0), y.mean(0)
    centred = x - centre_x
    u, values, vt = torch.linalg.svd(centred.T @ (y - centre_y), full_matrices=False)
    turn = u @ vt
    scale = values.sum() / (centred @ turn).square().sum().clamp_min(1e-300)
    weights = scale * (turn @ coefficients)
    return weights, centre_y @ coefficients + intercept - centre_x @ weights


def _explained(predicted: Tensor, wanted: Tensor) -> float:
    """Share of the variance of `wanted` that is predicted; below 0 where the mean does better."""
    spread = (wanted - wanted.mean()).square().sum()
    return float(1 - (wanted - predicted).square().sum() / spread.clamp_min(1e-300))


def _check_paired(a: Source, b: Source, site: str | None, other_site: str | None) -> None:
    for source, name in ((a, site), (b, other_site)):
        if name is not None:
            site_name(name, source.sites)
    if len(a) != len(b):
        raise DataError(f"model A has {len(a)} vectors and model B {len(b)}; expected the same rows in order")
    if not np.array_equal(a.units, b.units):
        raise DataError("the vectors of the two models come from other rows; collect the same tokens of each")
    if a.texts is not None and b.texts is not None:
        different = np.flatnonzero(np.array([one != two for one, two in zip(a.texts, b.texts)]))
        if len(different):
            raise DataError(
                f"vector {different[0]} was read after another text in each model ({len(different)} such); "
                "expected the same rows in order"
            )


def _line(name: str, site: str, metrics: Mapping[str, evaluate.Estimate]) -> dict[str, Any]:
    line: dict[str, Any] = {"probe": name, "site": site}
    for figure in ("auroc", "accuracy"):
        value = metrics.get(figure)
        found = (np.nan,) * 3 if value is None else (value.value, value.low, value.high)
        line |= {f"{figure}{end}": float(v) for end, v in zip(("", "_low", "_high"), found)}
    return line


def _said(line: Mapping[str, Any]) -> str:
    return interval(line["auroc"], line["auroc_low"], line["auroc_high"])
