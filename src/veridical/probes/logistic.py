"""The L2 logistic probe: the plain baseline of linear probing (Alain and Bengio 2016, arXiv:1610.01644)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from veridical.errors import DataError
from veridical.probes.origin import Origin
from veridical.probes.solver import Design, solve


class LogisticProbe(ClassifierMixin, BaseEstimator):
    """Logistic regression with an L2 penalty and a free intercept, on standardised activations.

    Minimises `C * sum_i log(1 + exp(-y_i f(x_i))) + |w|^2 / 2`, where `f(x) = w . (x - mean) / scale + b`
    and mean and scale are those of the training rows. The fitted coefficients are given on the activations
    as they are, so `decision_function(x) = x @ coef_[0] + intercept_[0]`, and `direction_` is the normal of
    the decision plane in activation space. It fails where classes are not parted by a plane, and its
    direction leans away from the class-mean difference where features are correlated: a good reader need not
    be a good steering vector.

    Args:
        C: Inverse strength of the penalty, as in scikit-learn: it multiplies the sum of the losses.
        standardise: Scale every feature to variance 1 before the penalty applies.
        tol: Relative error of the coefficients at which the solver stops.
        max_iter: Newton steps at most.

    Attributes:
        classes_: `[2]`, the labels; the second is the positive one.
        coef_: `[1, d]` float64, in units of log-odds per unit of activation.
        intercept_: `[1]` float64.
        n_iter_: `[1]`, Newton steps taken.
        origin_: Where the activations came from and how the probe scored; set by `fit_probes`, empty
            otherwise.
    """

    def __init__(
        self, C: float = 1.0, *, standardise: bool = True, tol: float = 1e-8, max_iter: int = 100
    ) -> None:
        self.C = C
        self.standardise = standardise
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any) -> LogisticProbe:
        """Fits on activations `[rows, d]`, array or tensor, and labels `[rows]` of two classes."""
        if not self.C > 0:
            raise DataError(f"C is {self.C!r}; expected a number above 0")
        X, y = validate_data(self, as_array(X), as_labels(y), dtype=np.float64, ensure_min_samples=2)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) > 2:
            raise DataError(
                f"Only binary classification is supported; the labels have {len(classes)} classes"
            )
        if len(classes) < 2:
            raise DataError(f"the labels have one class only ({classes[0]!r}); a probe needs two classes")
        design = Design.of(torch.from_numpy(np.require(X, requirements="W")), self.standardise)
        solution = solve(
            design,
            torch.from_numpy(codes.astype(np.float64))[:, None],
            torch.ones(len(X), 1, dtype=torch.float64),
            torch.tensor([self.C], dtype=torch.float64),
            tol=self.tol,
            max_steps=self.max_iter,
        )
        if not bool(solution.converged.all()):
            _warn(f"the probe did not converge in {self.max_iter} steps; raise max_iter or lower C")
        coefficients, intercepts = design.raw(solution.weights)
        return self._adopt(classes, coefficients.numpy(), intercepts.numpy(), int(solution.steps[0]))

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-odds of the positive class, `[rows]`, for activations `[rows, d]`."""
        check_is_fitted(self)
        X = validate_data(self, as_array(X), dtype=np.float64, reset=False)
        return X @ self.coef_[0] + self.intercept_[0]

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

    def _adopt(
        self, classes: np.ndarray, coefficients: np.ndarray, intercepts: np.ndarray, steps: int
    ) -> LogisticProbe:
        """Takes a solution that was found elsewhere: by a sweep's shared solver, or read from a file."""
        self.classes_ = classes
        self.coef_ = np.ascontiguousarray(coefficients.reshape(1, -1), dtype=np.float64)
        self.intercept_ = np.asarray(intercepts, dtype=np.float64).reshape(1)
        self.n_features_in_ = self.coef_.shape[1]
        self.n_iter_ = np.array([max(1, steps)])
        self.origin_ = Origin()
        return self

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


def _warn(message: str) -> None:
    import warnings

    warnings.warn(message, ConvergenceWarning, stacklevel=3)
