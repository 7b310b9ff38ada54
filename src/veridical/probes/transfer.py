"""Transfer: every probe on every data set, or on every scenario of one.

Rows of the matrix say what a probe was fitted on, columns what it was tested on. The diagonal is
cross-fitted by pair, with strength and site chosen inside (`crossfit`). Off the diagonal a probe of all rows
is tested; where a pair stands in both sets (the same fact under two scenarios, say), its rows are judged by
the probe of the fold that held that pair out, so that nothing leaks and no row is lost. Rows whose text
occurs among the fitted rows under another pair are left out and counted. A probe that holds on its own data
and nowhere else has read the data set (Marks and Tegmark 2023, arXiv:2310.06824, use such matrices to tell a
truth direction from a topic).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical import config as configs
from veridical.config import ProbeConfig
from veridical.errors import DataError, unknown
from veridical.probes import evaluate
from veridical.probes.base import LinearProbe
from veridical.probes.baseline import TextScorer, cross_fit_texts
from veridical.probes.card import number
from veridical.probes.crossfit import Nested, Plan, check_plan, cross_fit, fold_numbers
from veridical.probes.data import (
    Source,
    Where,
    as_conditions,
    meets,
    missing,
    site_name,
    two_classes,
)
from veridical.probes.origin import Origin
from veridical.probes.sweep import as_estimator, check_config
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.activations import Activations
    from veridical.reporting.section import Section

UNUSED = ("test_fraction", "shuffles", "holdout", "memory_gb", "solve_on")
"""Options of `ProbeConfig` that mean nothing here."""


@dataclass(frozen=True, repr=False)
class TransferMatrix(Saved):
    """AUROC of every probe on every data set.

    Attributes:
        config: How the probes were fitted.
        names: The data sets, in order.
        table: One line per cell; see `to_frame`.
        probes: The probe of all rows of each data set, at the site that its folds chose.
        facts: Tokens, model and fingerprints; those of the data in the order of the sets.
        notes: What should be known about rows and texts.
    """

    config: ProbeConfig
    names: tuple[str, ...]
    table: pd.DataFrame
    probes: Mapping[str, LinearProbe]
    facts: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One line per cell: `trained_on`, `tested_on`, `site`, `auroc` with its 95 % interval, `rows`,
        `pairs`, `positive`, `shared_pairs` (tested rows of these were judged by a probe that held their pair
        out), `left_out` (duplicates of fitted rows), and with texts `text_auroc` and `lead_over_text`."""
        return self.table.copy()

    def matrix(self) -> pd.DataFrame:
        """AUROC with a row per training set and a column per test set."""
        wide = self.table.pivot(index="trained_on", columns="tested_on", values="auroc")
        return wide.loc[list(self.names), list(self.names)]

    def findings(self) -> list[str]:
        """What the figures say, in sentences."""
        wide = self.matrix().to_numpy()
        off = ~np.eye(len(wide), dtype=bool)
        said = [
            f"On their own data the probes have AUROC {number(float(np.nanmean(np.diag(wide))))} on average "
            f"(cross-fitted by pair), on the other sets {number(float(np.nanmean(wide[off])))}."
        ]
        rows = np.nanmean(np.where(off, wide, np.nan), axis=1)
        best = int(np.nanargmax(rows))
        said.append(
            f"The probe fitted on {self.names[best]} carries over best ({number(float(rows[best]))} on "
            "average)."
        )
        lines = self.table.to_dict("records")
        lost = [x for x in lines if x["trained_on"] != x["tested_on"] and x["auroc_low"] <= 0.5]
        if lost:
            named = [f"{x['trained_on']} on {x['tested_on']}" for x in lost]
            shown = ", ".join(named[:6]) + (f", and {len(named) - 6} more" if len(named) > 6 else "")
            said.append(f"Not surely better than chance: {shown}.")
        if "lead_over_text" in self.table:
            solved = sum(line["lead_over_text_low"] <= 0 for line in lines)
            said.append(
                f"In {solved} of {len(self.table)} cells the probe does not surely lead over its text."
            )
        dropped = sum(line["left_out"] for line in lines)
        if dropped:
            said.append(f"{dropped} tested rows repeat a fitted row's text under another pair; left out.")
        return [*said, *self.notes]

    def figure(self) -> go.Figure:
        """The matrix as a heat map, with each cell's figure and interval written in it."""
        from veridical.probes.figure import heat_map

        return heat_map(self)

    def report_section(self) -> Section:
        """The matrix as a section of a report."""
        from veridical.reporting.section import Section

        wide = self.matrix().to_numpy()
        off = float(np.nanmean(wide[~np.eye(len(wide), dtype=bool)]))
        text = (
            f"Probes for {self.config.target}, fitted on each of {len(self.names)} sets and tested on all. "
            f"The diagonal is cross-fitted on {self.config.folds} folds by pair. Intervals are 95 %, over "
            f"{self.config.bootstrap} resamples of whole pairs."
        )
        return Section(
            title=f"Transfer of probes for {self.config.target}",
            text="\n\n".join([text, *self.findings()]),
            figures=(self.figure(),),
            tables=(("Every cell", self.table.round(3)),),
            headline=(("AUROC on other sets, on average", number(off)),),
        )

    def __repr__(self) -> str:
        wide = self.matrix().to_numpy()
        off = wide[~np.eye(len(wide), dtype=bool)]
        return (
            f"TransferMatrix({self.config.target}: {len(self.names)} sets, AUROC "
            f"{number(float(np.nanmean(np.diag(wide))))} on their own and {number(float(np.nanmean(off)))} "
            "on others)"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        table = self.matrix().round(3).to_html(escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{said}{table}"


def transfer_matrix(
    acts: Mapping[str, Any] | Activations,
    config: ProbeConfig | None = None,
    *,
    by: str | None = None,
    site: str | None = None,
    probe: LinearProbe | str | None = None,
    target: str | None = None,
    where: Where | None = None,
    rows: Any = None,
    **options: Any,
) -> TransferMatrix:
    """Fits a probe on each data set and tests it on all.

    Args:
        acts: Name of each data set to its activations (from `collect`, or a dict of site to `[n, d]`). With
            `by`, one set of activations.
        config: Options; keyword `options` of `ProbeConfig` win over it.
        by: Label column by whose values one set of activations is split, such as "scenario".
        site: Site to read; when not given, each fold of each set chooses among the sites that all have.
        probe: Estimator or its name; logistic when not given.
        target: Label column, two classes, the same in every set.
        where: Conditions on the rows, as for `fit_probes`.
        rows: Tables of label columns for dicts of arrays: one table with `by`, else a table by name.
        **options: Fields of `ProbeConfig`, but for those of `UNUSED`.

    Raises:
        UnknownNameError: A site, column or option that does not exist.
        DataError: Fewer than two sets, labels or models that differ, too few pairs.
    """
    for name in UNUSED:
        if name in options:
            raise DataError(
                f"{name} means nothing to a transfer matrix: every row is judged by cross-fitting, in memory"
            )
    if target is not None:
        options["target"] = target
    if where is not None:
        options["where"] = as_conditions(where)
    config = configs.build(ProbeConfig, config, **options)
    check_config(config)
    if config.holdout:
        raise DataError("holdout means nothing to a transfer matrix: name the rows by where")
    estimator = as_estimator(probe)
    sets = (
        _split(acts, by, rows, config, estimator) if by is not None else _named(acts, rows, config, estimator)
    )
    if len(sets) < 2:
        raise DataError(f"{len(sets)} set arrived ({', '.join(s.name for s in sets)}); expected two or more")
    _check_alike(sets, config)
    return _Matrix(sets, config, estimator, _sites(sets, site)).run()


@dataclass(frozen=True)
class _Set:
    """One data set: which vectors of a source count, and their labels and pairs `[n]`."""

    name: str
    source: Source
    used: np.ndarray
    positive: np.ndarray
    pairs: np.ndarray
    classes: tuple[Any, ...]
    said: tuple[str, ...]


class _Matrix:
    def __init__(
        self, sets: Sequence[_Set], config: ProbeConfig, probe: LinearProbe, sites: Sequence[str]
    ) -> None:
        self.sets, self.config, self.probe, self.sites = sets, config, probe, sites
        pairs = np.concatenate([s.pairs[s.used] for s in sets])
        strata = np.concatenate([[f"{s.name} {int(y)}" for y in s.positive[s.used]] for s in sets])
        dealt = fold_numbers(pairs, config.folds, config.seed, strata)
        fold_of = dict(zip(pairs.tolist(), dealt.tolist()))
        self.folds = [np.array([fold_of.get(pair, 0) for pair in s.pairs]) for s in sets]
        self.notes = list(dict.fromkeys(note for s in sets for note in s.source.notes))

    def run(self) -> TransferMatrix:
        from veridical.progress import bar

        lines, probes = [], {}
        with bar(len(self.sets) * len(self.sites), "transfer", "fits", self.config.progress) as progress:
            for trained, fold_of in zip(self.sets, self.folds):
                used, config = trained.used, self.config
                plan = Plan(used, trained.positive, used, fold_of, config.folds, config.strengths)
                check_plan(f"the probe of {trained.name}", plan, trained.pairs)
                found = {}
                for site in self.sites:
                    found[self.probe.name, site] = cross_fit(trained.source, site, plan, self.probe)
                    progress.update(1)
                nested, text = Nested.of(found), self._text(trained, fold_of)
                for tested, folds in zip(self.sets, self.folds):
                    lines.append(self._cell(trained, tested, nested, text, folds))
                own = next(line for line in lines[-len(self.sets) :] if line["tested_on"] == trained.name)
                probes[trained.name] = self._probe(trained, nested, own)
        names = tuple(s.name for s in self.sets)
        return TransferMatrix(
            self.config, names, pd.DataFrame(lines), probes, self._facts(), tuple(self.notes)
        )

    def _facts(self) -> dict[str, str | None]:
        """What the sets share; and the fingerprint of each."""
        facts = [s.source.facts for s in self.sets]
        prints = dict.fromkeys(str(f["data_fingerprint"]) for f in facts if f.get("data_fingerprint"))
        return {**facts[0], "data_fingerprint": ", ".join(prints) or None}

    def _probe(self, trained: _Set, nested: Nested, own: Mapping[str, Any]) -> LinearProbe:
        """The probe of all rows of a set, with where it came from and its cross-fitted figures there."""
        probe, facts = nested.candidates[nested.best].probe, trained.source.facts
        probe.classes_ = np.array(trained.classes)
        probe.origin_ = Origin(
            site=nested.best[1],
            tokens=facts.get("tokens"),
            target=self.config.target,
            where=trained.said,
            model=facts.get("model"),
            model_fingerprint=facts.get("model_fingerprint"),
            data_fingerprint=facts.get("data_fingerprint"),
            metrics={
                name: float(value)
                for name, value in own.items()
                if name.startswith(("auroc", "text_auroc", "lead_over_text")) and np.isfinite(value)
            },
            rows={"fit_vectors": int(trained.used.sum()), "set": trained.name},
            notes=("Figures are cross-fitted by pair on the set that it was fitted on.",),
            seed=self.config.seed,
        )
        return probe

    def _text(self, trained: _Set, fold_of: np.ndarray) -> TextScorer | None:
        texts = trained.source.texts
        if not self.config.text_baseline or texts is None or any(s.source.texts is None for s in self.sets):
            return None
        return cross_fit_texts(texts, trained.positive, trained.source.units, trained.used, fold_of)

    def _cell(
        self, trained: _Set, tested: _Set, nested: Nested, text: TextScorer | None, fold_of: np.ndarray
    ) -> dict[str, Any]:
        same = trained is tested
        shared = np.isin(tested.pairs, trained.pairs[trained.used])
        kept = tested.used & ~_repeated(trained, tested)
        rows = np.flatnonzero(kept)
        which = np.where(shared, fold_of, -1)[rows]
        site = nested.best[1] if not same else ", ".join(dict.fromkeys(s for _, s in nested.by_fold))
        line: dict[str, Any] = {
            "trained_on": trained.name,
            "tested_on": tested.name,
            "site": site,
            "rows": len(rows),
            "pairs": len(np.unique(tested.pairs[rows])),
            "positive": int(tested.positive[rows].sum()),
            "shared_pairs": 0 if same else len(np.unique(tested.pairs[rows][which >= 0])),
            "left_out": int((tested.used & ~kept).sum()),
        }
        labels = tested.positive[rows]
        weights = evaluate.resample_weights(tested.pairs[rows], self.config.bootstrap, self.config.seed)
        counted = np.concatenate([np.ones((1, len(rows)), dtype=np.int32), weights])
        ours = evaluate.auroc_within(_scores(nested, tested.source, rows, which), labels, which, counted)
        line |= _spread("auroc", ours)
        if text is not None:
            words = np.asarray(tested.source.texts, dtype=object)[rows]
            theirs = evaluate.auroc_within(text.on(words, which), labels, which, counted)
            line |= {**_spread("text_auroc", theirs), **_spread("lead_over_text", ours - theirs)}
        return line


def _scores(nested: Nested, source: Source, rows: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Decision values `[rows]` by the candidate and probe of the fold that is named, or of all pairs (-1)."""
    scores = np.empty(len(rows))
    for fold in np.unique(which):
        key = nested.best if fold < 0 else nested.by_fold[fold]
        here = which == fold
        probe = nested.candidates[key].probes[fold]
        scores[here] = probe.decision_function(source.vectors(key[1], rows[here]))
    return evaluate.settled(scores[:, None])[:, 0]


def _repeated(trained: _Set, tested: _Set) -> np.ndarray:
    """Vectors of `tested` whose text is a fitted row's under another pair, `[n]` bool."""
    if trained.source.texts is None or tested.source.texts is None:
        return np.zeros(len(tested.pairs), dtype=bool)
    seen: dict[str, set[Any]] = {}
    for row in np.flatnonzero(trained.used):
        seen.setdefault(trained.source.texts[row], set()).add(trained.pairs[row])
    return np.array(
        [bool(seen.get(text, set()) - {pair}) for text, pair in zip(tested.source.texts, tested.pairs)]
    )


def _named(acts: Any, rows: Any, config: ProbeConfig, probe: LinearProbe) -> list[_Set]:
    if not isinstance(acts, Mapping):
        raise DataError(
            f"acts is a {type(acts).__name__}; expected a dict of name to activations, or `by=` a column"
        )
    tables = rows or {}
    for name in tables:
        if name not in acts:
            raise unknown("set", name, acts)
    return [
        _set(str(name), probe.source(one, None, None, None, tables.get(name)), config)
        for name, one in acts.items()
    ]


def _split(acts: Any, by: str, rows: Any, config: ProbeConfig, probe: LinearProbe) -> list[_Set]:
    source = probe.source(acts, None, None, None, rows)
    column = source.column(by)
    values = np.array([None if missing(value) else str(value) for value in column], dtype=object)
    names = list(dict.fromkeys(value for value in values if value is not None))
    if not 2 <= len(names) <= 40:
        raise DataError(f"column {by} has {len(names)} values; expected 2 to 40 to split by")
    return [_set(name, source, config, values == name, by) for name in sorted(names)]


def _set(
    name: str, source: Source, config: ProbeConfig, among: np.ndarray | None = None, by: str | None = None
) -> _Set:
    used = np.ones(len(source), dtype=bool) if among is None else among.copy()
    if config.where:
        used &= meets(source, config.where)
    labels = source.column(config.target)
    used &= np.array([not missing(value) for value in labels])
    if not used.any():
        raise DataError(f"set {name} has no row with a value of {config.target}")
    said = (*config.where, f"{by}={name}") if by else (*config.where, f"set={name}")
    classes, codes = two_classes(labels[used], config.target, said)
    positive = np.zeros(len(source), dtype=bool)
    positive[used] = codes == 1
    # Rows without pairs are numbered from 0 in every set: those numbers mean nothing between sets.
    own = by is None and "pair" not in source.columns
    pairs = np.array([f"{name}: {g}" if own else str(g) for g in source.groups], dtype=object)
    return _Set(name, source, used, positive, pairs, tuple(classes.tolist()), said)


def _check_alike(sets: Sequence[_Set], config: ProbeConfig) -> None:
    first = sets[0]
    for other in sets[1:]:
        if other.classes != first.classes:
            raise DataError(
                f"{config.target} is {first.classes} in set {first.name} and {other.classes} in set "
                f"{other.name}; expected the same two classes"
            )
        a, b = (s.source.facts.get("model_fingerprint") for s in (first, other))
        if a != b and a is not None and b is not None:
            raise DataError(
                f"sets {first.name} and {other.name} come from different models ({a} and {b}); use "
                "transfer_to to move a probe between models"
            )


def _sites(sets: Sequence[_Set], site: str | None) -> list[str]:
    common = [s for s in sets[0].source.sites if all(s in other.source.sites for other in sets)]
    if not common:
        raise DataError("the sets have no site in common; collect the same sites for each")
    if site is None:
        return common
    return [site_name(site, common)]


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    """The first of the values, and the interval of the others."""
    return evaluate.estimate(values[0], values[1:]).columns(name)
