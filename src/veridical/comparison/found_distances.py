"""Distances: how much and where two models differ. Any two that are not equal differ in these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from veridical.comparison.findings import Finding, Tables, line_of, three
from veridical.comparison.sae_shift import KINDS
from veridical.comparison.where_findings import where_findings

LEAST_KL = 1e-3
"""Nats below which a mean KL is called no distance that matters."""
LEAST_ALIKE = 0.99
"""CKA (and 1 less the Procrustes distance) from which on a site's geometry counts as the same."""


def on_samples(tables: Tables) -> list[Finding]:
    """KL on the policy's own samples."""
    whole = line_of(tables, "outputs on policy samples", region="answer", measure="kl of an answer")
    over = "" if whole is None else f", {float(whole['value']):.3g} over an answer"
    return _apart(tables, "policy samples", "answer", "On its own samples", over, 90.0)


def on_fixed_text(tables: Tables) -> list[Finding]:
    """KL on the given text."""
    agree = line_of(tables, "outputs on fixed text", region="all", measure="agreement")
    also = (
        "" if agree is None else f", and the likeliest next token is the same at {float(agree['value']):.1%}"
    )
    return _apart(tables, "fixed text", "all", "On fixed text", also, 80.0)


def _apart(tables: Tables, source: str, region: str, place: str, also: str, weight: float) -> list[Finding]:
    line = line_of(tables, f"outputs on {source}", region=region, measure="kl")
    if line is None:
        return []
    value, low, high = three(line)
    found = value > LEAST_KL and not low <= 0
    text = (
        f"{place} KL(policy || reference) is {value:.3g} nats at each token{also}"
        if found
        else f"{place} the policy stays at the reference: {value:.2g} nats at each token"
    )
    return [Finding(text, found, value, low, high, "0 for equal models", weight)]


def answers(tables: Tables) -> list[Finding]:
    """How the likelihood of the given answers changed."""
    line = line_of(tables, "outputs on fixed text", region="answer", measure="log-likelihood change")
    if line is None:
        return []
    value, low, high = three(line)
    found = bool(low > 0 or high < 0) and abs(value) > LEAST_KL
    verb = ("rose" if value > 0 else "fell") if found else "did not change beyond chance"
    text = f"The log-likelihood of the given answers {verb}: {value:+.3g} nats at each token"
    return [Finding(text, found, value, low, high, "0 for equal models", 70.0)]


def positions(tables: Tables) -> list[Finding]:
    """Where in an answer the two differ most."""
    frame = tables.get("outputs by position on fixed text")
    if frame is None:
        return []
    frame = frame[(frame["axis"] == "answer") & (frame["measure"] == "kl") & (frame["position"] >= 0)]
    if frame.empty or not frame["value"].max() > LEAST_KL:
        return []
    best = frame.loc[frame["value"].idxmax()]
    total = float((frame["value"] * frame["tokens"]).sum())
    share = float(best["value"] * best["tokens"]) / total
    value, low, high = three(best)
    place = "at its first token" if best["position"] == 0 else f"{int(best['position'])} tokens into it"
    text = f"Within answers KL is largest {place}: {value:.3g} nats, {share:.0%} of all that falls on answers"
    control = f"mean over answer tokens {total / float(frame['tokens'].sum()):.3g} nats"
    return [Finding(text, True, value, low, high, control, 65.0)]


def shifts(tables: Tables) -> list[Finding]:
    """The token whose probability moved most."""
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


def drift(tables: Tables) -> list[Finding]:
    """Where the residual stream begins to differ, and how far it gets."""
    frame = tables.get("drift")
    if frame is None:
        return []
    norms = frame[frame["measure"] == "relative norm"].reset_index(drop=True)
    largest = norms.loc[norms["value"].idxmax()]
    value, low, high = three(largest)
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


def cka(tables: Tables) -> list[Finding]:
    """Where the geometry is least alike."""
    frame = tables.get("cka")
    if frame is None or frame["cka"].isna().all():
        return []
    least = frame.loc[frame["cka"].idxmin()]
    value, low, high = (float(least[column]) for column in ("cka", "low", "high"))
    found = value < LEAST_ALIKE
    text = f"CKA is lowest at {least['site']}, {value:.4f}" if found else (
        f"No site's geometry changed: CKA is {value:.4f} or more everywhere"
    )  # fmt: skip
    control = f"1 for equal models, 0 for unrelated ones; {int(least['tokens'])} tokens"
    return [Finding(text, found, value, low, high, control, 40.0)]


def procrustes(tables: Tables) -> list[Finding]:
    """Where the two are least alike whatever the rotation."""
    frame = tables.get("procrustes")
    if frame is None or frame["distance"].isna().all():
        return []
    most = frame.loc[frame["distance"].idxmax()]
    value, low, high = (float(most[column]) for column in ("distance", "low", "high"))
    found = value > 1 - LEAST_ALIKE
    text = f"After the best rotation the two are furthest apart at {most['site']}: Procrustes distance "
    text += f"{value:.3g}, and {float(most['unrotated']):.3g} without a rotation"
    control = (
        f"0 for equal models, 2 for unrelated ones; {most['tokens_per_dimension']:.0f} tokens a dimension"
    )
    return [Finding(text, found, value, low, high, control, 39.0)]


def lens(tables: Tables) -> list[Finding]:
    """From which layer on the divergence can be read."""
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


def difference(tables: Tables) -> list[Finding]:
    """What the mean difference decodes to."""
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
    control = f"of its norm, {best['norm']:.3g}; {best['by_chance']:.3g} with random signs of pairs"
    value, low, high = (float(best[column]) for column in ("norm", "low", "high"))
    return [Finding(text, True, value, low, high, control, 30.0)]


def weights(tables: Tables) -> list[Finding]:
    """Where the weights changed."""
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
    control = f"exact, nothing sampled; an even spread would be {1 / len(layers):.0%}; {len(touched)} of "
    control += f"{len(layers)} parts changed"
    return [Finding(text, True, float(best["share"]), np.nan, np.nan, control, 50.0)]


def features(tables: Tables) -> list[Finding]:
    """What one SAE sees of both models."""
    frame = tables.get("SAE features")
    return [] if frame is None else [made for _, line in frame.iterrows() for made in _sae(tables, line)]


def _sae(tables: Tables, line: Any) -> list[Finding]:
    name, site = str(line["sae"]), str(line["site"])
    sides = {
        of: line_of(tables, "SAE error", sae=name, measure="unexplained", of=of)
        for of in ("policy", "reference", "change")
    }
    value, low, high = three(sides["change"])
    found = bool(low > 0 or high < 0)
    text = f"{name} leaves {float(sides['policy']['value']):.3f} of the policy's variance at {site} "
    text += f"unexplained, {float(sides['reference']['value']):.3f} of the reference's"
    control = "of the difference, 0 for equal models"
    said = [Finding(text, found, value, low, high, control, 33.0)]
    counts = {kind: int(line[kind]) for kind in KINDS}
    top = line_of(tables, "SAE latents", sae=name, named=True)
    words = {"appears": "appear", "vanishes": "vanish", "fires more": "fire more", "fires less": "fire less"}
    shown = ", ".join(f"{counts[kind]} {word}" for kind, word in words.items())
    text = f"Of {int(line['latents'])} features of {name}, {shown} in the policy"
    control = f"{float(line['by_chance']):.1f} by chance, with the models exchanged within pairs"
    if top is None:
        return [*said, Finding(text, False, 0.0, np.nan, np.nan, control, 34.0)]
    text += (
        f"; the surest, latent {int(top['latent'])}, fires at {float(top['policy']):.2%} of the tokens, in "
    )
    text += f"the reference at {float(top['reference']):.2%}"
    change, low, high = (float(top[column]) for column in ("change", "low", "high"))
    return [*said, Finding(text, True, change, low, high, control, 34.0)]


def crosscoder(tables: Tables) -> list[Finding]:
    """Features that one of the two alone has."""
    frame = tables.get("crosscoder")
    if frame is None or len(frame) < 2:
        return []
    ours, null = frame.iloc[0], frame.iloc[1]
    own, lost = int(ours["policy only"]), int(ours["reference only"])
    text = (
        f"A crosscoder has {own} features that the policy alone has and {lost} that the reference alone has, "
    )
    text += f"of {int(ours['alive'])} that fire"
    chance = int(null["policy only"]) + int(null["reference only"])
    control = f"trained on the reference against itself, {chance} in all"
    share, low, high = _wilson(own + lost, int(ours["alive"]))
    return [Finding(text, low > _wilson(chance, int(null["alive"]))[0], share, low, high, control, 32.0)]


def _wilson(count: int, total: int) -> tuple[float, float, float]:
    """A share with its 95 % interval (Wilson 1927)."""
    if not total:
        return 0.0, float("nan"), float("nan")
    share, z = count / total, 1.96
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z / (1 + z * z / total) * (share * (1 - share) / total + z * z / (4 * total**2)) ** 0.5
    return share, max(0.0, middle - reach), min(1.0, middle + reach)


DISTANCES: tuple[Callable[[Tables], list[Finding]], ...] = (
    on_samples, on_fixed_text, answers, positions, shifts, drift, cka, procrustes, lens, difference, weights,
    features, crosscoder, where_findings,
)  # fmt: skip
"""What says how far apart the two are; a part with distances of its own adds its function here."""
