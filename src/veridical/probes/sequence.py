"""Probes for a label on a whole sequence of tokens: the form of their data, and what they all share.

Every estimator here reads each token with one or more linear functions and pools the readings of a sequence
into one log-odds; its file gives the pooling. `token_scores` of a token is the log-odds that a sequence of
that one token would get, so that colours over a text, alarms while a text is written, and the label of the
whole are in the same unit.

Scores that grow with the number of tokens (a maximum over more draws is larger) tell lengths apart where
nothing else differs. Estimators with `adjust_length` subtract what as many tokens that say nothing would be
expected to reach; a sweep reports what length alone would reach.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from veridical.errors import DataError
from veridical.probes import evaluate
from veridical.probes.base import LinearProbe, as_array, as_labels
from veridical.probes.data import Source, Task, as_column, read_source

if TYPE_CHECKING:
    from veridical.activations import Activations


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token vectors of several sequences, one after the other; no padding.

    Attributes:
        vectors: `[tokens, d]`.
        lengths: `[n]` int64, tokens of each sequence, at least 1.
    """

    vectors: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, x: Any, rows: Any = None) -> Sequences:
        """Takes sequences in any of their forms; vectors become float64 and stay on their device.

        Args:
            x: With `rows`, vectors `[tokens, d]`. Without, a list of arrays `[t_i, d]`, an array `[n, t, d]`
                of sequences of one length, or an array `[n, d]` of sequences of one token.
            rows: `[tokens]`, the sequence of each vector, such as `acts.index["row"]`; the tokens of a
                sequence stand together. Sequences are in order of appearance.

        Raises:
            DataError: Another shape, a sequence without tokens, widths that differ, or `rows` that return to
                a sequence after another one began.
        """
        if isinstance(x, Sequences):
            return x
        if rows is not None:
            vectors = _matrix(x, "the vectors")
            return cls(vectors, runs(rows, len(vectors)).to(vectors.device))
        if _is_list_of_sequences(x):
            parts = [_matrix(part, f"sequence {number}") for number, part in enumerate(x)]
            return cls._joined(parts)
        whole = x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float64))
        if whole.ndim not in (2, 3) or 0 in whole.shape[:2]:
            raise DataError(
                f"sequences have shape {tuple(whole.shape)}; expected a list of arrays [tokens, d], or an "
                "array [sequences, tokens, d] or [sequences, d]"
            )
        each = whole.shape[1] if whole.ndim == 3 else 1
        lengths = torch.full((len(whole),), each, dtype=torch.int64, device=whole.device)
        return cls(whole.reshape(-1, whole.shape[-1]).to(torch.float64), lengths)

    @classmethod
    def _joined(cls, parts: Sequence[Tensor]) -> Sequences:
        for number, part in enumerate(parts):
            if not len(part):
                raise DataError(f"sequence {number} has no tokens; leave it out with its label")
            if part.shape[1] != parts[0].shape[1]:
                raise DataError(
                    f"sequence {number} has vectors of width {part.shape[1]}; the first has "
                    f"{parts[0].shape[1]}"
                )
        lengths = torch.tensor([len(part) for part in parts], device=parts[0].device)
        return cls(torch.cat(list(parts)), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, which: Any) -> Any:
        """Tokens `[t, d]` of one sequence by number; several by an array of numbers or booleans."""
        if isinstance(which, int | np.integer):
            if not -len(self) <= which < len(self):
                raise IndexError(f"sequence {which} of {len(self)}")
            first = int(self.lengths[: int(which) % len(self)].sum())
            return self.vectors[first : first + int(self.lengths[which])]
        numbers = np.arange(len(self))[which]
        chosen = torch.from_numpy(np.atleast_1d(numbers)).to(self.lengths.device)
        lengths = self.lengths[chosen]
        return Sequences(self.vectors[_tokens_of(self.lengths, chosen)], lengths)

    @property
    def rows(self) -> Tensor:
        """`[tokens]`, the sequence of each token."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.lengths.device), self.lengths)

    def means(self) -> Tensor:
        """Mean vector of each sequence, `[n, d]`."""
        sums = self.vectors.new_zeros(len(self), self.vectors.shape[1])
        return sums.index_add_(0, self.rows, self.vectors) / self.lengths[:, None]

    def __repr__(self) -> str:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        return f"Sequences({len(self)} of {low} to {high} tokens, width {self.vectors.shape[1]})"


class Running:
    """Log-odds of sequences that are still being written, token by token, for `b` sequences at once.

    `update` gives what `decision_function` would give for the tokens so far. An estimator says in `add` how
    one more token changes the pooled score.
    """

    def __init__(self, drift: Callable[[Tensor], Tensor] | None = None) -> None:
        self.count = 0
        self._drift = drift

    def update(self, readings: Tensor) -> Tensor:
        """Takes the next token's readings `[b, channels]` (see `SequenceProbe.readers`); log-odds `[b]`."""
        self.count += 1
        score = self.add(readings)
        return score if self._drift is None else score - float(self._drift(torch.tensor([self.count])))

    def add(self, readings: Tensor) -> Tensor:
        """The pooled score `[b]` with one more token."""
        raise TypeError(f"{type(self).__name__} does not say how a token is added")


class SequenceProbe(LinearProbe):
    """A binary probe with one label per sequence of tokens; the base of the estimators that pool.

    `fit`, `decision_function`, `predict_proba` and `predict` take a `Sequences`, a list of arrays `[t_i, d]`,
    an array `[n, t, d]`, or an array `[n, d]` whose rows are sequences of one token each. Labels, groups and
    scores are one per sequence.

    Attributes:
        coef_: `[1, d]`, gradient of the score of a single token: how the log-odds of a sequence of one token
            depend on that token. For attention it is the sum of the heads' value vectors.
        intercept_: `[1]`, its intercept.
    """

    reads: ClassVar[str] = "a list of activations [tokens, {width}], one for each sequence"
    labelled: ClassVar[str] = "sequences"
    tuned = True

    def __init__(self, C: float = 1.0, *, standardise: bool = True) -> None:
        self.C = C
        self.standardise = standardise

    @abstractmethod
    def decide(self, x: Sequences) -> np.ndarray:
        """Log-odds `[n]` of checked sequences."""

    @abstractmethod
    def running(self) -> Running:
        """A state that takes one token after the other, for monitoring."""

    def readers(self) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients `[channels, d]` and intercepts `[channels]` whose readings `running` takes."""
        check_is_fitted(self)
        return self.coef_, self.intercept_

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-odds of the positive class, `[n]`, for sequences in any of their forms."""
        check_is_fitted(self)
        return self.decide(self._rows(X))

    def token_scores(self, X: Any) -> np.ndarray:
        """Log-odds `[tokens]` that a sequence of that one token would get, for vectors `[tokens, d]`.

        Of several sequences, those of all tokens one after the other.
        """
        check_is_fitted(self)
        return self.decide(Sequences.of(self._rows(X).vectors))

    def one_each(self, x: Sequences) -> Tensor:
        """The mean over the tokens of each sequence."""
        return x.means()

    def source(
        self, acts: Activations | Mapping[str, Any], target: Any, groups: Any, texts: Any, rows: Any
    ) -> Source:
        """Sequences with their labels, for a sweep; labels, groups, texts and `rows` are per sequence."""
        return read_sequences(acts, target, groups, texts, rows)

    def notes(self, source: Source, task: Task) -> tuple[str, ...]:
        """How long the sequences are, and how well their length alone tells the held-out labels."""
        if not isinstance(source, SequenceSource):
            return ()
        used = source.lengths[np.concatenate([task.fit, task.test])]
        low, high = int(used.min()), int(used.max())
        if low == high:
            return (f"Each score is of a whole sequence of {low} tokens.",)
        lengths, truth = source.lengths[task.test].astype(np.float64), task.positive[task.test]
        alone = float(evaluate.auroc(lengths[:, None], truth)[0])
        return (
            f"Each score is of a whole sequence of {low} to {high} tokens (mean {used.mean():.1f}); length "
            f"alone has AUROC {alone:.3f} on the held-out pairs (below 0.5: the shorter are positive).",
        )

    def _rows(self, X: Any, y: Any = None, fitting: bool = False) -> Any:
        """Checked sequences; with `fitting` also sets the width, and checks the labels' number."""
        if not isinstance(X, Sequences) and not _is_list_of_sequences(X) and getattr(X, "ndim", 2) != 3:
            # scikit-learn's own checks and messages for a plain matrix.
            return Sequences.of(
                validate_data(
                    self, as_array(X), dtype=np.float64, ensure_min_samples=2 if fitting else 1, reset=fitting
                )
            )
        x = Sequences.of(X)
        finite = torch.isfinite(x.vectors).all(1)
        if not bool(finite.all()):
            first = int(torch.argmin(finite.to(torch.int8)))
            bad = int((~finite).sum())
            raise DataError(
                f"{bad} of {len(finite)} token vectors hold NaN or infinity, the first in sequence "
                f"{int(x.rows[first])}"
            )
        width = x.vectors.shape[1]
        if fitting:
            self.n_features_in_ = width
        elif width != self.n_features_in_:
            raise DataError(f"the tokens have {width} features; the probe reads {self.n_features_in_}")
        return x

    def _fitted_on(self, X: Any, y: Any) -> tuple[Any, np.ndarray]:
        x = self._rows(X, fitting=True)
        labels = np.asarray(as_labels(y))
        if y is None:
            raise DataError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        if labels.ndim == 0 or len(labels) != len(x):
            raise DataError(f"y has shape {labels.shape}; expected one label for each of {len(x)} sequences")
        return x, labels


@dataclass(frozen=True, kw_only=True)
class SequenceSource(Source):
    """A source with one entry per sequence.

    Attributes:
        tokens: The source of the token vectors.
        lengths: `[n]`, tokens of each sequence.
    """

    tokens: Source
    lengths: np.ndarray

    def count(self, rows: np.ndarray) -> int:
        """Tokens of the sequences at `rows`."""
        return int(self.lengths[rows].sum())

    def vectors(self, site: str, rows: np.ndarray, device: torch.device | None = None) -> Any:
        """The sequences at `rows` as `Sequences` in float64; NaN or infinity is refused."""
        lengths, chosen = torch.from_numpy(self.lengths), torch.from_numpy(np.asarray(rows))
        vectors = self.tokens.vectors(site, _tokens_of(lengths, chosen).numpy(), device)
        return Sequences(vectors, lengths[chosen].to(vectors.device))


def read_sequences(
    acts: Activations | Mapping[str, Any], target: Any, groups: Any, texts: Any, rows: Any
) -> SequenceSource:
    """A store of several tokens per row, or a dict of site to sequences, with one entry per sequence.

    Args:
        acts: What `collect(..., tokens="all" or "answer" or a span)` returned, or a dict of site to sequences
            in any form of `Sequences.of`.
        target: Label column, or labels `[n]`.
        groups: `[n]`, pair of each sequence; the `pair` column when not given.
        texts: `[n]`, for the text baseline.
        rows: Table of label columns for a dict, `[n]`.
    """
    if isinstance(acts, Mapping):
        read = {str(site): Sequences.of(x) for site, x in acts.items()}
        if not read:
            raise DataError("the dict of activations is empty; expected site names with lists of [tokens, d]")
        first = next(iter(read.values()))
        for site, x in read.items():
            if not torch.equal(x.lengths.cpu(), first.lengths.cpu()):
                raise DataError(
                    f"the sequences at {site} have other lengths than those at {next(iter(read))}"
                )
        lengths = first.lengths.cpu()
        vectors: Any = {site: x.vectors for site, x in read.items()}
    else:
        lengths, vectors = runs(acts.index["row"].to_numpy(), len(acts)), acts
    number = torch.repeat_interleave(torch.arange(len(lengths)), lengths).numpy()

    def each(values: Any, name: str) -> np.ndarray:
        """One value per sequence as one per token."""
        return as_column(values, name, len(lengths))[number]

    notes: tuple[str, ...] = ()
    if isinstance(acts, Mapping):
        rows = {str(k): each(v, str(k)) for k, v in dict({} if rows is None else rows).items()}
        if groups is None and "pair" not in rows:
            groups, notes = np.arange(len(lengths)), ("No pairs were given: each sequence is its own pair.",)
    tokens = read_source(
        vectors,
        target if target is None or isinstance(target, str) else each(target, "target"),
        None if groups is None else each(groups, "groups"),
        None if texts is None else each(np.array(list(texts), dtype=object), "texts"),
        rows,
    )
    begins = torch.cumsum(lengths, 0).numpy() - lengths.numpy()
    return SequenceSource(
        sites=tokens.sites,
        take=tokens.take,
        shapes=tokens.shapes,
        columns={name: np.asarray(values)[begins] for name, values in tokens.columns.items()},
        groups=tokens.groups[begins],
        units=tokens.units[begins],
        texts=None if tokens.texts is None else tokens.texts[begins],
        facts=tokens.facts,
        notes=(*tokens.notes, *notes),
        tokens=tokens,
        lengths=lengths.numpy(),
    )


def runs(rows: Any, tokens: int) -> Tensor:
    """Lengths `[n]` of the runs of equal values in `rows` `[tokens]`."""
    values = np.asarray(as_labels(rows))
    if values.shape != (tokens,) or not tokens:
        raise DataError(f"rows has shape {values.shape}; expected the sequence of each of {tokens} vectors")
    begins = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    if len(np.unique(values)) != len(begins):
        back = values[begins][np.argmax([value in values[:at] for at, value in zip(begins, values[begins])])]
        raise DataError(f"the tokens of sequence {back} do not stand together; sort the vectors by sequence")
    return torch.from_numpy(np.diff(np.append(begins, tokens)))


def _tokens_of(lengths: Tensor, chosen: Tensor) -> Tensor:
    """Positions of the tokens of the sequences `chosen`, in that order."""
    begins = torch.cumsum(lengths, 0) - lengths
    wanted = lengths[chosen]
    offsets = torch.cumsum(wanted, 0) - wanted
    within = torch.arange(int(wanted.sum()), device=lengths.device) - torch.repeat_interleave(offsets, wanted)
    return torch.repeat_interleave(begins[chosen], wanted) + within


def _is_list_of_sequences(x: Any) -> bool:
    return isinstance(x, list | tuple) and len(x) > 0 and np.ndim(as_array(x[0])) == 2


def _matrix(x: Any, name: str) -> Tensor:
    made = x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float64))
    if made.ndim != 2:
        raise DataError(f"{name} has shape {tuple(made.shape)}; expected [tokens, d]")
    return made.to(torch.float64)
