"""Erasers: affine maps after which a label, or given directions, can't be read linearly from activations.

LEACE (Belrose et al. 2023, arXiv:2306.03819) is, among all affine maps after which every class has the same
mean, the one that moves activations least in mean square. Where class means are equal, no linear probe with
a convex loss beats a constant on the fitted rows. It is computed by the authors' own `concept-erasure`, whose
running covariances let the fit stream over batches. A projection only removes directions; how much of the
label is left then depends on how well these were found.

Both are also interventions: inside `with eraser.on(model, site):` the model runs on erased activations. They
are kept as probes are: `eraser.save(folder)` and `load_eraser(folder)`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from veridical.errors import DataError, InputError, NonFiniteError, unknown
from veridical.probes.base import as_array, as_labels
from veridical.probes.fits import same_model
from veridical.probes.origin import Origin
from veridical.probes.passes import Positions, check_positions, following

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

Map = tuple[np.ndarray, np.ndarray, np.ndarray]
SMALLEST = 1e-6
"""Covariance of whitened activations and a label below which LEACE takes it for rounding."""


class Eraser(TransformerMixin, BaseEstimator):
    """`x - ((x - centre_) @ right_.T) @ left_.T`: what every eraser is, with scikit-learn's contract.

    Attributes:
        left_: `[d, k]` float64.
        right_: `[k, d]` float64; `right_ @ left_` is the identity, so erasing twice changes nothing more.
        centre_: `[d]` float64, a point that stays where it is.
        origin_: Where the activations came from and what was measured; set by `check_erasure`, else empty.
    """

    name: ClassVar[str]
    """What saved erasers call it."""
    origin_: Origin = Origin()

    @abstractmethod
    def _map(self) -> Map:
        """left, right and centre, of an eraser that is fitted."""

    @abstractmethod
    def said(self) -> str:
        """The eraser and its parameters in a few words, for a card."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Every fitted array by name, as they are saved."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What else is saved, as plain JSON values."""

    @classmethod
    @abstractmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> Self:
        """The reverse of `arrays` and `parameters`."""

    def save(self, folder: str | Path) -> Path:
        """Saves arrays, config, metrics, provenance and a card into `folder`; `load_eraser` reads it."""
        from veridical.probes.saved_eraser import save_eraser

        return save_eraser(self, folder)

    @property
    def left_(self) -> np.ndarray:
        return self._map()[0]

    @property
    def right_(self) -> np.ndarray:
        return self._map()[1]

    @property
    def centre_(self) -> np.ndarray:
        return self._map()[2]

    @property
    def rank(self) -> int:
        """Dimensions that are erased."""
        return self.right_.shape[0]

    def transform(self, X: Any) -> Any:
        """Erased activations `[..., d]`; an array gives a float64 array, a tensor one like itself."""
        left, right, centre = self._map()
        if isinstance(X, Tensor):
            _check_width(X.shape, len(centre))
            return self.on_tensors()(X)
        X = np.asarray(X, dtype=np.float64)
        _check_width(X.shape, len(centre))
        return X - ((X - centre) @ right.T) @ left.T

    def on_tensors(self) -> Any:
        """The eraser as a function of a tensor `[..., d]`, of any float type and device: an edit for a site.

        It computes in float32 (in float64 for float64) and gives back the type that came.
        """
        found = self._map()
        held: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

        def erase(x: Tensor) -> Tensor:
            exact = torch.float64 if x.dtype == torch.float64 else torch.float32
            key = (x.device, exact)
            if key not in held:
                held[key] = [torch.as_tensor(part, dtype=exact, device=x.device) for part in found]
            left, right, centre = held[key]
            y = x.to(exact)
            return (y - ((y - centre) @ right.T) @ left.T).to(x.dtype)

        return erase

    @contextmanager
    def on(
        self, model: HookedModel, site: str, positions: Positions = "all", *, force: bool = False
    ) -> Iterator[None]:
        """Erases at a site of a model while the context lasts, `generate` included; undone at the end.

        Args:
            model: A loaded model.
            site: Where; sites per head are taken flat.
            positions: "all" tokens; those of the "prompt" (of the first pass, before any is generated);
                "prompt_last", the last real token of each row's prompt; or "generated", those after it.
            force: Accept another model than the one that the eraser says it was fitted on.

        Raises:
            MismatchError: The eraser was fitted on another model.
            InputError: Another width than the model has there.
        """
        check_positions(positions)
        own = self.origin_
        if not force and own.model_fingerprint is not None:
            same_model(own.model, own.model_fingerprint, model.path, model.fingerprint(), "eraser")
        places = model.resolve(site)
        if len(places) != 1:
            raise InputError(f"an eraser acts on one site; {site!r} names {len(places)} of {model.path}")
        width = int(np.prod(model.width(places[0])))
        if width != len(self.centre_):
            raise InputError(
                f"the eraser takes {len(self.centre_)} features; {model.path} has {width} at {places[0]}"
            )
        erase = self.on_tensors()
        with following(model) as passes:

            def edit(value: Tensor) -> Tensor:
                flat = value.reshape(*value.shape[:2], -1)
                chosen = passes.choose(positions)
                erased = erase(flat)
                if chosen is not None:
                    erased = torch.where(chosen.to(value.device)[..., None], erased, flat)
                return erased.reshape(value.shape)

            with model.hooks(write={places[0]: edit}):
                yield


class LeaceEraser(Eraser):
    """Erases a label with the least change: LEACE (Belrose et al. 2023, arXiv:2306.03819).

    `x - W^+ U U^T W (x - mean)`, with `W` the inverse square root of the covariance of the activations, and
    `U` the left singular vectors of `W Cov(x, label)`: of rank one for two classes, and of rank classes - 1
    in general. It removes what is linear: a probe with a hidden layer may still read the label, and so may
    later layers, which see other activations.

    Args:
        shrinkage: Estimate the covariance by optimal linear shrinkage (Bodnar et al. 2014, arXiv:1308.2608),
            which holds up better on new rows when there are not many more rows than dimensions. Class means
            are equal after erasure either way; the least change on the fitted rows is reached without it.

    Attributes:
        classes_: Labels seen.
        rows_: Number of rows seen.
    """

    name = "leace"

    def __init__(self, *, shrinkage: bool = True) -> None:
        self.shrinkage = shrinkage

    def fit(self, X: Any, y: Any) -> Self:
        """Fits on activations `[rows, d]` and labels `[rows]` of two or more classes.

        Raises:
            DataError: One class only, or shapes that do not go together.
            NonFiniteError: NaN or infinity.
        """
        for kept in ("_fitter", "_found"):
            self.__dict__.pop(kept, None)
        labels = np.asarray(as_labels(y))
        return self.update(X, labels, classes=np.unique(labels))

    def update(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Takes in one more batch, as if all were fitted together.

        Args:
            X: Activations `[rows, d]`.
            y: Labels `[rows]`.
            classes: Every label that will come; needed where the first batch does not hold them all.

        Raises:
            UnknownNameError: A label that is none of `classes`.
            DataError: The eraser was loaded; covariances are not saved, so that it can't go on.
        """
        from concept_erasure import LeaceFitter

        if self.__sklearn_is_fitted__() and not hasattr(self, "_fitter"):
            raise DataError("a loaded eraser can't take in more batches; fit a new one on all of them")
        x, labels = _checked(X, y)
        if not hasattr(self, "_fitter"):
            self.classes_ = np.unique(labels if classes is None else np.asarray(classes))
            if len(self.classes_) < 2:
                raise DataError(
                    f"the labels have one class only ({self.classes_[0]!r}); give classes=... where others "
                    "come later"
                )
            # One column for two classes: the other is its complement. The trace bound of the package only
            # acts on rounding, since the residual's covariance is never above the data's.
            columns = 1 if len(self.classes_) == 2 else len(self.classes_)
            self._fitter = LeaceFitter(
                x.shape[1],
                columns,
                dtype=torch.float64,
                shrinkage=self.shrinkage,
                svd_tol=SMALLEST,
                constrain_cov_trace=False,
            )
            self.n_features_in_ = x.shape[1]
        _check_width(x.shape, self.n_features_in_)
        strange = ~np.isin(labels, self.classes_)
        if strange.any():
            raise unknown(
                "label", str(labels[strange][0]), map(str, self.classes_), "Give classes=... at first."
            )
        one_hot = labels[:, None] == self.classes_[None, :]
        self._fitter.update(x, torch.from_numpy(one_hot[:, 1:] if len(self.classes_) == 2 else one_hot))
        self.rows_ = int(self._fitter.n)
        self._found = None
        self.__dict__.pop("origin_", None)  # what was measured was measured on another map
        return self

    def said(self) -> str:
        how = "optimal linear shrinkage" if self.shrinkage else "no shrinkage"
        return f"LEACE, covariance with {how}"

    def arrays(self) -> dict[str, np.ndarray]:
        return {"left": self.left_, "right": self.right_, "centre": self.centre_}

    def parameters(self) -> dict[str, Any]:
        labels = {"classes": self.classes_.tolist(), "classes_dtype": self.classes_.dtype.str}
        return {"shrinkage": self.shrinkage, "rows": self.rows_, **labels}

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> Self:
        made = cls(shrinkage=parameters["shrinkage"])
        made.classes_ = np.array(parameters["classes"], dtype=np.dtype(parameters["classes_dtype"]))
        made.rows_ = parameters["rows"]
        made.n_features_in_ = len(arrays["centre"])
        made._found = (arrays["left"], arrays["right"], arrays["centre"])
        return made

    def _map(self) -> Map:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet; call fit or update first")
        if self.rows_ < 2:
            raise DataError("the eraser has seen one row; it needs two at least")
        # One eigendecomposition however many batches came, once it is asked for.
        if self._found is None:
            found = self._fitter.eraser
            kept = found.proj_right.abs().sum(1) > 0  # what carries nothing is a row of zeros
            self._found = (
                found.proj_left[:, kept].numpy(),
                found.proj_right[kept].numpy(),
                self._fitter.mean_x.numpy().copy(),
            )
        return self._found

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_found")


class ProjectionEraser(Eraser):
    """Projects given directions out: `x - Q Q^T (x - centre)`, with `Q` an orthonormal basis of them.

    The simplest ablation (as of Arditi et al. 2024, arXiv:2406.11717). With the centre at zero, activations
    lose also their mean along the directions, which every later layer was trained on; give `centre=` (the
    mean of the activations) to remove only what varies.

    Args:
        directions: `[d]` or `[k, d]`; any length, not zero, and linearly independent.
        centre: `[d]`, the point that stays; zero when not given.
    """

    name = "projection"

    def __init__(self, directions: Any, *, centre: Any = None) -> None:
        self.directions = directions
        self.centre = centre
        rows = np.atleast_2d(np.asarray(as_array(directions), dtype=np.float64))
        if rows.ndim != 2 or not np.isfinite(rows).all():
            raise DataError(f"directions must be finite numbers [d] or [k, d]; shape {rows.shape} arrived")
        if np.linalg.matrix_rank(rows) < len(rows):
            raise DataError(f"the {len(rows)} directions are linearly dependent, or one is zero")
        basis = np.ascontiguousarray(np.linalg.qr(rows.T)[0])
        middle = np.zeros(rows.shape[1]) if centre is None else np.asarray(as_array(centre), dtype=np.float64)
        if middle.shape != (rows.shape[1],):
            raise DataError(f"centre has shape {middle.shape}; the directions have width {rows.shape[1]}")
        self._found = (basis, basis.T, middle)

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        at = "zero" if self.centre is None else "the centre given"
        return f"ProjectionEraser({self.rank} directions of width {len(self.centre_)}, to {at})"

    def fit(self, X: Any = None, y: Any = None) -> Self:
        """Nothing to learn; here for pipelines."""
        return self

    def said(self) -> str:
        return f"projection, to {'zero' if self.centre is None else 'the centre given'} along its directions"

    def arrays(self) -> dict[str, np.ndarray]:
        given = np.asarray(as_array(self.directions), dtype=np.float64)
        return {"left": self.left_, "centre": self.centre_, "directions": given}

    def parameters(self) -> dict[str, Any]:
        return {"centred": self.centre is not None}

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> Self:
        centre = arrays["centre"] if parameters["centred"] else None
        made = cls(arrays["directions"], centre=centre)
        # The basis as it was: another machine's factorisation may differ in its last bits.
        made._found = (arrays["left"], arrays["left"].T, arrays["centre"])
        return made

    def _map(self) -> Map:
        return self._found

    def __sklearn_is_fitted__(self) -> bool:
        return True


def _checked(x: Any, y: Any) -> tuple[Tensor, np.ndarray]:
    found = torch.as_tensor(np.asarray(as_array(x), dtype=np.float64))
    labels = np.asarray(as_labels(y))
    if found.dim() != 2 or not len(found):
        raise DataError(f"activations must be [rows, d] with at least one row; {tuple(found.shape)} arrived")
    if labels.shape != (len(found),):
        raise DataError(f"labels have shape {labels.shape}; expected one for each of {len(found)} rows")
    if not bool(torch.isfinite(found).all()):
        row = int(torch.argmin(torch.isfinite(found).all(1).to(torch.int8)))
        raise NonFiniteError(f"the activations hold NaN or infinity, first in row {row}")
    return found, labels


def _check_width(shape: Sequence[int], width: int) -> None:
    if shape[-1] != width:
        raise DataError(f"the eraser takes {width} features; activations of shape {tuple(shape)} arrived")
