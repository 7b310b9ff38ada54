"""Stacking: one probe over several sites, from what each site's probe says of rows it was not fitted on.

Wolpert 1992, "Stacked generalization", Neural Networks 5; Breiman 1996 for regressions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from veridical.errors import DataError, unknown
from veridical.probes import evaluate
from veridical.probes.base import LinearProbe, Problems, as_array, as_labels, group_codes
from veridical.probes.kinds import kind
from veridical.probes.logistic import LogisticProbe
from veridical.probes.origin import Origin
from veridical.probes.solver import Design, Solution

if TYPE_CHECKING:
    from veridical.probes.data import Source
    from veridical.probes.result import Labels, ProbeSweep

INSTEAD = (
    "a stacked probe reads several sites, so it is no probe of a single one, which is what is fitted here: "
    "fit a sweep with its base estimator and stack that with StackedProbe.from_sweep(sweep), or fit "
    "StackedProbe on a dict of site to activations"
)


class StackedProbe(LinearProbe):
    """A logistic regression on the decision values of one base probe per site.

    Each site's base probe is fitted on all rows, and once per fold without the fold's pairs; the final
    regression is fitted on the scores of held-out pairs, since the scores of fitted rows look surer than they
    are, the more so the wider the site. With `s_j(x) = w_j . x_j + b_j` at site `j` and `a`, `c` of the final
    regression, `f(x) = sum_j a_j s_j(x_j) + c`: linear in the activations of all sites together. It cannot
    gain where one site holds all that the others hold, and a negative `a_j` means that site `j` corrects
    another one, not that it reads the label backwards.

    Args:
        base: Estimator of every site, or its name (with its own parameters).
        C: Inverse strength of the L2 penalty of the final regression, on scores of variance 1.
        folds: Folds by pair, whose held-out scores the final regression is fitted on.
        seed: Order in which pairs are dealt out to the folds.

    Attributes:
        sites_: Sites in order.
        coef_: Site to coefficients `[d]` in log-odds per unit of activation.
        intercept_: `[1]`.
        mixture_: Site to `a_j`.
    """

    name = "stacked"
    reads = "a dict of site to activations [rows, width]"

    def __init__(
        self, base: LinearProbe | str = "logistic", *, C: float = 1.0, folds: int = 5, seed: int = 0
    ) -> None:
        self.base = base
        self.C = C
        self.folds = folds
        self.seed = seed

    def fit(self, X: Mapping[str, Any], y: Any, groups: Any = None, **columns: Any) -> Self:
        """Fits on a dict of site to activations `[rows, d]` and labels `[rows]` of two classes.

        Args:
            X: Activations of the same rows at each site.
            y: Labels.
            groups: `[rows]`, pair of each row; without it every row is a pair of its own.
            **columns: Further label columns `[rows]` that the base probe reads.

        Raises:
            DataError: No sites, sites of unequal rows, NaN or infinity, or not two classes.
        """
        from veridical.pairs.splits import folds

        self._check()
        sites = _checked(X)
        labels = np.asarray(as_labels(y))
        rows = len(next(iter(sites.values())))
        if labels.shape != (rows,):
            raise DataError(f"y has shape {labels.shape}; expected one label for each of {rows} rows")
        pairs = np.arange(rows) if groups is None else group_codes(groups, rows).numpy()
        dealt = folds(pairs, self.folds, self.seed, labels)
        base = self._base()
        given = {name: np.asarray(as_labels(values)) for name, values in columns.items()}
        probes, scores = {}, {}
        for site, x in sites.items():
            probes[site] = _fresh(base).fit(x, labels, groups, **columns)
            scores[site] = _held_out(base, x, labels == probes[site].classes_[1], groups, dealt, given)
        return self._mix(scores, labels, probes)

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Any],
        y: Any,
        probes: Mapping[str, LinearProbe],
        *,
        C: float = 1.0,
        folds: int = 5,
        seed: int = 0,
    ) -> Self:
        """Stacks probes that are fitted already, such as those of a sweep, without fitting them again.

        Args:
            scores: Site to decision values `[rows]`, each of a fit without the fold that holds the row.
            y: Labels `[rows]`, of the probes' classes.
            probes: Site to its probe, fitted on all rows.
            C: Inverse strength of the L2 penalty of the final regression.
            folds: Folds that the scores came from, for the record.
            seed: Seed of those folds, for the record.
        """
        if not scores or list(scores) != list(probes):
            raise DataError(
                f"scores are of sites {list(scores)} and probes of {list(probes)}; expected the same sites "
                "in one order"
            )
        base = _fresh(next(iter(probes.values())))
        values = {site: np.asarray(as_array(score), dtype=np.float64) for site, score in scores.items()}
        probe = cls(base, C=C, folds=folds, seed=seed)
        probe._check()
        return probe._mix(values, np.asarray(as_labels(y)), dict(probes))

    @classmethod
    def from_sweep(cls, sweep: ProbeSweep, sites: Sequence[str] | None = None, *, C: float = 1.0) -> Self:
        """Stacks a sweep's probes on their out-of-fold scores; judges the stack on its held-out pairs.

        Args:
            sweep: What `fit_probes` returned, with an estimator of one vector.
            sites: Sites to stack; all of the sweep when not given.
            C: Inverse strength of the L2 penalty of the final regression.

        Returns:
            The stack; `origin_` holds its AUROC, accuracy and recall with 95 % intervals over pairs, and the
            AUROC of the text alone and of the sweep's own best site beside it.

        Raises:
            DataError: A sweep of sequences, or one without out-of-fold scores.
            UnknownNameError: A site that the sweep does not hold.
        """
        from veridical.probes.sequence import SequenceProbe

        results = [sweep[site] for site in sites or [result.site for result in sweep.results]]
        labels, first = sweep.labels, results[0].probe
        if labels is None or not all(len(result.out_of_fold) for result in results):
            raise DataError(
                "the sweep holds no out-of-fold scores: it was made before they were kept; fit again"
            )
        if isinstance(first, SequenceProbe):
            raise DataError(f"a stack reads one vector per site; {first.name} reads sequences of tokens")
        named = np.array(sweep.classes)
        made = cls.from_scores(
            {result.site: result.out_of_fold for result in results},
            named[labels.fit.astype(int)],
            {result.site: result.probe for result in results},
            C=C,
            folds=sweep.config.folds,
            seed=sweep.config.seed,
        )
        scores = [
            made.mixture_[result.site] * (result.test_scores - result.probe.intercept_[0])
            for result in results
        ]
        made.origin_ = made._judged(sweep, labels, np.sum(scores, axis=0) + made.intercept_[0])
        return made

    def decision_function(self, X: Mapping[str, Any]) -> np.ndarray:
        """Log-odds of the positive class, `[rows]`, for a dict of site to activations `[rows, d]`.

        Sites that the probe does not read are ignored.
        """
        check_is_fitted(self)
        if not isinstance(X, Mapping):
            raise DataError(
                f"a stacked probe reads a dict of site to activations; {type(X).__name__} arrived"
            )
        for site in self.sites_:
            if site not in X:
                raise unknown("site", site, X, "The probe was fitted on it")
        sites = _checked({site: X[site] for site in self.sites_})
        for site, x in sites.items():
            if x.shape[1] != len(self.coef_[site]):
                raise DataError(
                    f"site {site} has width {x.shape[1]}; the probe was fitted on {len(self.coef_[site])}"
                )
        return np.sum([x @ self.coef_[site] for site, x in sites.items()], axis=0) + self.intercept_[0]

    @property
    def direction_(self) -> dict[str, np.ndarray]:
        """Site to the unit direction `[d]` along which the log-odds rise fastest there."""
        check_is_fitted(self)
        norms = {site: float(np.linalg.norm(w)) for site, w in self.coef_.items()}
        return {site: w / (norms[site] or 1.0) for site, w in self.coef_.items()}

    @property
    def standardise(self) -> bool:
        """Whether the base probe scales features before its penalty applies."""
        return self._base().standardise

    def solve(self, design: Design, problems: Problems) -> Solution:
        raise DataError(INSTEAD)

    def source(self, acts: Any, target: Any, groups: Any, texts: Any, rows: Any) -> Source:
        """Refused: a sweep, a curve or a matrix gives every site a probe of its own."""
        raise DataError(INSTEAD)

    def said(self) -> str:
        return f"stacking (logistic regression, C = {self.C:g}) of one probe per site: {self._base().said()}"

    def arrays(self) -> dict[str, np.ndarray]:
        # The number keeps the order of the sites, which a safetensors file does not.
        coefficients = {f"{number}.{site}": self.coef_[site] for number, site in enumerate(self.sites_)}
        mixture = np.array([self.mixture_[site] for site in self.sites_])
        return {**coefficients, "intercept": self.intercept_, "mixture": mixture}

    def parameters(self) -> dict[str, Any]:
        base = self._base()
        saved = {"kind": base.name, "parameters": base.parameters()}
        return {**self.get_params(deep=False), "base": saved}

    def restore(self, classes: np.ndarray, arrays: Mapping[str, np.ndarray], steps: int) -> Self:
        names = (name.partition(".") for name in arrays if name not in ("intercept", "mixture"))
        ordered = sorted((int(number), site) for number, _, site in names)
        coefficients = {site: arrays[f"{number}.{site}"] for number, site in ordered}
        mixture = dict(zip(coefficients, map(float, arrays["mixture"])))
        return self._take(classes, coefficients, arrays["intercept"], mixture, steps)

    @classmethod
    def made(cls, parameters: Mapping[str, Any]) -> Self:
        base = parameters["base"]
        return cls(**{**parameters, "base": kind(base["kind"]).made(base["parameters"])})

    def _base(self) -> LinearProbe:
        base = kind(self.base)() if isinstance(self.base, str) else self.base
        if isinstance(base, StackedProbe):
            raise DataError(
                "the base of a stacked probe is a stacked probe; expected an estimator of one site"
            )
        return base

    def _judged(self, sweep: ProbeSweep, labels: Labels, held: np.ndarray) -> Origin:
        """Where the stack came from, and its figures on the sweep's held-out pairs."""
        weights = evaluate.resample_weights(labels.test_pairs, sweep.config.bootstrap, sweep.config.seed)
        best = sweep.best().origin_
        figures: dict[str, float] = {}
        for name, value in evaluate.measure(
            evaluate.settled(held[:, None])[:, 0], labels.test, weights
        ).items():
            figures |= value.columns(name)
            figures |= {} if sweep.text is None else sweep.text[name].columns(f"text_{name}")
        shown = ", ".join(f"{site} {weight:.2f}" for site, weight in self.mixture_.items())
        return replace(
            best,
            site=" + ".join(self.sites_),
            metrics={name: float(value) if np.isfinite(value) else None for name, value in figures.items()},
            notes=(
                f"The sweep's best site alone: {best.said()}.",
                f"Weights of the sites' log-odds: {shown}.",
                *sweep.notes,
            ),
            thresholds={},
            calibration={},
        )

    def _mix(
        self, scores: Mapping[str, np.ndarray], y: np.ndarray, probes: Mapping[str, LinearProbe]
    ) -> Self:
        sites = list(scores)
        final = LogisticProbe(C=self.C).fit(np.stack([scores[site] for site in sites], 1), y)
        for site, probe in probes.items():
            if not np.array_equal(probe.classes_, final.classes_):
                raise DataError(
                    f"the probe of {site} tells {probe.classes_.tolist()} apart; the labels are "
                    f"{final.classes_.tolist()}"
                )
        mixture = {site: float(a) for site, a in zip(sites, final.coef_[0])}
        coefficients = {site: mixture[site] * probes[site].coef_[0] for site in sites}
        intercept = final.intercept_ + sum(mixture[site] * probes[site].intercept_ for site in sites)
        return self._take(final.classes_, coefficients, intercept, mixture, int(final.n_iter_[0]))

    def _take(
        self,
        classes: np.ndarray,
        coefficients: Mapping[str, np.ndarray],
        intercept: np.ndarray,
        mixture: Mapping[str, float],
        steps: int,
    ) -> Self:
        self.classes_ = classes
        self.sites_ = tuple(coefficients)
        self.coef_ = dict(coefficients)
        self.intercept_ = np.asarray(intercept, dtype=np.float64).reshape(1)
        self.mixture_ = dict(mixture)
        self.n_features_in_ = sum(len(w) for w in coefficients.values())
        self.n_iter_ = np.array([max(1, steps)])
        self.origin_ = Origin(site=" + ".join(self.sites_))
        return self

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        said = f"StackedProbe(base={self._base()!r}, C={self.C:g}, folds={self.folds}, seed={self.seed})"
        return f"{said}: {self.site}" if self.site else said


def _fresh(probe: LinearProbe) -> LinearProbe:
    """An unfitted probe with the same parameters."""
    return probe.made(probe.parameters())


def _held_out(
    base: LinearProbe,
    x: np.ndarray,
    positive: np.ndarray,
    groups: Any,
    dealt: Sequence[tuple[np.ndarray, np.ndarray]],
    columns: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Decision values `[rows]`, each of the fit without the row's fold; all folds in one solve."""
    n, count = len(x), len(dealt)
    train = torch.ones(n, count, dtype=torch.float64)
    for fold, (_, validation) in enumerate(dealt):
        train[torch.from_numpy(validation), fold] = 0
    design = Design.of(torch.from_numpy(np.require(x, requirements="W")), base.standardise)
    problems = Problems(
        targets=torch.from_numpy(positive.astype(np.float64))[:, None].expand(-1, count),
        weights=train,
        strengths=torch.full((count,), getattr(base, "C", 1.0), dtype=torch.float64),
        groups=None if groups is None else group_codes(groups, n),
        columns=columns,
    )
    scores = design.rows @ base.solve(design, problems).weights
    return (scores * (1 - train)).sum(1).numpy()


def _checked(X: Any) -> dict[str, np.ndarray]:
    """Sites as float64 arrays `[rows, d]` of one length, without NaN or infinity."""
    if not isinstance(X, Mapping) or not X:
        what = "an empty dict" if isinstance(X, Mapping) else type(X).__name__
        raise DataError(f"a stacked probe reads a dict of site to activations; {what} arrived")
    sites = {site: np.asarray(as_array(x), dtype=np.float64) for site, x in X.items()}
    rows = len(next(iter(sites.values())))
    for site, x in sites.items():
        if x.ndim != 2 or len(x) != rows:
            raise DataError(f"site {site} has shape {x.shape}; expected [{rows}, d] as at the first site")
        if not np.isfinite(x).all():
            raise DataError(
                f"site {site} has NaN or infinity in {int((~np.isfinite(x)).any(1).sum())} of {rows} rows"
            )
    return sites
