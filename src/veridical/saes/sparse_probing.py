"""K-sparse probes: how much of a label a handful of latents carry, beside a probe on all of the activations.

Gurnee et al. 2023 (arXiv:2305.01610), as SAEBench applies it to SAEs (Karvonen et al. 2025,
arXiv:2503.09532): the k latents whose means differ most between the classes, in units of their own spread,
then logistic regression on them. Latents are chosen, and probes fitted, on the fitted pairs; figures are
those of held-out pairs. Beside them stand the same number of plain dimensions of the activations (a
dictionary that is no dictionary), a probe on all dimensions, the text alone, and the same choice made for
labels permuted over pairs: with thousands of latents to choose from, a few always look good on the rows that
chose them.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from veridical import config as configs
from veridical.config import ProbeConfig
from veridical.errors import InputError
from veridical.probes import evaluate
from veridical.probes.base import LinearProbe
from veridical.probes.card import interval, number
from veridical.probes.data import TARGET, Source, Task, Where, as_conditions, choose_rows, read_source
from veridical.probes.evaluate import Estimate
from veridical.probes.logistic import LogisticProbe
from veridical.saes.held_out import held_out
from veridical.saes.units import unscaled

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.activations import Activations
    from veridical.probes.result import ProbeSweep
    from veridical.reporting.section import Section
    from veridical.saes.base import SAE

KS = (1, 2, 5, 10)
LATENTS, DIMENSIONS, ALL = "latents", "dimensions", "all dimensions"


@dataclass(frozen=True, repr=False)
class SparseProbing:
    """Probes on few latents for one label.

    Attributes:
        target: The label.
        ks: Numbers of latents that were tried.
        sweep: Every probe, as a sweep: `latents, k=1` and so on, `dimensions, k=1` and so on, and `all
            dimensions`; with the text baseline.
        chosen: Latents by k, best first.
        control: AUROC on the held-out pairs of the whole procedure, choice included, for labels permuted over
            pairs: `[shuffles]` by k.
    """

    target: str
    ks: tuple[int, ...]
    sweep: ProbeSweep
    chosen: Mapping[int, tuple[int, ...]]
    control: Mapping[int, np.ndarray]

    def metric(self, k: int, what: str = LATENTS) -> Estimate:
        """AUROC on held-out pairs of the probe on k `latents` or `dimensions`."""
        return self._results[f"{what}, k={k}"].metrics["auroc"]

    def to_frame(self) -> pd.DataFrame:
        """One line per probe, with the ends of every interval, then the text alone and the control."""
        lines = []
        for name, result in self._results.items():
            what, _, k = name.partition(", k=")
            line: dict[str, Any] = {"who": name, "reads": what, "k": int(k) if k else None}
            for metric, value in result.metrics.items():
                line |= value.columns(metric)
            lines.append(line)
        if self.sweep.text is not None:
            line = {"who": "text alone", "reads": "text", "k": None}
            for metric, value in self.sweep.text.items():
                line |= value.columns(metric)
            lines.append(line)
        for k, values in self.control.items():
            lines.append(
                {"who": f"shuffled labels, k={k}", "reads": "shuffled", "k": k, "auroc": values.mean()}
            )
        return pd.DataFrame(lines)

    def figure(self) -> go.Figure:
        """AUROC by number of latents, beside the probe on everything and the text alone."""
        from veridical.reporting.figures import (
            BLUE,
            GREY,
            ORANGE,
            figure,
            line_with_band,
            reference_line,
            style,
        )

        drawn = figure()
        for what, colour in ((LATENTS, BLUE), (DIMENSIONS, ORANGE)):
            found = [self.metric(k, what) for k in self.ks]
            line_with_band(
                drawn, [str(k) for k in self.ks], [one.value for one in found], [one.low for one in found],
                [one.high for one in found], name=f"k {what}", colour=colour,
            )  # fmt: skip
        control = [float(self.control[k].mean()) for k in self.ks if len(self.control[k])]
        if len(control) == len(self.ks):
            line_with_band(
                drawn,
                [str(k) for k in self.ks],
                control,
                name="k latents, shuffled labels",
                colour=GREY,
                dash="dot",
            )
        reference_line(drawn, self._results[ALL].metrics["auroc"].value, "all dimensions")
        if self.sweep.text is not None:
            reference_line(drawn, self.sweep.text["auroc"].value, "text alone", dash="dash")
        return style(drawn, f"{self.target} from few latents", "k", "AUROC, held-out pairs")

    def findings(self) -> list[str]:
        """What the figures say, in sentences."""
        k = self.ks[0]
        ours, whole = self.metric(k), self._results[ALL].metrics["auroc"]
        said = [
            f"{k} latent{'s' if k > 1 else ''} read {self.target} with AUROC {_said(ours)}; {k} plain "
            f"dimension{'s' if k > 1 else ''} with {_said(self.metric(k, DIMENSIONS))}, all with "
            f"{_said(whole)}."
        ]
        if self.sweep.text is not None:
            said.append(f"The text alone reaches {_said(self.sweep.text['auroc'])}.")
        return [*said, *self.sweep.notes]

    def report_section(self) -> Section:
        """The figures as a section of a report."""
        from veridical.reporting.section import Section

        chosen = pd.DataFrame(
            [{"k": k, "latents": ", ".join(map(str, latents))} for k, latents in self.chosen.items()]
        )
        return Section(
            title=f"Sparse probing: {self.target}",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),),
            tables=(
                ("Figures on held-out pairs, 95 % intervals over pairs", self.to_frame().round(3)),
                ("Latents chosen on the fitted pairs", chosen),
            ),
        )

    @property
    def _results(self) -> dict[str, Any]:
        return {result.site: result for result in self.sweep.results}

    def __repr__(self) -> str:
        best = ", ".join(f"k={k} {number(self.metric(k).value)}" for k in self.ks)
        whole = number(self._results[ALL].metrics["auroc"].value)
        return f"SparseProbing({self.target}: AUROC {best}; all dimensions {whole})"

    def _repr_html_(self) -> str:
        table = self.to_frame().round(3).to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{table}"


def sparse_probes(
    sae: SAE,
    acts: Activations | Mapping[str, Any],
    config: ProbeConfig | None = None,
    *,
    ks: Sequence[int] = KS,
    target: Any = None,
    groups: Any = None,
    texts: Sequence[str] | None = None,
    where: Where | None = None,
    **options: Any,
) -> SparseProbing:
    """Fits probes on the k most telling latents, and their controls.

    Args:
        sae: One SAE.
        acts: Activations with its site and the labels of `Pairs`, or a mapping of site to vectors.
        config: Options as for `fit_probes`; keyword `options` win over it.
        ks: Numbers of latents.
        target: Label column of two classes, or labels `[n]`.
        groups: `[n]`, pair of each vector, where `acts` is a mapping.
        texts: `[n]`, what the model had read at each vector, where `acts` is a mapping.
        where: Conditions on the rows, as in `fit_probes`.
        **options: Fields of `ProbeConfig`: `folds`, `test_fraction`, `bootstrap`, `shuffles`, `seed`, ...

    Raises:
        InputError: A k below 1 or above the number of latents.
        UnknownNameError: A column or option that does not exist.
        DataError: Empty data, one class, or too few pairs.
    """
    from veridical.probes.sweep import check_config, run_sweep

    if target is not None:
        options["target"] = target if isinstance(target, str) else TARGET
    if where is not None:
        options["where"] = as_conditions(where)
    config = configs.build(ProbeConfig, config, **options)
    check_config(config)
    ks = tuple(sorted(set(ks)))
    if not ks or ks[0] < 1 or ks[-1] > sae.width:
        raise InputError(f"ks are {ks}; expected numbers from 1 to {sae.width}, the number of latents")
    source = read_source(acts, target, groups, texts, None)
    task = choose_rows(source, config, config.where)
    latents, plain = vectors(sae, acts)
    order = rank_latents(latents[task.fit], task.positive[task.fit], ks[-1])
    dimensions = rank_latents(plain[task.fit], task.positive[task.fit], ks[-1])
    sites: dict[str, torch.Tensor] = {}
    for k in ks:
        sites[f"{LATENTS}, k={k}"] = torch.from_numpy(latents[:, order[:k]])
    for k in ks:
        sites[f"{DIMENSIONS}, k={k}"] = torch.from_numpy(plain[:, dimensions[:k]])
    sites[ALL] = torch.from_numpy(plain)
    notes = (
        *source.notes,
        "Latents were chosen on the fitted pairs, so their folds flatter; held-out pairs do not.",
    )
    shapes = {name: tuple(x.shape[1:]) for name, x in sites.items()}
    made = replace(
        source, sites=tuple(sites), take=lambda name, rows: sites[name][rows], shapes=shapes, notes=notes
    )
    sweep = run_sweep(made, task, config, LogisticProbe())
    control = _control(latents, source, task, ks, config)
    return SparseProbing(config.target, ks, sweep, {k: tuple(map(int, order[:k])) for k in ks}, control)


def rank_latents(latents: np.ndarray, positive: np.ndarray, count: int) -> np.ndarray:
    """The `count` columns whose class means differ most, in units of their spread, best first."""
    difference = latents[positive].mean(0, dtype=np.float64) - latents[~positive].mean(0, dtype=np.float64)
    spread = latents.std(0, dtype=np.float64)
    score = np.divide(np.abs(difference), spread, out=np.zeros(len(spread)), where=spread > 0)
    return np.argsort(-score, kind="stable")[:count]


def _control(
    latents: np.ndarray, source: Source, task: Task, ks: Sequence[int], config: ProbeConfig
) -> dict[int, np.ndarray]:
    """AUROC of the whole procedure for labels permuted over pairs, `[shuffles]` by k."""
    random = np.random.default_rng([config.seed, 7])
    found: dict[int, list[float]] = {k: [] for k in ks}
    for _ in range(config.shuffles):
        labels = {
            part: evaluate.permute_over_pairs(
                task.positive[rows], source.groups[rows], source.units[rows], random
            )
            for part, rows in (("fit", task.fit), ("test", task.test))
        }
        order = rank_latents(latents[task.fit], labels["fit"], ks[-1])
        for k in ks:
            chosen = order[:k]
            probe = LogisticProbe().fit(latents[np.ix_(task.fit, chosen)], labels["fit"])
            found[k].append(_auroc(probe, latents[np.ix_(task.test, chosen)], labels["test"]))
    return {k: np.array(values) for k, values in found.items()}


def _auroc(probe: LinearProbe, x: np.ndarray, positive: np.ndarray) -> float:
    return float(evaluate.auroc(probe.decision_function(x)[:, None], positive)[0])


def vectors(sae: SAE, acts: Activations | Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Latents `[vectors, F]` and activations `[vectors, d_in]` of every vector, float32."""
    sae = unscaled(sae)
    latents, plain = [], []
    with torch.no_grad():
        for _, x, _ in held_out(sae, acts if not isinstance(acts, Mapping) else dict(acts)).blocks(sae):
            latents.append(sae.encode(x).float().cpu())
            plain.append(x.float().cpu())
    return torch.cat(latents).numpy(), torch.cat(plain).numpy()


def _said(value: Estimate) -> str:
    return interval(value.value, value.low, value.high)
