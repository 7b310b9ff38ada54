"""How a steering vector is found: a direction at each site from labelled pairs, and the site by validation.

Every direction but LEACE's is that of one of Veridical's probes or SAEs, so that what reads and what steers
are one thing:

- "mean_diff": difference of class means (`MassMeanProbe`; Rimsky et al. 2024, arXiv:2312.06681).
- "pca": first principal component of the differences within pairs (`LATProbe`; Zou et al. 2023,
  arXiv:2310.01405).
- "whitened": the mean difference after whitening (`LDAProbe`). It reads best where features are correlated,
  and leans to directions of little variance, which later layers may not use.
- "probe": normal of a probe (`probe=`), or of a logistic one fitted here.
- "sae": decoder row of an SAE's feature (`sae=`, `feature=`; when not given the one whose mean differs most,
  in standard deviations).
- "leace": the label erased (`LeaceEraser`); strength 1 erases it.

A direction `u` is scaled so that strength 1 is the difference of the class means along it:
`v = u (u . (mean_wanted - mean_other))`.

Of several sites that one is kept whose vector, at the strength that costs `target_kl` on neutral text, moves
the behaviour of validation pairs most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from veridical.errors import DataError, InputError, unknown
from veridical.steering.behaviour import fewer, shown, target_of, wanted
from veridical.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.probes.passes import Positions

Method = Literal["mean_diff", "pca", "whitened", "probe", "sae", "leace"]
ESTIMATORS = {"mean_diff": "mass_mean", "pca": "lat", "whitened": "lda", "probe": "logistic"}
"""The probe whose direction each method takes."""
VALIDATED = 64
"""Rows of behaviour, and of neutral text, on which sites are compared."""


def fit_vector(
    model: HookedModel,
    pairs: Pairs,
    *,
    method: Method = "mean_diff",
    sites: Any = "resid_post.*",
    tokens: str | int | None = None,
    positions: Positions = "all",
    label: str = "label",
    towards: int = 0,
    together: bool = False,
    target_kl: float = 0.05,
    texts: Any = None,
    probe: Any = None,
    sae: Any = None,
    feature: int | None = None,
    seed: int = 0,
    batch_tokens: int = 2048,
    progress: bool | None = None,
) -> SteeringVector:
    """Fits a steering vector.

    Args:
        model: The model.
        pairs: Rows of both labels. Where there is a column `split`, "train" is fitted on and "val" chooses
            the site; else they are drawn by pair. Questions with options count only where the model shows the
            behaviour (`behaviour.shown`).
        method: See above.
        sites: Sites or globs; of several, one is chosen on validation pairs unless `together`.
        tokens: Where activations are read, as for `collect`; the last token of the prompt, or the mean over
            the answer where the pairs have completions, when not given.
        positions: Tokens at which the vector acts.
        label: Column of the two labels.
        towards: 0 or 1, the label that positive strengths go towards.
        together: Keep a vector at every site, which then act at once.
        target_kl: At which sites are compared, nats a token.
        texts: Neutral text for that; the organism's own when not given.
        probe: A fitted probe, for "probe".
        sae: An SAE, for "sae".
        feature: Its feature.
        seed: Of draws and neutral rows.
        batch_tokens: Tokens in one batch while reading.
        progress: Progress bar while reading; by default only on a terminal or in a notebook.

    Raises:
        UnknownNameError: A method, site or column that does not exist.
        DataError: No pair shows the behaviour, or one label only.
    """
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    if towards not in (0, 1):
        raise InputError(f"towards is {towards!r}; expected one of the labels 0 and 1")
    pairs.labels(label)
    names = _sites(model, method, sites, probe, sae)
    fitted, validation = parted(pairs, seed, whole=together or len(names) == 1)
    used = fitted.filter(shown(model, fitted, label))
    read = tokens if tokens is not None else _usual_tokens(used)
    found = _fitted(
        model, used, method, names, read, label, towards, probe, sae, feature, batch_tokens, progress
    )
    facts = _facts(model, used, pairs, read, label, towards, seed) | {"rows_given": len(fitted)}
    made = [replace(one, positions=positions, facts={**facts, **one.facts}) for one in found]
    if len(made) == 1:
        return made[0]
    if together:
        return _joined(made)
    if validation is None:
        raise DataError(f"{pairs.name} has no rows left to choose a site on; name one site")
    return chosen(model, made, validation, label, towards, target_kl, texts, seed)


def vectors_at(
    model: HookedModel,
    shown_pairs: Pairs,
    method: Method,
    sites: list[str],
    *,
    label: str = "label",
    towards: int = 0,
    seed: int = 0,
    batch_tokens: int = 2048,
    progress: bool | None = None,
) -> list[SteeringVector]:
    """A vector for each site, all of one reading; of rows that are known to show the behaviour.

    Args:
        model: The model.
        shown_pairs: Rows, all of which are fitted on.
        method: One that needs no probe and no SAE.
        sites: Canonical names.
        label: Column of the two labels.
        towards: The label that positive strengths go towards.
        seed: Kept in the facts.
        batch_tokens: Tokens in one batch.
        progress: Progress bar.
    """
    read = _usual_tokens(shown_pairs)
    found = _fitted(
        model, shown_pairs, method, sites, read, label, towards, None, None, None, batch_tokens, progress
    )
    facts = _facts(model, shown_pairs, shown_pairs, read, label, towards, seed)
    facts |= {"rows_given": len(shown_pairs)}
    return [replace(one, facts={**facts, **one.facts}) for one in found]


def _facts(
    model: HookedModel, used: Pairs, given: Pairs, tokens: str | int, label: str, towards: int, seed: int
) -> dict[str, Any]:
    return {
        "model": str(model.path), "model_fingerprint": model.fingerprint(), "data": given.name,
        "data_fingerprint": given.fingerprint, "rows": len(used), "pairs": len(np.unique(used.groups)),
        "tokens": str(tokens), "label": label, "towards": towards, "seed": seed,
    }  # fmt: skip


def parted(pairs: Pairs, seed: int = 0, whole: bool = False) -> tuple[Pairs, Pairs | None]:
    """Rows to fit on and rows to choose on, by pair; None for these where nothing is chosen."""
    if "split" in pairs and {"train", "val"} & set(pairs["split"].tolist()):
        splits = set(pairs["split"].tolist())
        train = pairs.filter(split="train") if "train" in splits else pairs.filter(split="val")
        return train, pairs.filter(split="val") if {"train", "val"} <= splits else None
    if whole:
        return pairs, None
    if len(np.unique(pairs.groups)) < 4:
        raise DataError(
            f"{pairs.name} has {len(np.unique(pairs.groups))} pairs, too few to choose a site on some of "
            "them; name one site"
        )
    drawn = pairs.split({"train": 0.7, "val": 0.3}, seed=seed)
    return drawn.filter(split="train"), drawn.filter(split="val")


def chosen(
    model: HookedModel,
    vectors: list[SteeringVector],
    validation: Pairs,
    label: str,
    towards: int,
    target_kl: float,
    texts: Any = None,
    seed: int = 0,
) -> SteeringVector:
    """The vector that moves validation pairs most at equal KL, with the table of all as `facts["choice"]`."""
    from veridical.steering.neutral import NeutralMeter, neutral_texts

    target = fewer(target_of(validation, towards, label), VALIDATED, seed)
    meter = NeutralMeter(model, neutral_texts(model, texts, split="val", count=VALIDATED, seed=seed))
    plain = wanted(target, model)
    lines, scored = [], []
    for vector in vectors:
        ready, strength, kl = at_equal_kl(model, vector, meter, target_kl)
        with ready.on(model, 1.0):
            reached = wanted(target, model)
        lines.append(
            {"method": vector.method, "site": vector.sites[0], "strength": strength, "kl": kl, "plain": plain,
             "reached": reached}
        )  # fmt: skip
        scored.append(reached if kl <= 1.5 * target_kl else -1.0)
    best = int(np.argmax(scored))
    facts = {**vectors[best].facts, "choice": lines, "choice_of": target.name, "choice_kl": target_kl}
    return replace(vectors[best], facts=facts)


def at_equal_kl(
    model: HookedModel, vector: SteeringVector, meter: Any, target_kl: float
) -> tuple[SteeringVector, float, float]:
    """The vector whose strength 1 costs `target_kl`, that factor, and its KL; an eraser as it is."""
    if vector.erasers:
        return vector, 1.0, meter(lambda: vector.on(model, 1.0)).kl.value
    try:
        made = vector._calibrated(model, target_kl, meter, 0.05)
    except InputError:  # nothing it does reaches that much: it stays as it was fitted
        return vector, 1.0, meter(lambda: vector.on(model, 1.0)).kl.value
    return made, float(made.facts["calibration_factor"]), float(made.calibrated["kl"][-1])


def _usual_tokens(pairs: Pairs) -> str:
    return "prompt_last" if pairs.completions is None else "answer"


def _sites(model: HookedModel, method: str, sites: Any, probe: Any, sae: Any) -> list[str]:
    if method == "probe" and probe is not None:
        from veridical.probes.fits import place_for

        return [place_for(model, probe)]
    if method == "sae":
        from veridical.saes.splice import places

        if sae is None:
            raise InputError("method 'sae' needs the SAE: give sae=...")
        return [places(model, sae)[1]]
    return [site.name for site in model.resolve(sites)]


def _fitted(
    model: HookedModel,
    pairs: Pairs,
    method: str,
    names: list[str],
    tokens: str | int,
    label: str,
    towards: int,
    probe: Any,
    sae: Any,
    feature: int | None,
    batch_tokens: int,
    progress: bool | None,
) -> list[SteeringVector]:
    """One vector for each site."""
    from veridical.activations import collect

    read = names
    if method == "sae":
        from veridical.saes.splice import places

        read = [places(model, sae)[0], *names]
    acts = collect(
        model, pairs, sites=tuple(dict.fromkeys(read)), tokens=tokens, batch_tokens=batch_tokens,
        on_long="truncate", progress=progress,
    )  # fmt: skip
    row = acts.index["row"].to_numpy()
    positive = np.asarray(pairs.labels(label))[row] == towards
    groups = np.unique(np.asarray(pairs.groups).astype(str), return_inverse=True)[1].reshape(-1)[row]

    def rows_at(site: str) -> np.ndarray:
        return acts[site].flatten(1).double().numpy()

    if method == "sae":
        return [_of_feature(sae, rows_at(read[0]), positive, names[0], feature)]
    if method == "leace":
        from veridical.probes.erasure import LeaceEraser

        return [
            SteeringVector(erasers={site: LeaceEraser().fit(rows_at(site), positive)}, method=method)
            for site in names
        ]
    directions = _directions(method, probe)
    made = []
    for site in names:
        x = rows_at(site)
        unit = directions(x, positive, groups)
        gap = x[positive].mean(0) - x[~positive].mean(0)
        length = float(unit @ gap)
        if abs(length) <= 1e-12 * float(np.linalg.norm(x, axis=1).mean()):
            raise DataError(f"the activations at {site} do not differ by {label} along the direction")
        norm = float(np.linalg.norm(x, axis=1).mean())
        made.append(SteeringVector({site: unit * length}, method=method, facts={"mean_norm": norm}))
    return made


def _directions(method: str, probe: Any) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """From rows `[n, d]`, labels and groups to a unit direction `[d]`."""
    from veridical.probes.kinds import estimator

    if method == "probe" and probe is not None:
        return lambda x, positive, groups: probe.direction_
    return lambda x, positive, groups: (
        estimator(ESTIMATORS[method]).fit(x, positive, groups=groups).direction_
    )


def _of_feature(
    sae: Any, x: np.ndarray, positive: np.ndarray, site: str, feature: int | None
) -> SteeringVector:
    import torch

    from veridical.saes.splice import cast, check_feature
    from veridical.saes.units import unscaled

    raw = unscaled(sae)
    with torch.no_grad():
        latents = raw.encode(cast(raw, torch.from_numpy(x))).double().cpu().numpy()
    gap = latents[positive].mean(0) - latents[~positive].mean(0)
    if feature is None:
        spread = latents.std(0)
        feature = int(np.argmax(np.where(spread > 0, np.abs(gap) / np.where(spread > 0, spread, 1), 0)))
    number = check_feature(raw, feature)
    if gap[number] == 0:
        raise DataError(f"feature {number} is as active on one label as on the other; take another")
    row = raw.W_dec.detach()[number].double().cpu().numpy()
    facts = {"feature": number, "feature_difference": float(gap[number])}
    return SteeringVector({site: row * gap[number]}, method="sae", facts=facts)


def _joined(vectors: list[SteeringVector]) -> SteeringVector:
    """One vector that acts at the sites of all."""
    sites: dict[str, Any] = {site: v for one in vectors for site, v in one.vectors.items()}
    erasers = {site: eraser for one in vectors for site, eraser in one.erasers.items()}
    return replace(vectors[0], vectors=sites, erasers=erasers)
