"""Where the change sits: activations of the policy put into the reference, and the other way round.

Both models read the same prompts. By part: the stream at the end of each part is taken over from the other
model at all positions, so everything up to there is the one model's and everything behind it the other's;
what a part adds to the metric is the step from one boundary to the next. The steps (embedding, each layer,
final norm and unembedding) add up to the whole change exactly, in each of the two directions; they differ
where a layer does something else with the other model's stream. By position and by head one vector of the
stream, or one head's output at all positions, is taken over (`veridical.patch` with `source`); these shares
need not add up.

A share is the mean effect over the mean difference of the two models, with intervals over resamples of whole
pairs. The place that is named was chosen on one half of the pairs, and its share is that of the other half.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.comparison.resampling import bounds
from veridical.comparison.where_rows import ends_alike, questions_of
from veridical.probes.evaluate import resample_weights

if TYPE_CHECKING:
    from veridical.comparison.config import CompareConfig
    from veridical.comparison.duo import Duo
    from veridical.comparison.where_rows import Questions
    from veridical.interventions.patched import Patched

INTO_REFERENCE, INTO_POLICY = "policy into reference", "reference into policy"
DIRECTIONS = (INTO_REFERENCE, INTO_POLICY)
CHANGE, PARTS, POSITIONS, HEADS, READOUT, FOUND = (
    "where change", "where by part", "where by position", "where by head", "where by readout", "where found",
)  # fmt: skip
LAYERS = 12
"""Layers, spread evenly, whose positions are patched one by one in deeper models."""
HALF = 0.5
"""Share of the change that one vector has to carry to be named as the place, at the earliest layer."""
BETWEEN = "between"
"""All tokens between those that the prompts begin and end with alike, taken over together."""
LEAST, LEAST_KL = 0.05, 1e-3
"""Share of the metric's size in the reference, and nats, below which nothing is located."""
ANYWHERE, BEFORE_LAST = "all tokens", "before the last token"
"""Among which places one is named: at the last token, late, the stream holds the answer itself."""
RANDOM = 16
"""Other places whose mean share is the control."""


def where(
    duo: Duo,
    questions: Questions,
    *,
    heads: bool = True,
    layers: int = LAYERS,
    batch_tokens: int = 8192,
    bootstrap: int = 200,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, pd.DataFrame]:
    """Tables of cross-model patching in both directions.

    Args:
        duo: Models of one vocabulary, depth and width.
        questions: Prompts with their metric; see `where_rows.questions_of`.
        heads: Patch heads too.
        layers: Layers at most whose positions are patched one by one.
        batch_tokens: Tokens of one forward at most.
        bootstrap: Resamples of whole pairs.
        seed: Of the resamples, the halves and the random places.
        progress: Progress bars.

    Returns:
        "where change": `metric`, `rows` (what they are), its mean in `policy` and `reference`, `change`,
        `low`, `high`, `scale` (root mean square in the reference; 1 nat for divergences) and `pairs`; where
        it is not beyond chance, no share means anything.
        "where by part": `direction`, `part`, `layer`, `effect` (on the metric), `share`, `low`, `high`.
        "where by position": `direction`, `site`, `layer`, `position` (from the start, negative from the end,
        or `BETWEEN`), `token` (the commonest there), `effect`, `share`, `low`, `high`. "where by head": the
        same with `head` instead of the position. "where by readout" (logit differences only): `stream` and
        `readout` (whose final stream goes through whose norm and unembedding), `value`, `low`, `high`.
        "where found": the place that is named, `among` all tokens and among those before the last one, with
        `share`, `low` and `high` on pairs that it was not chosen on, `random` (mean share of other places)
        and `pairs`. Shares are NaN where the models do not differ at all.
    """
    sweeps = _Sweeps(duo, questions, batch_tokens, progress)
    shares = _Shares(questions.groups, bootstrap, seed)
    boundaries = {way: sweeps(way, ["resid_pre.0", "resid_post.*"], positions="all") for way in DIRECTIONS}
    chosen = np.unique(np.linspace(0, duo.policy.n_layers - 1, min(layers, duo.policy.n_layers)).astype(int))
    spots = _spots(duo, questions)
    sites = [f"resid_post.{layer}" for layer in chosen.tolist()]
    stream = {way: sweeps(way, sites, positions=spots) for way in DIRECTIONS}
    tables = {
        CHANGE: _change(boundaries[INTO_REFERENCE], questions, shares),
        PARTS: _parts(boundaries, shares),
        POSITIONS: _places(stream, shares, "position"),
        FOUND: _found(stream, questions.groups, bootstrap, seed),
    }
    if questions.metric != "kl":
        tables[READOUT] = _readout(boundaries, shares)
    if heads and _same_heads(duo):
        by_head = {way: sweeps(way, ["z.*"], positions="all", heads="all") for way in DIRECTIONS}
        tables[HEADS] = _places(by_head, shares, "head")
    return tables


def where_tables(duo: Duo, data: Any, config: CompareConfig) -> dict[str, pd.DataFrame]:
    """`where` on rows of `data`, as a comparison asks for it; nothing where no prompt can be continued."""
    questions = questions_of(duo, data, config.where, config.seed)
    if questions is None:
        return {}
    return where(duo, questions, bootstrap=config.bootstrap, seed=config.seed, progress=config.progress)


class _Sweeps:
    """`veridical.patch` across the two models, in either direction."""

    def __init__(self, duo: Duo, questions: Questions, batch_tokens: int, progress: bool | None) -> None:
        self.duo, self.questions = duo, questions
        self.options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress, "bootstrap": 1}

    def __call__(self, way: str, sites: list[str], **options: Any) -> Patched:
        from veridical.interventions.patching import patch

        base, source = self.duo.reference, self.duo.policy
        if way == INTO_POLICY:
            base, source = source, base
        prompts = self.questions.prompts
        with warnings.catch_warnings():
            # At the last layer every position but the last one has no effect, as it must.
            warnings.filterwarnings("ignore", message=".*(cannot change|did not move) the metric.*")
            return patch(
                base, prompts, prompts, source=source, sites=sites, **options, **self.options,
                **self.questions.given,
            )  # fmt: skip


class _Shares:
    """Effects as shares of the difference of the two models, with intervals."""

    def __init__(self, groups: np.ndarray, bootstrap: int, seed: int) -> None:
        several = len(np.unique(groups)) > 1
        self.weights = (
            resample_weights(groups, bootstrap, seed).astype(float) if several else np.ones((0, len(groups)))
        )

    def __call__(self, effects: np.ndarray, gap: np.ndarray) -> dict[str, np.ndarray]:
        """Of effects `[items, examples]` and differences `[examples]`: columns of a table."""
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = effects.mean(1) / gap.mean()
            resampled = (self.weights @ effects.T) / (self.weights @ gap)[:, None]
        low, high = bounds(np.where(np.isfinite(resampled), resampled, np.nan))
        shares = np.where(np.isfinite(shares), shares, np.nan)
        return {"effect": effects.mean(1), "share": shares, "low": low, "high": high}

    def means(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Means of `[items, examples]` with their intervals."""
        resampled = (self.weights @ values.T) / self.weights.sum(1, keepdims=True)
        low, high = bounds(resampled)
        return {"value": values.mean(1), "low": low, "high": high}


def _spots(duo: Duo, questions: Questions) -> dict[str, Any]:
    """Every position of prompts of one length; else what all begin and end with, and the rest between."""
    ids = [row.ids for row in duo.encode(questions.prompts)[0]]
    lengths = set(map(len, ids))
    if len(lengths) == 1:
        return {str(at): at for at in range(lengths.pop())}
    first, last = ends_alike(ids)
    last = max(last, 1)  # the last token is where the answer is read, alike or not
    first = min(first, min(lengths) - last)
    spots: dict[str, Any] = {str(at): at for at in range(first)}
    spots[BETWEEN] = lambda length: range(first, length - last)
    return spots | {str(-at): -at for at in range(last, 0, -1)}


def located(change: Any) -> bool:
    """Whether the models differ enough, by a line of "where change", for shares to mean anything."""
    sure = not float(change["low"]) <= 0 <= float(change["high"])
    least = LEAST_KL if change["metric"] == "kl" else LEAST * float(change["scale"])
    return sure and abs(float(change["change"])) > least


def _gap(patched: Patched) -> np.ndarray:
    return patched.source_values - patched.base_values


def _change(into_reference: Patched, questions: Questions, shares: _Shares) -> pd.DataFrame:
    ours, theirs = into_reference.source_values, into_reference.base_values
    change = shares.means((ours - theirs)[None])
    line = {
        "metric": questions.metric,
        "rows": questions.said,
        "policy": ours.mean(),
        "reference": theirs.mean(),
        "change": change["value"],
        "low": change["low"],
        "high": change["high"],
        "scale": 1.0 if questions.metric == "kl" else float(np.sqrt(np.square(theirs).mean())),
        "pairs": len(np.unique(questions.groups)),
    }
    return pd.DataFrame(line, index=[0])


def _parts(boundaries: dict[str, Patched], shares: _Shares) -> pd.DataFrame:
    tables = []
    for way, patched in boundaries.items():
        chain = np.stack([patched.base_values, *patched.values, patched.source_values])
        layers = len(chain) - 3
        names = ["embedding", *(f"layer {layer}" for layer in range(layers)), "final norm and unembedding"]
        columns = {"direction": way, "part": names, "layer": range(-1, layers + 1)}
        tables.append(pd.DataFrame({**columns, **shares(np.diff(chain, axis=0), _gap(patched))}))
    return pd.concat(tables, ignore_index=True)


def _readout(boundaries: dict[str, Patched], shares: _Shares) -> pd.DataFrame:
    into_reference, into_policy = boundaries[INTO_REFERENCE], boundaries[INTO_POLICY]
    values = {
        ("policy", "policy"): into_policy.base_values,
        ("policy", "reference"): into_reference.values[-1],
        ("reference", "policy"): into_policy.values[-1],
        ("reference", "reference"): into_reference.base_values,
    }
    stream, readout = zip(*values)
    return pd.DataFrame(
        {"stream": stream, "readout": readout, **shares.means(np.stack(list(values.values())))}
    )


def _places(sweeps: dict[str, Patched], shares: _Shares, by: str) -> pd.DataFrame:
    tables = []
    for way, patched in sweeps.items():
        table = patched.table
        columns: dict[str, Any] = {"direction": way, "site": _short(table), "layer": table["layer"]}
        if by == "position":
            columns["position"] = table["position"]
            columns["token"] = _tokens(patched)
        else:
            columns["head"] = table["head"]
        tables.append(pd.DataFrame({**columns, **shares(patched.effects, _gap(patched))}))
    return pd.concat(tables, ignore_index=True)


def _short(table: pd.DataFrame) -> list[str]:
    return [f"{kind}.{layer}" for kind, layer in zip(table["kind"], table["layer"])]


def _tokens(patched: Patched) -> list[str]:
    """For each item the token that most rows have at its position; "" for several positions together."""
    found: dict[str, str] = {BETWEEN: ""}
    for place in patched.table["position"].unique():
        if place != BETWEEN:
            rows = [[token for token in row if token] for row in patched.tokens]
            found[place] = Counter(row[int(place)] for row in rows).most_common(1)[0][0]
    return [found[place] for place in patched.table["position"]]


def _found(sweeps: dict[str, Patched], groups: np.ndarray, bootstrap: int, seed: int) -> pd.DataFrame:
    """The places that carry the change: chosen on half of the pairs, measured on the other."""
    codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
    count = int(codes.max()) + 1
    looked = np.isin(codes, np.random.default_rng([seed, 8]).permutation(count)[: (count + 1) // 2])
    tested = ~looked if count > 1 else looked
    with np.errstate(invalid="ignore", divide="ignore"):
        each = [p.effects[:, looked].mean(1) / _gap(p)[looked].mean() for p in sweeps.values()]
    carried = np.mean(each, axis=0)
    if not np.isfinite(carried).all():
        return pd.DataFrame()
    table, shares = sweeps[INTO_REFERENCE].table, _Shares(groups[tested], bootstrap, seed)
    last = table["position"].to_numpy() == list(dict.fromkeys(table["position"]))[-1]
    lines = []
    for among, kept in ((ANYWHERE, np.ones(len(table), dtype=bool)), (BEFORE_LAST, ~last)):
        if not kept.any() or not carried[kept].max() > 0:
            continue
        best = _earliest(table["layer"].to_numpy(), np.where(kept, carried, -np.inf))
        others = np.delete(np.arange(len(table)), best)
        drawn = np.random.default_rng([seed, 9]).permutation(others)[:RANDOM]
        for way, patched in sweeps.items():
            effects, gap = patched.effects[:, tested], _gap(patched)[tested]
            own = shares(effects[[best]], gap)
            random = float(shares(effects[drawn], gap)["share"].mean()) if len(drawn) else float("nan")
            lines.append(
                {
                    "among": among,
                    "direction": way,
                    "site": _short(table)[best],
                    "layer": int(table["layer"].iloc[best]),
                    "position": str(table["position"].iloc[best]),
                    "token": _tokens(patched)[best],
                    **{name: float(values[0]) for name, values in own.items()},
                    "random": random,
                    "pairs": len(np.unique(groups[tested])),
                }
            )
    return pd.DataFrame(lines)


def _earliest(layers: np.ndarray, carried: np.ndarray) -> int:
    """The best place of the earliest layer that has one with `HALF` of the change; else the best of all."""
    for layer in np.unique(layers):
        own = np.flatnonzero(layers == layer)
        if carried[own].max() >= HALF:
            return int(own[np.argmax(carried[own])])
    return int(np.argmax(carried))


def _same_heads(duo: Duo) -> bool:
    ours, theirs = ((model.n_heads, model.d_head) for model in (duo.policy, duo.reference))
    return ours == theirs and any(site.kind == "z" for site in duo.policy.architecture.places)
