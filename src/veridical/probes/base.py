"""What every linear probe is: a direction and an intercept on activations, with scikit-learn's contract.

An estimator's file says only how its problems are solved (`solve`); one fit by hand and the hundreds of fits
of a sweep go through the same method. Reading, saving and describing are the same for all and stand here.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from veridical.errors import DataError
from veridical.probes.origin import Origin
from veridical.probes.solver import Design, Solution, totals
from veridical.probes.streamed import StreamedDesign, StreamedRows

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.hooked import HookedModel
    from veridical.probes.data import Source, Task
    from veridical.probes.monitored import Scores


@dataclass(frozen=True)
class Problems:
    """`k` fits on the same rows.

    Attributes:
        targets: `[n, k]`, 1 for the positive class and 0 for the other; float64, or bool where rows are
            streamed.
        weights: `[n, k]` likewise, weight of each row in each problem; 0 leaves the row out.
        strengths: `[k]`, C of each problem; estimators without a strength ignore it.
        groups: `[n]` int64, pair of each row; None where rows come without pairs.
        columns: Further label columns `[n]`, by name.
        start: `[r + 1, k]`, solutions nearby (such as those of a stronger penalty); None to start afresh.
        tol: Relative error of the coefficients, for estimators that iterate; None for their own.
    """

    targets: Tensor
    weights: Tensor
    strengths: Tensor
    groups: Tensor | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    start: Tensor | None = None
    tol: float | None = None

    def __len__(self) -> int:
        return self.targets.shape[1]

    def part(self, at: slice) -> tuple[Tensor, Tensor]:
        """Targets and weights of some rows, `[c, k]` float64."""
        return self.targets[at].to(torch.float64), self.weights[at].to(torch.float64)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Weight of the positive rows of each problem, and of the negative ones, `[k]` each."""
        return totals(self.targets, self.weights)

    def pick(self, columns: Tensor) -> Problems:
        """Some of the problems, by number."""
        return replace(
            self,
            targets=self.targets[:, columns],
            weights=self.weights[:, columns],
            strengths=self.strengths[columns],
            start=None if self.start is None else self.start[:, columns],
        )


class LinearProbe(ClassifierMixin, BaseEstimator):
    """A binary linear probe; the base of all estimators that read one vector.

    `decision_function(x) = x @ coef_[0] + intercept_[0]`, in log-odds of the positive class.

    Attributes:
        classes_: `[2]`, the labels; the second is the positive one.
        coef_: `[1, d]` float64, in units of log-odds per unit of activation.
        intercept_: `[1]` float64.
        n_iter_: `[1]`, steps of the solver (1 where there is a closed form).
        origin_: Where the activations came from and how the probe scored; set by `fit_probes`, empty
            otherwise.
    """

    name: ClassVar[str]
    """What saved probes, tables and recipes call the estimator."""
    tuned: ClassVar[bool] = False
    """Whether it has a strength `C` for the folds to choose."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Parameters that name a label column which the estimator reads beside the label."""
    reads: ClassVar[str] = "activations [rows, {width}]"
    """What `predict_proba` takes, for a card."""
    extra: ClassVar[tuple[str, ...]] = ()
    """Further fitted arrays, saved beside coefficients and intercept; `name_` holds each."""
    labelled: ClassVar[str] = "vectors"
    """What has a label each: vectors, or sequences of them."""
    streams: ClassVar[bool] = False
    """Whether it can be fitted on rows that are read in chunks, since memory does not hold them."""
    standardise: bool

    @abstractmethod
    def solve(self, design: Design, problems: Problems) -> Solution:
        """Solves every problem on the rotated rows of `design`; weights `[r + 1, k]` in its basis."""

    @abstractmethod
    def said(self) -> str:
        """The estimator and its parameters in a few words, for a card."""

    def space(self, x: Any) -> Design:
        """Where the problems on checked rows `x` are solved."""
        if isinstance(x, StreamedRows):
            return StreamedDesign.of(x, self.standardise)
        return Design.of(x, self.standardise)

    def scores(self, design: Design, weights: Tensor) -> Tensor:
        """Decision values `[n, k]` of solutions `weights` on the rows of their own design."""
        return design.rows @ weights

    def readings(self, design: Design, weights: Tensor) -> Iterable[tuple[slice, Tensor]]:
        """The same in parts: which rows, and their decision values."""
        return design.readings(weights) if self.streams else [(slice(None), self.scores(design, weights))]

    def held_out(self, design: Design, weights: Tensor, x: Any) -> Tensor:
        """Decision values `[rows, k]` of solutions on other rows `x`, as activations."""
        coefficients, intercepts = design.raw(weights)
        return x @ coefficients.T + intercepts

    def one_each(self, x: Any) -> Tensor:
        """One vector for each label `[n, d]`, for the controls that know nothing of the estimator."""
        return x

    def settle(self, classes: np.ndarray, design: Design, solution: Solution) -> Self:
        """Takes the first of the solutions as the fitted probe."""
        coefficients, intercepts = design.raw(solution.weights[:, :1])
        return self.adopt(
            classes, coefficients.cpu().numpy(), intercepts.cpu().numpy(), int(solution.steps[0])
        )

    def source(
        self, acts: Activations | Mapping[str, Any], target: Any, groups: Any, texts: Any, rows: Any
    ) -> Source:
        """What a sweep fits on: one entry per vector, or per whatever else one label belongs to."""
        from veridical.probes.data import read_source

        return read_source(acts, target, groups, texts, rows)

    def beside(self, source: Source, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The columns that it reads beside the label, at `rows`; those whose name is None are left out."""
        named = {name: getattr(self, name) for name in self.columns}
        return {name: source.column(at)[rows] for name, at in named.items() if at is not None}

    def notes(self, source: Source, task: Task) -> tuple[str, ...]:
        """What a reader should know of the data before believing the figures of this estimator."""
        return ()

    def fit(self, X: Any, y: Any, groups: Any = None, **columns: Any) -> Self:
        """Fits on activations `[rows, d]` (array or tensor) and labels `[rows]` of two classes.

        Args:
            X: Activations.
            y: Labels.
            groups: `[rows]`, pair of each row; only estimators that compare within pairs read it.
            **columns: Further label columns `[rows]`, for estimators that read one (see `columns`).
        """
        self._check()
        for name in columns:
            if name not in self.columns:
                raise TypeError(f"{type(self).__name__}.fit() got an unexpected keyword argument {name!r}")
        x, y = self._fitted_on(X, y)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) > 2:
            raise DataError(
                f"Only binary classification is supported; the labels have {len(classes)} classes"
            )
        if len(classes) < 2:
            raise DataError(f"the labels have one class only ({classes[0]!r}); a probe needs two classes")
        design = self.space(x)
        problems = Problems(
            targets=torch.from_numpy(codes.astype(np.float64))[:, None],
            weights=torch.ones(len(y), 1, dtype=torch.float64),
            strengths=torch.tensor([getattr(self, "C", 1.0)], dtype=torch.float64),
            groups=None if groups is None else group_codes(groups, len(y)),
            columns={name: np.asarray(as_labels(values)) for name, values in columns.items()},
        )
        solution = self.solve(design, problems)
        if not bool(solution.converged.all()):
            message = f"the probe did not converge in {int(solution.steps[0])} steps; raise max_iter"
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return self.settle(classes, design, solution)

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-odds of the positive class, `[rows]`, for activations `[rows, d]`."""
        check_is_fitted(self)
        X = validate_data(self, as_array(X), dtype=np.float64, reset=False)
        return X @ self.coef_[0] + self.intercept_[0]

    def token_scores(self, X: Any) -> np.ndarray:
        """Log-odds of each token of a text, `[tokens]`, for its vectors `[tokens, d]`."""
        return self.decision_function(X)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the two classes, `[rows, 2]`; the second column is the positive class."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Logarithms of `predict_proba`, accurate far from 0 and 1."""
        scores = self.decision_function(X)
        return np.stack([-np.logaddexp(0, scores), -np.logaddexp(0, -scores)], 1)

    def predict(self, X: Any) -> np.ndarray:
        """The likelier class of each row, `[rows]`."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int)]

    @property
    def direction_(self) -> np.ndarray:
        """Unit normal of the decision plane in activation space, `[d]`, towards the positive class."""
        check_is_fitted(self)
        norm = np.linalg.norm(self.coef_[0])
        return self.coef_[0] / norm if norm > 0 else np.zeros_like(self.coef_[0])

    @property
    def site(self) -> str | None:
        """The site that the probe reads, where `fit_probes` made it."""
        return self.origin_.site if hasattr(self, "origin_") else None

    def save(self, folder: str | Path) -> Path:
        """Saves weights, config, metrics, provenance and a card into `folder`; `load_probe` reads it."""
        from veridical.probes.saved import save_probe

        return save_probe(self, folder)

    def monitor(self, model: HookedModel, **options: Any) -> AbstractContextManager[Scores]:
        """Scores every token that `model` reads in the context; see `veridical.probes.monitor`."""
        from veridical.probes.monitor import monitor

        return monitor(self, model, **options)

    def adopt(
        self, classes: np.ndarray, coefficients: np.ndarray, intercepts: np.ndarray, steps: int
    ) -> Self:
        """Takes a solution that was found elsewhere: by a sweep's shared solver, or read from a file."""
        self.classes_ = classes
        self.coef_ = np.ascontiguousarray(coefficients.reshape(1, -1), dtype=np.float64)
        self.intercept_ = np.asarray(intercepts, dtype=np.float64).reshape(1)
        self.n_features_in_ = self.coef_.shape[1]
        self.n_iter_ = np.array([max(1, steps)])
        self.origin_ = Origin()
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """Every fitted array by name, as they are saved."""
        extra = {name: np.ascontiguousarray(getattr(self, f"{name}_")) for name in self.extra}
        return {"coef": self.coef_, "intercept": self.intercept_, **extra}

    def parameters(self) -> dict[str, Any]:
        """The estimator's parameters as plain JSON values; `made` is the reverse."""
        return self.get_params()

    @classmethod
    def made(cls, parameters: Mapping[str, Any]) -> Self:
        """An unfitted estimator from what `parameters` gave."""
        return cls(**parameters)

    def restore(self, classes: np.ndarray, arrays: Mapping[str, np.ndarray], steps: int) -> Self:
        """The reverse of `arrays`."""
        self.adopt(classes, arrays["coef"], arrays["intercept"], steps)
        for name in self.extra:
            setattr(self, f"{name}_", arrays[name])
        return self

    def at(self, strength: float) -> Self:
        """An unfitted copy, with `strength` as its C where it has one."""
        parameters = self.get_params(deep=False)
        return type(self)(**{**parameters, "C": strength} if self.tuned else parameters)

    def _fitted_on(self, X: Any, y: Any) -> tuple[Any, np.ndarray]:
        """Checked rows for `space`, and labels."""
        X, y = validate_data(self, as_array(X), as_labels(y), dtype=np.float64, ensure_min_samples=2)
        return torch.from_numpy(np.require(X, requirements="W")), y

    def _check(self) -> None:
        """Refuses parameters that make no sense."""
        strength = getattr(self, "C", 1.0)
        if not strength > 0:
            raise DataError(f"C is {strength!r}; expected a number above 0")

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        said = super().__repr__(N_CHAR_MAX)
        return f"{said}: {self.origin_.said()}" if self.site else said

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def as_array(x: Any) -> Any:
    """Tensors of any float type and device as float64 arrays; anything else as it is."""
    return x.detach().to("cpu", torch.float64).numpy() if isinstance(x, torch.Tensor) else x


def as_labels(y: Any) -> Any:
    """Tensors of labels as arrays; anything else as it is."""
    return y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else y


def group_codes(groups: Any, rows: int) -> Tensor:
    """Pairs as numbers from 0, `[rows]` int64."""
    groups = np.asarray(as_labels(groups))
    if groups.shape != (rows,):
        raise DataError(f"groups has shape {groups.shape}; expected one pair for each of {rows} rows")
    return torch.from_numpy(np.unique(groups, return_inverse=True)[1].reshape(-1))
