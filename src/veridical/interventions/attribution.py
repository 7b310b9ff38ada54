"""What `attribute` found: a score for each example, site and position (head, neuron), or for each edge."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from veridical.errors import InputError, unknown
from veridical.probes.card import number
from veridical.probes.evaluate import resample_weights
from veridical.provenance import fingerprint
from veridical.saved_result import Saved
from veridical.sites import HEAD_KINDS, RAW, Site

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.hooked import HookedModel
    from veridical.interventions.graph import Graph
    from veridical.interventions.runs import Runs
    from veridical.reporting.section import Section

RESAMPLES, SEED = 500, 0
LARGEST_MAP = 200_000
"""Cells of a map of edges that a report still shows."""
SAID = {
    "grad_x_input": "gradient times value",
    "atp": "attribution patching",
    "ig": "integrated gradients",
    "edges": "edge attribution patching",
    "edges_ig": "edge attribution patching with integrated gradients",
}


@dataclass(frozen=True, repr=False)
class Attribution(Saved):
    """Scores of the parts of a model for a metric.

    Attributes:
        method: "grad_x_input", "atp", "ig", "edges" or "edges_ig".
        metric, unit: What is explained, and what it is counted in.
        direction: "denoising" (gradient at corrupt, clean goes in) or "noising"; "" without a corrupt run.
        labels: For each example the text at each position, "" where it is padding; positions are counted
            from the first of the longest example, so that all examples end at the last.
        groups: `[examples]`, which of them belong together in the intervals.
        base_metric: `[examples]`, in the run where gradients were taken.
        source_metric: `[examples]`, in the other run; None without one.
        scores: By short site name, `[examples, positions]`, or with heads or neurons as a third axis. NaN at
            padding and at positions without a partner.
        totals, gaps: For "ig", by site `[examples]`: the sum of the scores, and that less the difference of
            the metric between the ends of the path (0 for an exact rule).
        edge_scores: `[examples, senders, receivers]`, with positions as second axis where they are apart;
            NaN where there is no edge or none was asked for.
        senders, receivers: Names along its axes.
        facts: Model and fingerprints.
    """

    method: str
    metric: str
    unit: str
    direction: str
    labels: list[list[str]]
    groups: np.ndarray
    base_metric: np.ndarray
    source_metric: np.ndarray | None = None
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    totals: Mapping[str, np.ndarray] = field(default_factory=dict)
    gaps: Mapping[str, np.ndarray] = field(default_factory=dict)
    edge_scores: np.ndarray | None = None
    senders: tuple[str, ...] = ()
    receivers: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: HookedModel, runs: Runs, method: str, **found: Any) -> Attribution:
        """The result of `runs`, with what was found in them."""
        groups = runs.inputs.groups
        return cls(
            method=method,
            metric=runs.metric.name,
            unit=runs.metric.unit,
            direction="" if runs.alone else runs.direction,
            labels=runs.labels(),
            groups=np.arange(len(runs.inputs))
            if groups is None
            else np.unique(groups, return_inverse=True)[1],
            facts={
                "model": model.path,
                "model_fingerprint": model.fingerprint(),
                "data_fingerprint": fingerprint(_content(runs)),
                "seed": SEED,
            },
            **found,
        )

    def __repr__(self) -> str:
        what = (
            f"{len(self.senders)} senders x {len(self.receivers)} receivers"
            if self.edge_scores is not None
            else f"{len(self.scores)} sites"
        )
        return f"Attribution({SAID[self.method]} of {self.metric}: {what}, {len(self)} examples)"

    def __len__(self) -> int:
        return len(self.base_metric)

    def __getitem__(self, name: str | Site) -> np.ndarray:
        """The scores at a site, `[examples, positions, ...]`, or of an edge, `[examples]` or with positions.

        Raises:
            UnknownNameError: Not among what was scored.
        """
        if self.edge_scores is None:
            short = str(name) if str(name) in self.scores else Site.parse(name).short
            if short not in self.scores:
                raise unknown("site", str(name), list(self.scores))
            return self.scores[short]
        ends = [part.strip() for part in str(name).split("->")]
        if len(ends) != 2:
            raise InputError(f"{name!r} is no edge; expected sender->receiver, such as mlp.0->logits")
        for what, end, options in zip(("sender", "receiver"), ends, (self.senders, self.receivers)):
            if end not in options:
                raise unknown(what, end, options)
        return self.edge_scores[..., self.senders.index(ends[0]), self.receivers.index(ends[1])]

    def to_frame(self, examples: bool = False) -> pd.DataFrame:
        """One line per part, with the mean score over the examples and its 95 % interval (whole pairs
        resampled 500 times; none with one example).

        Columns of nodes: `site`, `kind`, `layer`, `position`, `token`, `head` or `neuron` where there are
        any; of edges: `edge`, `sender`, `receiver`, and `position` where they are apart; then `score`, `low`,
        `high`, `examples` (in how many the part is there). `token` is empty where examples differ.

        Args:
            examples: One line per part and example instead, with `example` and its own `token`.
        """
        draw = self._by_example if examples else self._averaged
        return _without_empty(pd.concat([draw(*part) for part in self._parts()], ignore_index=True))

    def top(self, n: int = 10) -> pd.DataFrame:
        """The `n` parts with the largest mean scores, of either sign, the largest first; see `to_frame`."""
        parts = self._parts()
        sizes = [np.abs(_mean(values)) for _, values in parts]
        order = np.sort(np.argsort(-np.concatenate(sizes), kind="stable")[:n])
        lines, first = [], 0
        for (keys, values), size in zip(parts, sizes):
            own = order[(order >= first) & (order < first + len(size))] - first
            if len(own):
                lines.append(self._averaged(keys.iloc[own].reset_index(drop=True), values[:, own]))
            first += len(size)
        table = _without_empty(pd.concat(lines, ignore_index=True))
        return table.iloc[np.argsort(-table["score"].abs().to_numpy(), kind="stable")].reset_index(drop=True)

    def mean(self) -> dict[str, np.ndarray]:
        """Scores averaged over the examples that have the part: by site, `[positions, ...]`; of edges under
        "edges", `[senders, receivers]` (positions first where they are apart). NaN where none has it."""
        given = {"edges": self.edge_scores} if self.edge_scores is not None else self.scores
        return {name: _mean(values) for name, values in given.items() if values is not None}

    def findings(self) -> list[str]:
        """What the scores say, in sentences."""
        best = self.top(3)
        unit = f" {self.unit}" if self.unit else ""
        named = ", ".join(f"{_part(line)} ({number(line['score'])})" for line in best.to_dict("records"))
        said = [f"Largest scores{unit and f' in{unit}'}: {named}."]
        if self.source_metric is not None:
            said.append(
                f"{self.metric} is {number(float(self.base_metric.mean()))} in the run where gradients were "
                f"taken and {number(float(self.source_metric.mean()))} in the other, on average."
            )
        for name, gap in self.gaps.items():
            said.append(
                f"At {name} the scores add up to {number(float(self.totals[name].mean()))}; the completeness "
                f"gap is {number(float(np.abs(gap).max()))} at most."
            )
        if len(self) == 1:
            said.append("One example: no intervals.")
        return said

    def figure(self) -> go.Figure:
        """Tokens coloured by their score, layer x position or layer x head maps; the largest edges."""
        from veridical.interventions.attribution_figure import draw

        return draw(self)

    def matrix(self) -> go.Figure:
        """Edges as a map, senders x receivers, averaged over examples and summed over positions."""
        from veridical.interventions.attribution_figure import edge_map

        return edge_map(self)

    def html(self, examples: int = 8) -> str:
        """The texts of the first examples with each token coloured by its score, as safe HTML; "" for edges
        and where several sites or heads share a token."""
        from veridical.interventions.attribution_figure import coloured_texts

        return coloured_texts(self, examples)

    def report_section(self) -> Section:
        """The scores as a section of a report."""
        from veridical.reporting.section import Section

        text = f"{SAID[self.method].capitalize()} of {self.metric} on {len(self)} examples"
        if self.direction:
            base = "corrupt" if self.direction == "denoising" else "clean"
            text += f", {self.direction}: gradients at the {base} run"
        if self.method != "ig":
            text += ". First order only: a large score is a candidate to check by patching"
        coloured = self.html()
        figures = (self.figure(),)
        if 0 < len(self.senders) * len(self.receivers) <= LARGEST_MAP:
            figures = (*figures, self.matrix())
        return Section(
            title=f"Attribution of {self.metric}",
            text="\n\n".join([f"{text}.", *self.findings()]),
            figures=figures,
            tables=(("Largest scores", self._shown(20)),),
            html=(coloured,) if coloured else (),
            headline=(("largest score", _part(self.top(1).to_dict("records")[0])),),
        )

    def _shown(self, count: int) -> pd.DataFrame:
        """The largest scores as a report shows them."""
        from veridical.interventions.patched import with_intervals

        table = with_intervals(self.top(count), ("score",), "low", "high")
        table = table.drop(columns=[name for name in ("kind", "layer") if name in table])
        for name in ("neuron", "head"):
            if name in table:
                table.insert(1, name, table.pop(name))
        return table

    def _repr_html_(self) -> str:
        from veridical.interventions.attribution_figure import page

        return page(self)

    def _parts(self) -> list[tuple[pd.DataFrame, np.ndarray]]:
        """What there is, as lines that name it and scores `[examples, lines]`."""
        found = []
        edges = self.edge_scores
        for keys, values in self._node_parts() if edges is None else [self._edge_lines(edges)]:
            there = np.flatnonzero(np.isfinite(values).any(0))
            found.append((keys.iloc[there].reset_index(drop=True), values[:, there]))
        return found

    def _edge_lines(self, values: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
        apart = values.ndim == 4
        there = np.argwhere(np.isfinite(values).any(0))
        chosen = values[(slice(None), *there.T)]
        senders = np.array(self.senders, dtype=object)[there[:, -2]]
        receivers = np.array(self.receivers, dtype=object)[there[:, -1]]
        keys = {"edge": senders + "->" + receivers, "sender": senders, "receiver": receivers}
        if apart:
            keys["position"] = there[:, 0]
        return pd.DataFrame(keys), chosen

    def _node_parts(self) -> list[tuple[pd.DataFrame, np.ndarray]]:
        parts = []
        for name, values in self.scores.items():
            site = Site.parse(name)
            shape = values.shape[1:]
            places = np.indices(shape).reshape(len(shape), -1)
            keys: dict[str, Any] = {
                "site": name,
                "kind": None if site.kind == RAW else site.kind,
                "layer": pd.array([site.layer] * places.shape[1], dtype="Int64"),
                "position": places[0],
                "token": np.array(self._common_tokens(), dtype=object)[places[0]],
            }
            if len(shape) == 2:
                keys["head" if site.kind in (*HEAD_KINDS, "pattern") else "neuron"] = pd.array(
                    places[1], dtype="Int64"
                )
            parts.append((pd.DataFrame(keys), values.reshape(len(values), -1)))
        return parts

    def _common_tokens(self) -> list[str]:
        columns = ([text for text in column if text != ""] for column in zip(*self.labels))
        return [column[0] if len(set(column)) == 1 else "" for column in columns]

    def _averaged(self, keys: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
        low, high = _intervals(values, self.groups)
        return keys.assign(score=_mean(values), low=low, high=high, examples=np.isfinite(values).sum(0))

    def _by_example(self, keys: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
        lines = []
        for example, row in enumerate(values):
            here = np.isfinite(row)
            own = keys.iloc[np.flatnonzero(here)].assign(score=row[here], example=example)
            if "token" in own:
                own["token"] = [self.labels[example][place] for place in own["position"]]
            lines.append(own)
        return pd.concat(lines, ignore_index=True)


def selected(graph: Graph, wanted: Any) -> np.ndarray:
    """`[senders, receivers]` bool: pairs that any of `wanted` names, which may be globs."""
    senders, receivers = ([node.name for node in nodes] for nodes in (graph.senders, graph.receivers))
    listed = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Sequence) else list(wanted)
    chosen = np.zeros((len(senders), len(receivers)), dtype=bool)
    for spec in map(str, listed):
        ends = [part.strip() for part in spec.split("->")]
        if len(ends) != 2:
            raise InputError(
                f"{spec!r} is no edge; expected sender->receiver, such as mlp.0->logits or head.*->mlp.3:in"
            )
        ends[1] += ":in" if ends[1].startswith("mlp.") and not ends[1].endswith((":in", "*")) else ""
        sides = [
            np.array([fnmatch.fnmatchcase(name, end) for name in names])
            for end, names in zip(ends, (senders, receivers))
        ]
        kinds = (("sender", graph.sender), ("receiver", graph.receiver))
        for (what, one), side, end, names in zip(kinds, sides, ends, (senders, receivers)):
            if not side.any():
                one(end)  # says more of a name that is well formed, such as how heads are grouped
                raise unknown(what, end, names)
        chosen |= sides[0][:, None] & sides[1]
    return chosen


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is there; NaN where nothing is."""
    there = np.isfinite(values)
    count = there.sum(0)
    total = np.where(there, values, 0).sum(0, dtype=np.float64)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _intervals(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle 95 % of the resampled means of each column of `[examples, parts]`; NaN where one pair has it."""
    parts = values.shape[1]
    low, high = np.full(parts, np.nan), np.full(parts, np.nan)
    members = np.unique(groups, return_inverse=True)[1]
    if members.max() == 0:
        return low, high
    weights = resample_weights(groups, RESAMPLES, SEED).astype(np.float64)
    for first in range(0, parts, 4096):
        part = slice(first, first + 4096)
        there = np.isfinite(values[:, part])
        pairs = np.zeros((members.max() + 1, there.shape[1]), dtype=bool)
        np.logical_or.at(pairs, members, there)
        several = np.flatnonzero(pairs.sum(0) > 1)
        there, chosen = there[:, several], values[:, part][:, several]
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (weights @ np.where(there, chosen, 0)) / (weights @ there)
        if len(several):
            low[first + several], high[first + several] = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return low, high


def _without_empty(table: pd.DataFrame) -> pd.DataFrame:
    """Without `kind`, `layer`, `head` or `neuron` where no line has one."""
    kept = set(table.dropna(axis=1, how="all").columns)
    optional = ("kind", "layer", "head", "neuron")
    return table.drop(columns=[name for name in table.columns if name in optional and name not in kept])


def _part(line: Mapping[str, Any]) -> str:
    """What a line of the table is about, in words."""
    if "edge" in line:
        at = f" at position {line['position']}" if "position" in line else ""
        return f"{line['edge']}{at}"
    said = line["site"]
    for what in ("head", "neuron"):
        if what in line and not pd.isna(line[what]):
            said += f" {what} {line[what]}"
    token = f" {line['token']!r}" if line["token"] else ""
    return f"{said} at position {line['position']}{token}"


def _content(runs: Runs) -> list[bytes | str]:
    """What the data fingerprint is of."""
    parts: list[bytes | str] = []
    for side in (runs.inputs.clean, runs.inputs.corrupt):
        for name in ("input_ids", "pixel_values", "attention_mask"):
            if name in side:
                exact = side[name].detach().cpu()
                exact = exact.to(torch.float64) if exact.is_floating_point() else exact
                parts.append(exact.contiguous().numpy().tobytes())
    return parts
