"""How much of a label a probe still reads after erasure, on pairs on which nothing was fitted.

The eraser is fitted on the fitted pairs; every figure is of the held-out ones. That the old probe fails only
shows that its own direction is gone, and a new one on the eraser's own rows fails by construction where class
means are equal. What counts is a probe fitted among the held-out pairs, on folds by pair: has the eraser
missed what it had not seen? The control erases as many random dimensions.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.base import clone

from veridical import config as configs
from veridical.config import ProbeConfig
from veridical.errors import InputError, unknown
from veridical.pairs.splits import folds
from veridical.probes import evaluate
from veridical.probes.card import interval
from veridical.probes.data import TARGET, Where, as_conditions, choose_rows, read_source
from veridical.probes.erasure import Eraser, LeaceEraser, ProjectionEraser
from veridical.probes.logistic import LogisticProbe
from veridical.probes.origin import Origin
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.activations import Activations
    from veridical.probes.base import LinearProbe
    from veridical.reporting.section import Section

FLAT = 1e-6
"""Log-odds that vary by less over all rows are a constant up to rounding, and rank nothing."""
BEFORE, SAME, NEW, RANDOM = "before", "after, same probe", "after, new probe", "random erased, new probe"
HELD_BEFORE, HELD_AFTER = "before, fitted on held-out folds", "after, fitted on held-out folds"


@dataclass(frozen=True, repr=False)
class ErasureCheck(Saved):
    """Figures of a probe before and after erasure.

    Attributes:
        lines: One per way of measuring; see `to_frame`.
        facts: Site, label, eraser, its rank, and `moved`, the mean square of the change over the variance.
        eraser: The eraser, fitted on the fitted pairs; `eraser.save(folder)` keeps it with these figures.
    """

    lines: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, Any]
    eraser: Eraser

    def to_frame(self) -> pd.DataFrame:
        """Lines: before; after, with the same probe; after, with a probe fitted on the erased fitted pairs;
        with as many random dimensions erased (means over the draws); and before and after with probes that
        were fitted among the held-out pairs, each row scored by the one that had not seen its pair.

        Columns: `measured`, `fit_auroc` (on the rows that were fitted on; NaN for those on folds), and
        `auroc`, `accuracy` and `recall_at_1pct_fpr` on held-out pairs, each with its 95 % interval by pair
        (`_low`, `_high`).
        """
        return pd.DataFrame(list(self.lines))

    def findings(self) -> list[str]:
        """What is left of the label, in sentences."""
        at = {line["measured"]: line for line in self.lines}
        before, same, random = (at[name] for name in (BEFORE, SAME, RANDOM))
        missed, whole = at[HELD_AFTER], at[HELD_BEFORE]
        gone = missed["auroc_low"] <= 0.5
        verdict = (
            f"After erasure {self.facts['target']} can't be read linearly at {self.facts['site']}"
            if gone
            else f"After erasure {self.facts['target']} can still be read at {self.facts['site']}"
        )
        return [
            f"{verdict}: a probe fitted among the held-out pairs reaches AUROC {_said(whole)} before and "
            f"{_said(missed)} after.",
            f"The probe of the fitted pairs reaches {_said(before)} on held-out pairs, {_said(same)} once "
            f"they are erased, and {_said(random)} with {self.facts['rank']} random dimensions erased "
            f"instead. Erasure moved activations by {self.facts['moved']:.1%} of their variance.",
        ]

    def figure(self) -> go.Figure:
        """AUROC with intervals, before and after."""
        import plotly.graph_objects as go

        from veridical.reporting import figures

        frame, figure = self.to_frame(), figures.figure()
        value, low, high = (frame[f"auroc{end}"].to_numpy() for end in ("", "_low", "_high"))
        error = {"array": high - value, "arrayminus": value - low, "color": figures.BLUE}
        figure.add_trace(
            go.Scatter(
                x=frame["measured"].tolist(),
                y=value,
                error_y=error,
                mode="markers",
                marker={"size": 10, "color": figures.BLUE},
                name="AUROC, 95 % interval",
            )
        )
        figures.reference_line(figure, 0.5, "chance")
        title = f"Reading {figures.plain(self.facts['target'], 60)} before and after erasure"
        return figures.style(figure, title, "", "AUROC", y_range=(0, 1.03), legend=False)

    def report_section(self) -> Section:
        """Findings, figure, table."""
        from veridical.reporting.section import Section

        after = next(line for line in self.lines if line["measured"] == HELD_AFTER)
        return Section(
            title=f"Erasing {self.facts['target']}",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),),
            tables=(("On held-out pairs, with 95 % intervals by pair", self.to_frame().round(3)),),
            headline=(("AUROC after erasure, fitted on held-out folds", f"{after['auroc']:.3f}"),),
        )

    def __repr__(self) -> str:
        return f"ErasureCheck({self.findings()[0]})"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.findings())
        return said + str(self.to_frame().round(3).to_html(index=False, border=0))


def check_erasure(
    acts: Activations | Mapping[str, Any],
    eraser: Eraser | None = None,
    *,
    site: str,
    probe: LinearProbe | None = None,
    config: ProbeConfig | None = None,
    target: Any = None,
    groups: Any = None,
    rows: Any = None,
    where: Where | None = None,
    draws: int = 10,
    **options: Any,
) -> ErasureCheck:
    """Erases a label and measures what a probe still reads of it on held-out pairs.

    Args:
        acts: Activations, as for `fit_probes`.
        eraser: An eraser to be fitted (a fresh `LeaceEraser` when not given), or a `ProjectionEraser`.
        site: Where, as `acts` names it.
        probe: Estimator; logistic with C = 0.1 when not given. Its strength is taken as it is.
        config: For `target`, `where`, the split, resamples and the seed.
        target: Label column, or labels `[n]`.
        groups: `[n]`, pair of each vector; the `pair` column when not given.
        rows: Table of label columns for a dict of activations.
        where: Conditions on the rows.
        draws: Random erasures of the control.
        **options: Fields of `ProbeConfig`.

    Raises:
        UnknownNameError: A site, column or option that does not exist.
        DataError: As for `fit_probes`.
    """
    if draws < 1:
        raise InputError(f"{draws} random erasures asked for; the control needs at least 1")
    if where is not None:
        options["where"] = as_conditions(where)
    if target is not None:
        options["target"] = target if isinstance(target, str) else TARGET
    config = configs.build(ProbeConfig, config, **options)
    source = read_source(acts, target, groups, None, rows)
    if site not in source.sites:
        raise unknown("site", site, source.sites)
    task = choose_rows(source, config, config.where)
    fit, test = (source.vectors(site, part).cpu().numpy() for part in (task.fit, task.test))
    labels, held = task.positive[task.fit], task.positive[task.test]
    weights = evaluate.resample_weights(source.groups[task.test], config.bootstrap, config.seed)
    estimator = probe or LogisticProbe(C=0.1)
    fitted = _fresh(eraser or LeaceEraser()).fit(fit, labels)
    erased, shown = fitted.transform(fit), fitted.transform(test)
    centre, random = fit.mean(0), np.random.default_rng([config.seed, 5])

    def on_folds(measured: str, x: np.ndarray) -> dict[str, Any]:
        scores = np.zeros(len(x))
        for inside, outside in folds(source.groups[task.test], config.folds, config.seed, held):
            scores[outside] = _fresh(estimator).fit(x[inside], held[inside]).decision_function(x[outside])
        return {"measured": measured, "fit_auroc": np.nan, **_figures(scores, held, weights)}

    def line(measured: str, used: Any, at_fitting: np.ndarray, after: np.ndarray) -> dict[str, Any]:
        at_fit, at_test = (_levelled(used.decision_function(x)) for x in (at_fitting, after))
        fit_auroc = float(evaluate.auroc(at_fit[:, None], labels)[0])
        return {"measured": measured, "fit_auroc": fit_auroc, **_figures(at_test, held, weights)}

    before = _fresh(estimator).fit(fit, labels)
    new = _fresh(estimator).fit(erased, labels)
    lines = [
        line(BEFORE, before, fit, test),
        line(SAME, before, erased, shown),
        line(NEW, new, erased, shown),
    ]
    drawn = []
    for _ in range(draws):
        other = ProjectionEraser(random.normal(size=(max(1, fitted.rank), fit.shape[1])), centre=centre)
        x = other.transform(fit)
        drawn.append(line(RANDOM, _fresh(estimator).fit(x, labels), x, other.transform(test)))
    means = pd.DataFrame(drawn).drop(columns="measured").mean().to_dict()
    variance = np.square(fit - centre).sum()
    lines += [
        {"measured": RANDOM, **means},
        on_folds(HELD_BEFORE, test),
        on_folds(HELD_AFTER, shown),
    ]
    facts = {
        "site": site,
        "target": config.target,
        "eraser": type(fitted).__name__,
        "rank": fitted.rank,
        "moved": float(np.square(erased - fit).sum() / variance) if variance > 0 else 0.0,
        "draws": draws,
        "seed": config.seed,
        **source.facts,
    }
    fitted.origin_ = _origin(config, facts, lines, {"fit_vectors": len(fit), "test_vectors": len(test)})
    return ErasureCheck(tuple(lines), facts, fitted)


def _origin(
    config: ProbeConfig, facts: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], rows: Mapping[str, int]
) -> Origin:
    """What the eraser's card says: the AUROC that is left, beside that before and after random erasure."""
    figures = {
        f"auroc, {line['measured']}{end}": float(line[f"auroc{end}"])
        for line in lines
        for end in ("", "_low", "_high")
    }
    return Origin(
        site=facts["site"],
        tokens=facts.get("tokens"),
        model=facts.get("model"),
        model_fingerprint=facts.get("model_fingerprint"),
        data_fingerprint=facts.get("data_fingerprint"),
        target=config.target,
        where=tuple(config.where),
        metrics={name: value for name, value in figures.items() if np.isfinite(value)},
        rows={**rows, "variance moved": f"{facts['moved']:.1%}"},
        notes=(
            "What counts is `after, fitted on held-out folds`: a probe fitted on the eraser's own rows fails "
            "by construction.",
        ),
        seed=config.seed,
    )


def _figures(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Figures on held-out pairs with their intervals, as columns."""
    found = evaluate.measure(scores, positive, weights).items()
    return {
        f"{name}{end}": value
        for name, figure in found
        for end, value in (("", figure.value), ("_low", figure.low), ("_high", figure.high))
    }


def _fresh(estimator: Any) -> Any:
    """An unfitted copy; typed so, since scikit-learn's `clone` also takes containers."""
    return clone(estimator)


def _levelled(scores: np.ndarray) -> np.ndarray:
    """Scores, all zero where they vary by rounding only."""
    return scores if np.ptp(scores) > FLAT else np.zeros_like(scores)


def _said(line: Mapping[str, Any]) -> str:
    return interval(line["auroc"], line["auroc_low"], line["auroc_high"])
