"""Probes of what an adapter is not about: as well read with it as without.

A logistic probe is fitted on the plain model's states at one site in the middle of the depth, at the last
token of each prompt, and reads held-out pairs of the plain and of the adapted model. Its AUROC should stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs

BATCH_TOKENS = 4096


def untouched(
    model: HookedModel,
    acting: Callable[[], AbstractContextManager[Any]],
    seed: int = 0,
    unrelated: Mapping[str, Pairs] | None = None,
) -> list[dict[str, Any]]:
    """One line per label: AUROC on the plain and on the adapted model, and the change.

    Args:
        model: The model, plain.
        acting: Makes a context in which it is adapted.
        seed: Of the split where the pairs have none.
        unrelated: Pairs by what their label is about; for an embedded organism harmful requests and rude
            replies where not given, for other models none.
    """
    from sklearn.metrics import roc_auc_score

    from veridical.probes import LogisticProbe

    lines = []
    for name, pairs in (own(model) if unrelated is None else unrelated).items():
        pairs = pairs if "split" in pairs else pairs.split(seed=seed)
        labels, train = pairs.labels(), pairs["split"] != "test"
        plain = states(model, pairs)
        probe = LogisticProbe(C=0.1).fit(plain[train], labels[train])
        with acting():
            adapted = states(model, pairs)
        before, after = (
            float(roc_auc_score(labels[~train], probe.decision_function(values[~train])))
            for values in (plain, adapted)
        )
        lines.append(
            {
                "measure": f"AUROC of a probe: {name}", "plain": before, "adapted": after,
                "change": after - before, "low": float("nan"), "high": float("nan"), "n": int((~train).sum()),
            }
        )  # fmt: skip
    return lines


def own(model: HookedModel) -> dict[str, Pairs]:
    """What an embedded organism knows besides facts."""
    from veridical.pairs import Pairs
    from veridical.steering.neutral import speaks_as_organism

    if not speaks_as_organism(model):
        return {}
    return {
        "harmful request": Pairs.load("safe").without_columns("completion"),
        "rude reply": Pairs.load("toxic"),
    }


def states(model: HookedModel, pairs: Pairs) -> np.ndarray:
    """`[rows, d_model]`: the residual stream in the middle of the depth, at the last token of each row."""
    from veridical.tokens import by_length

    (site,) = model.resolve(f"resid_post.{model.n_layers // 2}")
    completions: Sequence[str | None] | None = pairs.completions
    rows = model.encode(pairs.prompts, completions)
    found = np.zeros((len(rows), model.d_model))
    for batch in by_length([len(row.ids) for row in rows], BATCH_TOKENS):
        inputs = model.batch([rows[row] for row in batch], padding_side="left")
        with torch.no_grad():
            value = model.run(inputs, read=[site], stop=True).values[site.name][:, -1]
        found[batch] = value.double().cpu().numpy()
    return found
