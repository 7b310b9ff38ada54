"""Side effects on other probes: whether what has nothing to do with an intervention can be read as before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs


class Acting(Protocol):
    """Makes a context in which the model is steered."""

    def __call__(self) -> AbstractContextManager[Any]: ...


BATCH_TOKENS = 4096


class OtherProbes:
    """Probes of unrelated labels, fitted once on the plain model and read under any number of interventions.

    Args:
        model: The model, plain.
        unrelated: Pairs by what their label is about; for an embedded organism harmful requests and rude
            replies where not given.
        rows: Rows at most of each, whole pairs.
        seed: Of their draw, and of the split where there is none.
    """

    def __init__(
        self, model: HookedModel, unrelated: Mapping[str, Pairs] | None = None, rows: int = 400, seed: int = 0
    ) -> None:
        from veridical.probes import LogisticProbe
        from veridical.running import limited

        self.model = model
        self.probes: dict[str, tuple[Any, Any, np.ndarray, float]] = {}
        for name, pairs in (own(model) if unrelated is None else unrelated).items():
            share = max(4, rows * len(np.unique(pairs.groups)) // len(pairs))
            pairs = limited(pairs if "split" in pairs else pairs.split(seed=seed), share, seed)
            train = pairs["split"] != "test"
            labels, values = pairs.labels(), states(model, pairs)
            probe = LogisticProbe(C=0.1).fit(values[train], labels[train])
            held_out = labels[~train] == 1
            plain = _auroc(probe, values[~train], held_out)
            self.probes[name] = probe, pairs.filter(~train), held_out, plain

    def __call__(self, context: Acting) -> dict[str, tuple[float, float]]:
        """For each label the AUROC on held-out pairs, plain and steered."""
        found = {}
        for name, (probe, pairs, held_out, plain) in self.probes.items():
            with context():
                values = states(self.model, pairs)
            found[name] = plain, _auroc(probe, values, held_out)
        return found


def _auroc(probe: Any, values: np.ndarray, positive: np.ndarray) -> float:
    from veridical.probes.evaluate import auroc

    return float(auroc(probe.decision_function(values)[:, None], positive)[0])


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
