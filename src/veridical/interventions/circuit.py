"""Automatic circuit finding: edges ranked by attribution, kept as few as explain the metric, checked exactly.

A circuit is a set of edges. Its worth is measured by runs in which every edge outside it carries the corrupt
run and every edge inside the clean one, as it becomes in that run (Conmy et al. 2023, arXiv:2304.14997):

    faithfulness = (metric of the circuit - metric of corrupt) / (metric of clean - metric of corrupt)

which is 0 for no edges and 1 for all of them, both exactly. Without the circuit, its edges alone carry the
corrupt run: what is left then, in the same unit, is 0 for a complete circuit (Wang et al. 2022,
arXiv:2211.00593). Means over rows are taken before the quotient.

Edges are ranked by edge attribution patching (Syed et al. 2023, arXiv:2310.10348): to first order only, so
what it finds is judged by exact runs, on rows that had no part in the choice where there are enough, and
beside random circuits of as many edges. It can miss edges that matter together and not alone, and those whose
gradient vanishes; `prune` drops edges that an exact run shows not to matter, in the manner of ACDC, but adds
none. Method "exact" ranks by patching each edge alone, a run for each edge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from veridical.errors import InputError, NonFiniteError, unknown
from veridical.interventions.between import Between
from veridical.interventions.circuit_result import Circuit
from veridical.interventions.connected import connected, random_circuit
from veridical.interventions.graph import Edge
from veridical.interventions.paths import as_edges, edge_variant
from veridical.probes import evaluate
from veridical.progress import bar

if TYPE_CHECKING:
    from torch import nn

    from veridical.hooked import HookedModel

Method = Literal["edges_ig", "edges", "exact"]
METHODS = ("edges_ig", "edges", "exact")
ENOUGH = 10
"""Groups of rows from which on some are held out."""
POINTS = 20
"""Sizes of circuits on the curve, evenly apart in their logarithm."""
CONTROL_POINTS = 5
"""Sizes at which random circuits are measured, beside that of the circuit."""
AT_ONCE = 16
"""Removals that are tried in one batch while pruning."""


def find_circuit(
    model: HookedModel | nn.Module,
    clean: Any,
    corrupt: Any,
    *,
    metric: Any = "logit_diff",
    keep: int | float | None = None,
    faithfulness: float = 0.8,
    method: Method = "edges_ig",
    edges: Any = None,
    prune: float | None = None,
    holdout: float = 0.5,
    controls: int = 10,
    answers: Any = None,
    wrong: Any = None,
    align: Any = None,
    bootstrap: int = 500,
    seed: int = 0,
    batch_tokens: int = 8192,
    progress: bool | None = None,
) -> Circuit:
    """Finds the edges that make a metric differ between clean and corrupt rows, and checks them.

    Args:
        model: The model; its parts must add up in the residual stream.
        clean: A text or chat, a list of them, token ids `[batch, pos]`, `Pairs`, or images.
        corrupt: The same; row i goes with row i of clean.
        metric: A name, a function `logits -> [batch]`, or a `Metric`; smooth for "edges_ig" and "edges".
        keep: How many of the strongest edges to take: a number, or a share below 1 of all edges. Of these,
            those that lie on no way from the embedding to the logits are left out.
        faithfulness: Where `keep` is not given: the smallest circuit, along the ranking, whose faithfulness
            on the choosing rows is as close to 1 as this is.
        method: How edges are ranked: "edges_ig" by edge attribution with integrated gradients, "edges" by the
            gradient at the clean run alone, which is cheaper and misses edges whose effect is saturated
            there, "exact" by patching each alone.
        edges: A circuit of your own ("head.0.1->head.1.2:k", ...), to be checked instead of found.
        prune: Drop edges one after another, from the logits down and the weakest first, whose removal moves
            the faithfulness by less than this.
        holdout: Share of the groups of rows that have no part in ranking and choosing, where there are at
            least 10 groups.
        controls: Random circuits of each size.
        answers, wrong: Answers for metrics that need them; see `as_metric`.
        align: For rows of unequal token counts; see `Inputs`.
        bootstrap: Resamples of held-out rows (whole pairs, for `Pairs`) for the 95 % intervals.
        seed: Of the split, the resamples and the random circuits.
        batch_tokens: Tokens in one forward; several circuits run as copies of the rows in one batch.
        progress: Whether to show a bar; None where someone watches.

    Returns:
        The edges with their scores, the faithfulness of growing circuits, and figures of both.

    Raises:
        UnknownNameError: An edge or method that does not exist.
        InputError: A bad metric, `keep` or threshold, or rows whose metric is the same clean and corrupt.
        ModelError: A model whose parts do not add up (bert).
    """
    _check(method, keep, faithfulness, prune, holdout, controls)
    between = Between(
        model, clean, corrupt, metric, direction="noising", answers=answers, wrong=wrong, align=align,
        batch_tokens=batch_tokens,
    )  # fmt: skip
    with bar(None, "circuits", "runs", progress) as shown:
        search = _Search(between, holdout, seed, shown.update)
        given = (
            [edge for item in as_edges(between.graph, edges) for edge in item] if edges is not None else None
        )
        search.rank(method, clean, corrupt, align, progress)
        if given is not None:
            chosen = connected(between.graph, given)
        elif keep is not None:
            chosen = search.top(int(keep) if keep >= 1 else round(keep * len(between.graph)))
        else:
            chosen = search.smallest(faithfulness)
        if prune is not None:
            chosen = search.pruned(chosen, prune)
        curve, drawn = search.curve(len(chosen), controls)
        inside, outside, random = search.judged(chosen, controls)
    return _result(search, chosen, curve, drawn, inside, outside, random, method, bootstrap, controls, prune)


class _Search:
    """Rows to choose by and rows to judge by, edges in order, and circuits measured so far."""

    def __init__(self, between: Between, holdout: float, seed: int, tick: Callable[[int], object]) -> None:
        self.between, self.graph, self.seed, self.tick = between, between.graph, seed, tick
        self.clean, self.corrupt = between.ends()
        self.choosing, self.held_out = _split(between, holdout, seed)
        self.measured: dict[frozenset[Edge], np.ndarray] = {}
        self.ranked: list[Edge] = list(between.graph.edges)
        self.scores = np.zeros(len(self.ranked))
        total = (self.clean - self.corrupt)[self.choosing].mean()
        if not np.isfinite(total):
            raise NonFiniteError(f"the metric {between.metric.name} is NaN or infinite on these rows")
        if abs(total) <= 1e-6 * (np.abs(self.clean).max() + np.abs(self.corrupt).max()):
            raise InputError(
                f"the metric {between.metric.name} is the same on clean and corrupt rows "
                f"({self.clean.mean():.4g} on average), so there is nothing that a circuit could explain"
            )

    def rank(self, method: Method, clean: Any, corrupt: Any, align: Any, progress: bool | None) -> None:
        """Sorts edges by the size of their mean score over the choosing rows; a score is what the edge adds
        to the metric."""
        if method == "exact":
            variants = [edge_variant([edge]) for edge in self.graph.edges]
            scores = self.clean - self.between.run(lambda x: x.measure(variants, self.tick))
        else:
            from veridical.interventions.attributing import attribute

            found = attribute(
                self.between.model, clean, corrupt, metric=self.between.metric, method=method,
                direction="noising", align=align, progress=progress, batch_tokens=self.between.batch_tokens,
            )  # fmt: skip
            assert found.edge_scores is not None
            ends = [
                (self.graph.sender_number(edge.sender), self.graph.receiver_number(edge.receiver))
                for edge in self.graph.edges
            ]
            scores = -np.stack([found.edge_scores[:, sender, receiver] for sender, receiver in ends])
        mean = scores[:, self.choosing].mean(1)
        if not np.isfinite(mean).all():
            raise NonFiniteError(
                f"scores of edges are NaN or infinite for the metric {self.between.metric.name}"
            )
        order = np.argsort(-np.abs(mean), kind="stable")
        self.ranked, self.scores = [self.graph.edges[i] for i in order], mean[order]

    # Circuits

    def top(self, size: int) -> list[Edge]:
        """What is connected of the `size` strongest edges."""
        return connected(self.graph, self.ranked[:size])

    def smallest(self, faithfulness: float) -> list[Edge]:
        """The smallest circuit along the ranking, to within the steps of the search, that is faithful."""
        sizes = self.sizes()

        def meets(circuit: list[Edge]) -> bool:
            return bool(abs(self.faithfulness([circuit])[0] - 1) <= 1 - faithfulness + 1e-9)

        self.values([self.top(size) for size in sizes])
        right = next(i for i, size in enumerate(sizes) if size == sizes[-1] or meets(self.top(size)))
        low, high = sizes[right - 1], sizes[right]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(self.top(middle)) else (middle, high)
        return self.top(high)

    def pruned(self, circuit: list[Edge], threshold: float) -> list[Edge]:
        """Drops edges one after another whose removal moves the faithfulness by less than `threshold`.

        Several removals are tried at once, each on top of those before it, as if all of them held; from the
        first that does not, the rest is tried again. The outcome is that of one at a time.
        """
        weak = {edge: i for i, edge in enumerate(reversed(self.ranked))}
        waiting = sorted(circuit, key=lambda edge: (-self.graph.receiver_number(edge.receiver), weak[edge]))
        kept, now = set(circuit), self.faithfulness([circuit])[0]
        while waiting:
            tried = [kept - set(waiting[: i + 1]) for i in range(min(AT_ONCE, len(waiting)))]
            for removed, value in zip(list(waiting), self.faithfulness(tried)):
                waiting.pop(0)
                if abs(value - now) >= threshold:
                    break
                kept, now = kept - {removed}, value
        return connected(self.graph, [edge for edge in circuit if edge in kept])

    def curve(
        self, size: int, controls: int
    ) -> tuple[list[tuple[int, int, np.ndarray]], dict[int, np.ndarray]]:
        """Edges asked for, edges kept and the metric `[rows]` of growing circuits; and at some of the sizes
        the metric of random circuits, `[controls, rows]`."""
        sizes = self.sizes()
        circuits = [self.top(count) for count in sizes]
        grown = [
            (count, len(circuit), value)
            for count, circuit, value in zip(sizes, circuits, self.values(circuits))
        ]
        inner = [count for count in sizes if 0 < count < len(self.graph)]
        steps = np.linspace(0, len(inner) - 1, min(CONTROL_POINTS, len(inner))).round().astype(int)
        drawn = {inner[i]: self.random(inner[i], controls) for i in steps} if controls else {}
        return grown, drawn

    def judged(self, circuit: list[Edge], controls: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The metric `[rows]` of the circuit and of the model without it, and `[controls, rows]` of random
        circuits of as many edges."""
        without = [edge for edge in self.graph.edges if edge not in set(circuit)]
        inside, outside = self.values([circuit, without])
        return inside, outside, self.random(len(circuit), controls)

    def random(self, size: int, controls: int) -> np.ndarray:
        """The metric of random circuits, `[controls, rows]`."""
        drawn = [
            random_circuit(self.graph, size, np.random.default_rng([self.seed, size, i]))
            for i in range(controls)
        ]
        return np.array(self.values(drawn)).reshape(controls, len(self.clean))

    def sizes(self) -> list[int]:
        """Sizes on the curve, with none and all."""
        steps = np.geomspace(1, len(self.graph), min(POINTS, len(self.graph)))
        return [0, *dict.fromkeys(int(step) for step in steps.round())]

    # Measuring

    def faithfulness(self, circuits: Sequence[Any]) -> list[float]:
        """On the choosing rows."""
        return [self.share(value, self.choosing) for value in self.values(circuits)]

    def share(self, value: np.ndarray, rows: np.ndarray) -> float:
        """How far the metric `[rows]` is from corrupt to clean, by its mean over some rows."""
        low, high = self.corrupt[rows].mean(), self.clean[rows].mean()
        return float((value[rows].mean() - low) / (high - low))

    def values(self, circuits: Sequence[Any]) -> list[np.ndarray]:
        """The metric of each circuit, `[rows]`, with every other edge corrupt; each is run once."""
        keys = [frozenset(circuit) for circuit in circuits]
        new = [key for key in dict.fromkeys(keys) if key not in self.measured]
        if new:
            variants = [edge_variant(e for e in self.graph.edges if e not in key) for key in new]
            found = self.between.run(lambda x: x.measure(variants, self.tick))
            self.measured.update(zip(new, found))
        return [self.measured[key] for key in keys]


def _result(
    search: _Search,
    chosen: list[Edge],
    curve: list[tuple[int, int, np.ndarray]],
    drawn: dict[int, np.ndarray],
    inside: np.ndarray,
    outside: np.ndarray,
    random: np.ndarray,
    method: str,
    bootstrap: int,
    controls: int,
    prune: float | None,
) -> Circuit:
    between, rank = search.between, {edge: i for i, edge in enumerate(search.ranked)}
    weights = between.weights(bootstrap, search.seed, search.held_out.tolist()).astype(np.float64)
    ordered = sorted(chosen, key=lambda edge: rank[edge])

    def figures(value: np.ndarray, rows: np.ndarray | None = None) -> dict[str, float]:
        made = {"faithfulness": search.share(value, search.choosing)}
        held = search.held_out
        if not len(held):
            return {**made, "held_out": np.nan, "held_out_low": np.nan, "held_out_high": np.nan}
        above = weights @ (value - search.corrupt)[held]
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled = above / (weights @ (search.clean - search.corrupt)[held])
        return {**made, **evaluate.estimate(search.share(value, held), resampled).columns("held_out")}

    judging = search.held_out if len(search.held_out) else search.choosing

    def band(values: np.ndarray) -> dict[str, float]:
        shares = [search.share(value, judging) for value in values] or [np.nan]
        return {"random": float(np.mean(shares)), "random_low": min(shares), "random_high": max(shares)}

    none = np.zeros((0, len(search.clean)))
    return Circuit(
        edges=tuple(edge.name for edge in ordered),
        scores=np.array([search.scores[rank[edge]] for edge in ordered], dtype=np.float64),
        ranks=np.array([rank[edge] for edge in ordered], dtype=np.int64),
        curve=pd.DataFrame(
            [
                {"edges": asked, "kept": kept, **figures(value), **band(drawn.get(asked, none))}
                for asked, kept, value in curve
            ]
        ),
        checks=pd.DataFrame(
            [
                {"what": "the circuit", **figures(inside)},
                {"what": "the model without it", **figures(outside)},
                *({"what": f"random circuit {i}", **figures(value)} for i, value in enumerate(random)),
            ]
        ),
        clean=search.clean,
        corrupt=search.corrupt,
        choosing=search.choosing,
        held_out=search.held_out,
        facts={
            **between.facts(search.seed),
            "graph": asdict(between.graph),
            "all_edges": len(between.graph),
            "method": method,
            "controls": controls,
            "prune": prune,
        },
    )


def _split(between: Between, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to choose by and of those held out; whole groups, and none of few."""
    groups = np.arange(len(between)) if between.inputs.groups is None else np.asarray(between.inputs.groups)
    names = np.unique(groups)
    rows = np.arange(len(groups))
    if len(names) < ENOUGH or not holdout:
        return rows, rows[:0]
    count = min(len(names) - 1, max(1, round(holdout * len(names))))
    out = np.random.default_rng([seed, 2]).permutation(len(names))[:count]
    held = np.isin(groups, names[out])
    return rows[~held], rows[held]


def _check(
    method: str,
    keep: int | float | None,
    faithfulness: float,
    prune: float | None,
    holdout: float,
    controls: int,
) -> None:
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if keep is not None and (isinstance(keep, bool) or keep <= 0 or (keep >= 1 and keep != int(keep))):
        raise InputError(f"keep is {keep!r}; expected a number of edges, or a share between 0 and 1")
    if not 0 < faithfulness <= 1:
        raise InputError(f"faithfulness is {faithfulness!r}; expected a share over 0 and at most 1")
    if prune is not None and not prune > 0:
        raise InputError(f"prune is {prune!r}; expected a change of faithfulness over 0, such as 0.01")
    if not 0 <= holdout < 1:
        raise InputError(f"holdout is {holdout!r}; expected a share of the rows from 0 up to 1")
    if controls < 0:
        raise InputError(f"controls is {controls!r}; expected a number of random circuits")
