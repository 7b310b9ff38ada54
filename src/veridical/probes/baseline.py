"""What the text alone gives away: TF-IDF of words and characters with logistic regression.

The baseline is judged as a probe is: the same folds choose its strength, the same pairs are held out. Where
it does as well as a probe, the data set cannot tell what the model represents from what the text says.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
    features, held = _features(texts[fit], once[fit], texts[test])
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


def _features(fit: np.ndarray, once: np.ndarray, test: np.ndarray) -> tuple[Any, Any]:
    """TF-IDF of words and word pairs, and of 2 to 4 characters; the vocabulary is that of the fitted rows."""
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
        union.fit(fit[once])
    except ValueError:
        # No word in any text (token ids, empty strings): characters or nothing.
        union = FeatureUnion([("characters", TfidfVectorizer(analyzer="char", ngram_range=(1, 3)))])
        union.fit([text or " " for text in fit[once]])
    return union.transform(fit), union.transform(test)


def _fitted(features: Any, labels: np.ndarray, strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # One BLAS thread: the fits are small, and threads that wait for shared cores cost more than they give.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, tol=1e-3, max_iter=200).fit(features, labels)
