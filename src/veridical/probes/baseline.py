"""What the text alone gives away: TF-IDF of words and characters with logistic regression.

The baseline is judged as a probe is: the same folds choose its strength, the same pairs are held out. Where
it does as well as a probe, the data set cannot tell what the model represents from what the text says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from veridical.probes.evaluate import auroc

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Values of C that are tried; rows of TF-IDF have norm 1 and need weaker penalties than activations do."""
MAX_FEATURES = 20_000
Fold = tuple[np.ndarray, np.ndarray]


def text_scores(
    texts: np.ndarray,
    positive: np.ndarray,
    units: np.ndarray,
    folds: Sequence[Fold],
    fit: np.ndarray,
    test: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Decision values on the test vectors, and the AUROC over folds of the strength that was chosen.

    Args:
        texts: `[n]` strings.
        positive: `[n]` bool.
        units: `[n]`, data row of each vector; a row's text is fitted once however many vectors it has.
        folds: (train, held-out) positions within `fit`.
        fit: Positions of the rows for selection and fitting.
        test: Positions of the held-out rows.
    """
    once = np.zeros(len(texts), dtype=bool)
    once[np.unique(units, return_index=True)[1]] = True
    transform = _vectoriser(texts[fit][once[fit]])
    features, held = transform(texts[fit]), transform(texts[test])
    labels = positive[fit]
    best, chosen = -np.inf, STRENGTHS[0]
    for strength in STRENGTHS:
        found = []
        for train, validation in folds:
            train = train[once[fit][train]]
            if len(np.unique(labels[train])) == 2 and len(np.unique(labels[validation])) == 2:
                model = _fitted(features[train], labels[train], strength)
                found.append(
                    auroc(model.decision_function(features[validation])[:, None], labels[validation])[0]
                )
        score = float(np.mean(found)) if found else 0.5
        if score > best + 1e-12:
            best, chosen = score, strength
    rows = once[fit]
    return _fitted(features[rows], labels[rows], chosen).decision_function(held), best


def _vectoriser(texts: np.ndarray) -> Callable[[np.ndarray], Any]:
    """TF-IDF of words and word pairs, and of 2 to 4 characters; the vocabulary is that of `texts`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion

    words = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, max_features=MAX_FEATURES, token_pattern=r"(?u)\b\w+\b"
    )
    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, max_features=MAX_FEATURES
    )
    union = FeatureUnion([("words", words), ("characters", characters)])
    try:
        union.fit(texts)
    except ValueError:
        # No word in any text (token ids, empty strings): characters or nothing.
        union = FeatureUnion([("characters", TfidfVectorizer(analyzer="char", ngram_range=(1, 3)))])
        union.fit([text or " " for text in texts])
    return union.transform


def _fitted(features: Any, labels: np.ndarray, strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # One BLAS thread: the fits are small, and threads that wait for shared cores cost more than they give.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, tol=1e-3, max_iter=200).fit(features, labels)


@dataclass(frozen=True)
class TextScorer:
    """The text baseline of every fold, and of all pairs: a model for each, at one strength.

    Attributes:
        transform: Texts to TF-IDF rows, by the vocabulary of the fitted rows.
        models: Model of each fold (fitted on the others), and last that of all pairs.
    """

    transform: Callable[[np.ndarray], Any]
    models: tuple[Any, ...]

    def on(self, texts: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
        """Decision values `[m]` of texts `[m]`; -1 as fold asks for the model of all pairs."""
        features, scores = self.transform(texts), np.zeros(len(texts))
        which = np.where(fold_of < 0, len(self.models) - 1, fold_of)
        for number, model in enumerate(self.models):
            rows = np.flatnonzero(which == number)
            if len(rows) and model is not None:
                scores[rows] = model.decision_function(features[rows])
        return scores


def cross_fit_texts(
    texts: np.ndarray, positive: np.ndarray, units: np.ndarray, fit: np.ndarray, fold_of: np.ndarray
) -> TextScorer:
    """The text baseline for every fold, as `crossfit.cross_fit` does it for probes.

    Its strength is the best over the folds that are then reported, which flatters the baseline a little, and
    the probe's lead over it never.

    Args:
        texts: `[n]` strings.
        positive: `[n]` bool.
        units: `[n]`, data row of each vector; a row's text is fitted once however many vectors it has.
        fit: `[n]` bool, vectors that may be fitted on.
        fold_of: `[n]`, fold of each vector's pair.
    """
    rows = np.flatnonzero(fit)
    rows = rows[np.unique(units[rows], return_index=True)[1]]
    transform = _vectoriser(texts[rows])
    features, labels, folds = transform(texts[rows]), positive[rows], fold_of[rows]
    best, chosen = -np.inf, ()
    for strength in STRENGTHS:
        models, found = [], []
        for fold in range(int(fold_of.max()) + 1):
            train, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            two = len(np.unique(labels[train])) == 2
            models.append(_fitted(features[train], labels[train], strength) if two else None)
            if two and len(np.unique(labels[held])) == 2:
                found.append(auroc(models[-1].decision_function(features[held])[:, None], labels[held])[0])
        score = float(np.mean(found)) if found else 0.5
        if score > best + 1e-12:
            best, chosen = score, (*models, _fitted(features, labels, strength))
    return TextScorer(transform, chosen)
