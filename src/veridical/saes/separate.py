"""Features that separate two labels, or two models, chosen on half of the texts and judged on the other.

With thousands of features some will separate any two labels by chance. So features are ranked on one half of
the pairs, with a p-value that counts all of them (the largest statistic of any feature, over permutations:
Westfall and Young 1993), and their figures are those of the other half, which took no part in the choice.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from veridical import config as configs
from veridical.config import ProbeConfig
from veridical.errors import DataError, InputError
from veridical.probes import evaluate
from veridical.probes.card import number
from veridical.probes.data import Source as LabelSource
from veridical.probes.data import Where, as_conditions, choose_rows
from veridical.saes.pooled import Pool, pooled_latents, row_groups

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.activations import Activations
    from veridical.reporting.section import Section
    from veridical.saes.base import SAE

MIN_ACTIVE = 5
"""Texts in which a feature has to fire, in the half that ranks, to be considered."""


@dataclass(frozen=True, repr=False)
class Separation:
    """Features that tell two sides apart, best first.

    Attributes:
        sides: What the two sides are called: (negative, positive), or (first model, second model).
        features: One line per listed feature. `chosen_by`: the statistic on the half that ranked (AUROC, or t
            over texts); `p`: share of permutations in which any feature reached as much; then figures of the
            other half, with 95 % intervals over pairs.
        considered: Number of features that fired often enough to be ranked.
        counts: Texts and pairs of both halves.
        notes: What a reader should know.
    """

    sides: tuple[str, str]
    features: pd.DataFrame
    considered: int
    counts: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One line per listed feature."""
        return self.features.copy()

    def figure(self) -> go.Figure:
        """The features' figures on the half that took no part in the choice."""
        import plotly.graph_objects as go

        from veridical.reporting.figures import BLUE, figure, plain, reference_line, style

        name = "auroc" if "auroc" in self.features else "difference"
        drawn, frame = figure(), self.features
        value, low, high = (frame[f"{name}{end}"].to_numpy() for end in ("", "_low", "_high"))
        drawn.add_trace(
            go.Scatter(
                x=[f"feature {feature}" for feature in frame["feature"]],
                y=value.tolist(),
                error_y={
                    "type": "data", "symmetric": False, "array": (high - value).tolist(),
                    "arrayminus": (value - low).tolist(),
                },
                mode="markers",
                marker={"color": BLUE, "size": 8},
                name=name,
            )
        )  # fmt: skip
        reference_line(
            drawn, 0.5 if name == "auroc" else 0.0, "chance" if name == "auroc" else "no difference"
        )
        title = f"Features that separate {plain(self.sides[1])} from {plain(self.sides[0])}, held-out half"
        label = "AUROC" if name == "auroc" else "difference of mean activations"
        return style(drawn, title, "", label, legend=False)

    def findings(self) -> list[str]:
        """What the figures say, in sentences."""
        sure = self.features[self.features["p"] <= 0.05]
        said = [
            f"{len(sure)} of {self.considered:,} features separate {self.sides[1]} from {self.sides[0]} "
            "beyond what the best of as many would by chance (p at most 0.05, all features counted)."
        ]
        return [*said, *self.notes]

    def report_section(self) -> Section:
        """The features as a section of a report."""
        from veridical.reporting.section import Section

        return Section(
            title=f"Features that separate {self.sides[1]} from {self.sides[0]}",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),) if len(self.features) else (),
            tables=(("Ranked on one half of the pairs, measured on the other", self.features.round(4)),),
        )

    def __repr__(self) -> str:
        best = ""
        if len(self.features):
            line = self.features.iloc[0]
            best = f"; best feature {int(line['feature'])}, p {number(float(line['p']))}"
        return f"Separation({self.sides[1]} from {self.sides[0]}: {self.considered:,} features{best})"

    def _repr_html_(self) -> str:
        table = self.features.round(4).to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{table}"


def separate_labels(
    sae: SAE,
    acts: Activations,
    target: str = "label",
    *,
    where: Where | None = None,
    pool: Pool = "max",
    top: int = 20,
    permutations: int = 200,
    bootstrap: int = 500,
    seed: int = 0,
) -> Separation:
    """Ranks features by how well their activation alone tells two labels apart.

    Args:
        sae: One SAE.
        acts: Activations with its site and the labels of `Pairs`.
        target: Label column of two classes.
        where: Conditions on the rows, as in `fit_probes`.
        pool: What stands for a row of which several tokens were read: the largest activation, or the mean.
        top: Features that are listed.
        permutations: Permutations of the labels over pairs for the p-values; the least p is one over one more
            than these.
        bootstrap: Resamples of whole pairs for the intervals.
        seed: Seed of the halves, permutations and resamples.

    Raises:
        UnknownNameError: A column that does not exist.
        DataError: No rows, one class, too few pairs, or no feature that fires often enough.
    """
    _check(top, permutations, bootstrap)
    latents, groups = pooled_latents(sae, acts, pool), row_groups(acts)
    columns = {str(name): acts.rows[name].to_numpy() for name in acts.rows.columns if name != "split"}
    source = LabelSource(
        (),
        lambda site, rows: torch.from_numpy(latents[rows]),
        {},
        columns,
        groups,
        np.arange(len(groups)),
        None,
    )
    conditions = as_conditions(where)
    options = {"target": target, "test_fraction": 0.5, "folds": 2, "seed": seed, "where": conditions}
    task = choose_rows(source, configs.build(ProbeConfig, None, **options), conditions)
    positive = task.positive
    often = np.flatnonzero((latents[task.fit] > 0).sum(0) >= MIN_ACTIVE)
    if not len(often):
        raise DataError(f"no feature fires in {MIN_ACTIVE} of the {len(task.fit)} texts that rank")
    ranks = rankdata(latents[np.ix_(task.fit, often)], axis=0)
    found = _auroc_of_ranks(ranks, positive[task.fit][:, None])[:, 0]
    random = np.random.default_rng([seed, 5])
    shuffled = np.stack(
        [
            evaluate.permute_over_pairs(positive[task.fit], groups[task.fit], task.fit, random)
            for _ in range(permutations)
        ],
        1,
    )
    null = np.abs(_auroc_of_ranks(ranks, shuffled) - 0.5).max(0)
    order = np.argsort(-np.abs(found - 0.5), kind="stable")[:top]
    weights = evaluate.resample_weights(groups[task.test], bootstrap, seed)
    truth, held = positive[task.test], latents[task.test]
    lines = []
    for at in order:
        feature = int(often[at])
        own = held[:, feature].astype(np.float64)
        whole = evaluate.auroc(own[:, None], truth)[0]
        judged = evaluate.estimate(whole, evaluate.weighted_auroc(own, truth, weights))
        lines.append(
            {
                "feature": feature,
                "chosen_by": float(found[at]),
                "p": _p(null, abs(float(found[at]) - 0.5)),
                **judged.columns("auroc"),
                "mean_negative": float(own[~truth].mean()),
                "mean_positive": float(own[truth].mean()),
                "fires_negative": float((own[~truth] > 0).mean()),
                "fires_positive": float((own[truth] > 0).mean()),
            }
        )
    negative, named = (f"{target} = {value}" for value in task.classes)
    counts = _counts(groups, task.fit, task.test)
    return Separation((negative, named), pd.DataFrame(lines), len(often), counts)


def separate_models(
    sae: SAE,
    first: Activations,
    second: Activations,
    *,
    names: tuple[str, str] = ("the first model", "the second model"),
    pool: Pool = "mean",
    top: int = 20,
    permutations: int = 200,
    bootstrap: int = 500,
    seed: int = 0,
) -> Separation:
    """Ranks features by how differently two models activate them on the same texts.

    The SAE is one model's: what it misses in the other does not show, and a difference may be in the part of
    the activations that it explains only.

    Args:
        sae: One SAE, run on both.
        first, second: Activations of the two models over the same rows and tokens.
        names: What to call the models.
        pool: What stands for a text: the mean activation over its tokens, or the largest.
        top: Features that are listed.
        permutations: Sign flips of whole pairs for the p-values.
        bootstrap: Resamples of whole pairs for the intervals.
        seed: Seed of the halves, flips and resamples.

    Raises:
        InputError: Activations of other rows or tokens.
        DataError: Fewer than four pairs, or no feature that fires often enough.
    """
    from veridical.pairs.splits import assign

    _check(top, permutations, bootstrap)
    _same_rows(first, second)
    one, two = pooled_latents(sae, first, pool), pooled_latents(sae, second, pool)
    groups = row_groups(first)
    if len(np.unique(groups)) < 4:
        raise DataError(
            f"{len(np.unique(groups))} pairs are too few to rank on one half and judge on the other"
        )
    part = assign(groups, {"rank": 0.5, "judge": 0.5}, seed)
    fit, test = np.flatnonzero(part == "rank"), np.flatnonzero(part == "judge")
    often = np.flatnonzero(((one[fit] > 0) | (two[fit] > 0)).sum(0) >= min(MIN_ACTIVE, len(fit)))
    if not len(often):
        raise DataError(f"no feature fires in {MIN_ACTIVE} of the {len(fit)} texts that rank")
    # Rows of one pair are flipped together and count as one.
    change = _by_group((two - one)[np.ix_(fit, often)].astype(np.float64), groups[fit])
    found = _t(change)
    signs = np.random.default_rng([seed, 6]).choice([-1.0, 1.0], size=(permutations, len(change)))
    null = np.array([np.abs(_t(change * sign[:, None])).max() for sign in signs])
    order = np.argsort(-np.abs(found), kind="stable")[:top]
    weights = evaluate.resample_weights(groups[test], bootstrap, seed)
    lines = []
    for at in order:
        feature = int(often[at])
        own = (two[test, feature] - one[test, feature]).astype(np.float64)
        judged = evaluate.share(own, weights)
        lines.append(
            {
                "feature": feature,
                "chosen_by": float(found[at]),
                "p": _p(null, abs(float(found[at]))),
                **judged.columns("difference"),
                "mean_first": float(one[test, feature].mean()),
                "mean_second": float(two[test, feature].mean()),
                "fires_first": float((one[test, feature] > 0).mean()),
                "fires_second": float((two[test, feature] > 0).mean()),
            }
        )
    return Separation(names, pd.DataFrame(lines), len(often), _counts(groups, fit, test))


def _auroc_of_ranks(ranks: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """AUROC of every feature for every labelling, `[features, labellings]`, from ranks `[n, features]`."""
    count = positive.sum(0).astype(np.float64)
    others = len(positive) - count
    return (ranks.T @ positive - count * (count + 1) / 2) / (count * others)


def _t(change: np.ndarray) -> np.ndarray:
    """Mean over its standard error, `[features]`; 0 where nothing changed."""
    spread = change.std(0, ddof=1) / np.sqrt(len(change))
    return np.divide(change.mean(0), spread, out=np.zeros(change.shape[1]), where=spread > 0)


def _by_group(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean of each group, `[groups, ...]`."""
    _, codes = np.unique(groups, return_inverse=True)
    sums = np.zeros((int(codes.max()) + 1, values.shape[1]))
    np.add.at(sums, codes.reshape(-1), values)
    return sums / np.bincount(codes.reshape(-1))[:, None]


def _p(null: np.ndarray, value: float) -> float:
    return float((1 + (null >= value - 1e-12).sum()) / (1 + len(null)))


def _counts(groups: np.ndarray, fit: np.ndarray, test: np.ndarray) -> dict[str, int]:
    return {
        "rank_texts": len(fit),
        "rank_pairs": len(np.unique(groups[fit])),
        "judge_texts": len(test),
        "judge_pairs": len(np.unique(groups[test])),
    }


def _same_rows(first: Activations, second: Activations) -> None:
    columns = ["row", "position", "token_id"]
    same = len(first) == len(second) and bool(
        (first.index[columns].to_numpy() == second.index[columns].to_numpy()).all()
    )
    if not same:
        raise InputError(
            f"the two models' activations are of other rows or tokens ({len(first)} and {len(second)} "
            "vectors); collect both over the same data, with the same tokens"
        )


def _check(top: int, permutations: int, bootstrap: int) -> None:
    for name, value in {"top": top, "permutations": permutations, "bootstrap": bootstrap}.items():
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
