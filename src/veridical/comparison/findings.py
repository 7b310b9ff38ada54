"""What changed, in plain sentences: each with its figure, its interval, and its value without a change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# pandas' stubs take a row or a filtered table for a union of everything that it could be.
Tables = Mapping[str, Any]
LEAST_KL = 1e-3
"""Nats below which a mean KL is called no change that matters."""


@dataclass(frozen=True)
class Finding:
    """One sentence.

    Attributes:
        text: What was found, or what was looked for.
        found: Whether it was there.
        value: The figure.
        low, high: Its 95 % interval; NaN where it has none.
        control: What the figure is compared with, in words.
        weight: Rank, higher first.
    """

    text: str
    found: bool
    value: float
    low: float
    high: float
    control: str
    weight: float

    def __str__(self) -> str:
        if np.isfinite(self.low):
            return f"{self.text} (95 % interval {self.low:.3g} to {self.high:.3g}; {self.control})"
        return f"{self.text} ({self.control})"


def find(tables: Tables) -> list[Finding]:
    """Findings of all parts that are there: what was found first, the most important first."""
    from veridical.comparison.where_findings import where_findings

    said: list[Finding] = []
    for part in (_samples, _fixed, _answers, _positions, _shifts, _drift, _cka, _lens, _difference, _weights):
        said += part(tables)
    said += _directions(tables)
    said += where_findings(tables)
    return sorted(said, key=lambda each: (not each.found, -each.weight))


def _line(tables: Tables, table: str, **where: object) -> Any:
    frame: Any = tables.get(table)
    if frame is None or frame.empty:
        return None
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return None if frame.empty else frame.iloc[0]


def _three(line: Any) -> tuple[float, float, float]:
    return float(line["value"]), float(line["low"]), float(line["high"])


def _samples(tables: Tables) -> list[Finding]:
    line = _line(tables, "outputs on policy samples", region="answer", measure="kl")
    whole = _line(tables, "outputs on policy samples", region="answer", measure="kl of an answer")
    if line is None or whole is None:
        return []
    value, low, high = _three(line)
    found = value > LEAST_KL and not low <= 0
    text = (
        f"On its own samples the policy is {value:.3g} nats from the reference at each token, "
        f"{float(whole['value']):.3g} over an answer"
        if found
        else f"On its own samples the policy stays at the reference: {value:.2g} nats at each token"
    )
    return [Finding(text, found, value, low, high, "0 for equal models", 90.0)]


def _fixed(tables: Tables) -> list[Finding]:
    line = _line(tables, "outputs on fixed text", region="all", measure="kl")
    agree = _line(tables, "outputs on fixed text", region="all", measure="agreement")
    if line is None or agree is None:
        return []
    value, low, high = _three(line)
    found = value > LEAST_KL and not low <= 0
    text = f"On fixed text KL(policy || reference) is {value:.3g} nats at each token, and the likeliest next "
    text += f"token is the same at {float(agree['value']):.1%}"
    return [Finding(text, found, value, low, high, "0 nats and 100 % for equal models", 80.0)]


def _answers(tables: Tables) -> list[Finding]:
    line = _line(tables, "outputs on fixed text", region="answer", measure="log-likelihood change")
    if line is None:
        return []
    value, low, high = _three(line)
    found = bool(low > 0 or high < 0) and abs(value) > LEAST_KL
    verb = ("rose" if value > 0 else "fell") if found else "did not change beyond chance"
    text = f"The log-likelihood of the given answers {verb}: {value:+.3g} nats at each token"
    return [Finding(text, found, value, low, high, "0 for equal models", 70.0)]


def _positions(tables: Tables) -> list[Finding]:
    frame = tables.get("outputs by position on fixed text")
    if frame is None:
        return []
    frame = frame[(frame["axis"] == "answer") & (frame["measure"] == "kl") & (frame["position"] >= 0)]
    if frame.empty or not frame["value"].max() > LEAST_KL:
        return []
    best = frame.loc[frame["value"].idxmax()]
    total = float((frame["value"] * frame["tokens"]).sum())
    share = float(best["value"] * best["tokens"]) / total
    value, low, high = _three(best)
    place = "at its first token" if best["position"] == 0 else f"{int(best['position'])} tokens into it"
    text = f"Within answers KL is largest {place}: {value:.3g} nats, {share:.0%} of all that falls on answers"
    control = f"mean over answer tokens {total / float(frame['tokens'].sum()):.3g} nats"
    return [Finding(text, True, value, low, high, control, 65.0)]


def _shifts(tables: Tables) -> list[Finding]:
    frame = tables.get("shifted tokens on policy samples", tables.get("shifted tokens on fixed text"))
    if frame is None or frame.empty:
        return []
    sure = frame[(frame["low"] > 0) | (frame["high"] < 0)]
    if sure.empty:
        return [
            Finding("No token's probability changed beyond chance", False, 0.0, np.nan, np.nan,
                    "intervals over resampled pairs", 20.0)
        ]  # fmt: skip
    best = sure.loc[sure["shift"].abs().idxmax()]
    text = f"The token that moved most is {best['token']!r}: its mean probability went from "
    text += f"{best['reference']:.3g} to {best['policy']:.3g}"
    return [
        Finding(text, True, float(best["shift"]), float(best["low"]), float(best["high"]),
                "change, 0 for equal models", 55.0)
    ]  # fmt: skip


def _drift(tables: Tables) -> list[Finding]:
    frame = tables.get("drift")
    if frame is None:
        return []
    norms = frame[frame["measure"] == "relative norm"].reset_index(drop=True)
    largest = norms.loc[norms["value"].idxmax()]
    value, low, high = _three(largest)
    if not value > 0:
        text = "The residual stream is the same at every site"
        return [Finding(text, False, value, low, high, "relative norm of the change", 45.0)]
    steps = np.diff(norms["value"].to_numpy(), prepend=0.0)
    begin = norms.iloc[int(np.argmax(norms["value"].to_numpy() > 0.01 * value))]
    jump = norms.iloc[int(np.argmax(steps))]
    text = (
        f"The residual stream begins to differ at {begin['site']}, moves most at {jump['site']}, and is "
        f"furthest from the reference at {largest['site']}, by {value:.2g} of its norm"
    )
    return [Finding(text, True, value, low, high, "0 for equal models", 60.0)]


def _cka(tables: Tables) -> list[Finding]:
    frame = tables.get("cka")
    if frame is None or frame["cka"].isna().all():
        return []
    least = frame.loc[frame["cka"].idxmin()]
    value = float(least["cka"])
    found = value < 0.99
    text = f"CKA is lowest at {least['site']}, {value:.4f}" if found else (
        f"No site's geometry changed: CKA is {value:.4f} or more everywhere"
    )  # fmt: skip
    control = f"1 for equal models, 0 for unrelated ones; {int(least['tokens'])} tokens"
    return [Finding(text, found, value, np.nan, np.nan, control, 40.0)]


def _lens(tables: Tables) -> list[Finding]:
    frame = tables.get("logit-lens divergence")
    if frame is None:
        return []
    last = frame.iloc[-1]
    if not float(last["kl"]) > LEAST_KL:
        return []
    half = frame[frame["kl"] >= 0.5 * float(last["kl"])].iloc[0]
    text = f"Read through the logit lens, half of the final divergence is there from {half['site']} on"
    control = f"{float(last['kl']):.3g} nats at {last['site']}"
    return [
        Finding(text, True, float(half["kl"]), float(half["low"]), float(half["high"]), control, 35.0)
    ]  # fmt: skip


def _difference(tables: Tables) -> list[Finding]:
    frame = tables.get("difference lens")
    if frame is None:
        return []
    frame = frame[frame["where"] == "last token"]
    sure = frame[frame["norm"] > frame["by_chance"]]
    if sure.empty:
        text = "The mean difference of the streams at last tokens is no longer than chance makes it"
        return [
            Finding(text, False, float(frame["norm"].max()), np.nan, np.nan, "random signs of pairs", 15.0)
        ]
    best = sure.iloc[-1]
    text = f"At {best['site']}, last tokens, the mean difference decodes to {best['promotes']}"
    control = f"norm {best['norm']:.3g}, by chance {best['by_chance']:.3g}"
    return [Finding(text, True, float(best["norm"]), np.nan, np.nan, control, 30.0)]


def _weights(tables: Tables) -> list[Finding]:
    frame, layers = tables.get("weights"), tables.get("weights by layer")
    if frame is None or layers is None:
        return []
    if not (frame["norm"] > 0).any():
        return [Finding("The weights are the same", False, 0.0, np.nan, np.nan, "relative change", 50.0)]
    touched = layers[layers["share"] > 0]
    best = touched.loc[touched["share"].idxmax()]
    module = frame.loc[frame["norm"].idxmax()]
    place = "outside the layers" if best["layer"] < 0 else f"in layer {int(best['layer'])}"
    text = f"{float(best['share']):.0%} of the squared change of the weights lies {place}"
    if np.isfinite(module["effective_rank"]):
        text += f"; {module['module']} changed most, with an effective rank of {module['effective_rank']:.3g}"
    control = f"an even spread would be {1 / len(layers):.0%}; {len(touched)} of {len(layers)} parts changed"
    return [Finding(text, True, float(best["share"]), np.nan, np.nan, control, 50.0)]


def _directions(tables: Tables) -> list[Finding]:
    frame = tables.get("directions")
    if frame is None or frame.empty:
        return []
    ceiling = frame[["halves_policy", "halves_reference"]].min(axis=1)
    gap = ceiling - frame["cosine"]
    worst = frame.loc[gap.idxmax()]
    found = float(gap.max()) > 0.1
    text = (
        f"The label's direction turned most at {worst['site']}: its cosine between the models is "
        f"{worst['cosine']:.3f}, its length {worst['norm_ratio']:.2f} times the reference's"
        if found
        else "The label's direction points the same way in both models, as far as its rows tell"
    )
    control = (
        f"halves of the pairs within a model {min(worst['halves_policy'], worst['halves_reference']):.3f}, "
        f"permuted labels {worst['shuffled']:.3f}"
    )
    return [Finding(text, found, float(worst["cosine"]), np.nan, np.nan, control, 38.0)]
