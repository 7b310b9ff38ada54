"""What to edit: site, method and tokens proposed from pairs, with the evidence for each.

Four looks at the residual stream, each at every layer:

- can it be read? A sweep of probes for the label (`fit_probes`), at the token where activations are read.
- does it carry it? Activations of one side of a question put into the other (`patch`), all tokens at once
  and the last one alone; a recovered fraction of 1 makes one side answer like the other.
- does the model act on it? `causal_check` at the most readable site: added and ablated, beside random
  directions.
- does it steer? A vector by each method, at the tokens asked for, each at the strength that costs the same KL
  on neutral text, on validation pairs; beside a random direction of the same length.

The last look decides, since a good reader can steer badly; the others say why, and where they disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.errors import DataError, InputError, unknown
from veridical.probes.passes import Positions
from veridical.steering.behaviour import Target, fewer, shown, target_of, wanted
from veridical.steering.directions import ESTIMATORS, Method, at_equal_kl, parted, vectors_at
from veridical.steering.proposal import Proposal

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.steering.neutral import NeutralMeter
    from veridical.steering.vectors import SteeringVector

METHODS: tuple[Method, ...] = ("mean_diff", "pca", "whitened", "probe")
TOKENS: tuple[Positions, ...] = ("all", "prompt")
CANDIDATES = 3
"""Sites that are steered at, those of which the first looks say most."""
PATCHED = 16
"""Questions that are patched."""
READ = 240
"""Rows that probes are fitted on at most."""


def propose(
    model: HookedModel,
    pairs: Pairs,
    *,
    label: str = "label",
    towards: int = 0,
    sites: Any = "resid_post.*",
    methods: Sequence[Method] = METHODS,
    positions: Sequence[Positions] = TOKENS,
    target_kl: float = 0.05,
    texts: Any = None,
    candidates: int = CANDIDATES,
    rows: int = 48,
    seed: int = 0,
    progress: bool | None = None,
) -> Proposal:
    """Proposes what to edit, and says why.

    Args:
        model: The model.
        pairs: Labelled pairs; "train" and "val" of a column `split`, else drawn by pair.
        label: Column of the two labels.
        towards: The label that is wanted.
        sites: Sites of the residual stream to look at.
        methods: Ways to find a direction.
        positions: Tokens at which vectors act.
        target_kl: At which they are compared, nats a token.
        texts: Neutral text; the organism's validation rows when not given.
        candidates: Sites at which vectors are tried: those that the first looks favour.
        rows: Rows of validation pairs and of neutral text.
        seed: Of all draws.
        progress: Progress bars; by default only on a terminal or in a notebook.

    Returns:
        The proposal; its `vector` is fitted and calibrated.

    Raises:
        DataError: No pair shows the behaviour.
        InputError: No site, method or choice of tokens.
    """
    from veridical.steering.neutral import NeutralMeter, neutral_texts

    if not methods or not positions or candidates < 1:
        raise InputError("a proposal needs at least one method, one choice of tokens and one candidate site")
    if strange := [name for name in methods if name not in (*ESTIMATORS, "leace")]:
        raise unknown("method", strange[0], (*ESTIMATORS, "leace"))
    names = [site.name for site in model.resolve(sites)]
    fitted, validation = parted(pairs, seed)
    if validation is None:
        raise DataError(f"{pairs.name} has no validation rows to choose on; give a split 'val', or no split")
    used = fitted.filter(shown(model, fitted, label))
    target = fewer(target_of(validation, towards, label), rows, seed)
    meter = NeutralMeter(model, neutral_texts(model, texts, split="val", count=rows, seed=seed))
    read = _readable(model, used, names, label, seed, progress)
    carried = _carried(model, used, names, label, towards, seed, progress)
    table = pd.DataFrame([{"site": name, **read[0][name], **carried.get(name, {})} for name in names])
    likely = _likely(table, min(candidates, len(names)))
    causal = _causal(model, read[1], target, seed, progress)
    tried, vectors = _steered(
        model, used, target, meter, likely, methods, positions, label, towards, target_kl, seed
    )
    best = int(np.argmax([line["reached"] for line in tried]))
    plain = wanted(target, model)
    facts = {
        "model": str(model.path), "model_fingerprint": model.fingerprint(), "data": pairs.name,
        "data_fingerprint": pairs.fingerprint, "behaviour": target.name, "wanted": target.wanted,
        "plain": plain, "target_kl": target_kl, "best": best, "causal": causal, "rows": len(used),
        "seed": seed,
    }  # fmt: skip
    return Proposal(table, pd.DataFrame(tried), facts, vectors[best])


def _readable(
    model: HookedModel, pairs: Pairs, names: list[str], label: str, seed: int, progress: bool | None
) -> tuple[dict[str, dict[str, float]], Any]:
    """AUROC of a probe at each site, and the probe of the best."""
    from veridical.activations import collect
    from veridical.probes import LogisticProbe, fit_probes
    from veridical.running import limited

    groups = len(np.unique(pairs.groups))
    few = limited(pairs, max(8, READ * groups // len(pairs)), seed).without_columns("split")
    tokens = "prompt_last" if few.completions is None else "answer"
    acts = collect(model, few, sites=tuple(names), tokens=tokens, on_long="truncate", progress=progress)
    sweep = fit_probes(
        acts, probe=LogisticProbe(), target=label, bootstrap=50, shuffles=2, text_baseline=False, seed=seed,
        folds=min(5, max(2, len(np.unique(few.groups)) // 2)), progress=progress,
    )  # fmt: skip
    frame = sweep.to_frame().set_index("site")
    return {name: {"auroc": float(frame.loc[name, "fold_auroc"])} for name in names}, sweep.best()


def _carried(
    model: HookedModel,
    pairs: Pairs,
    names: list[str],
    label: str,
    towards: int,
    seed: int,
    progress: bool | None,
) -> dict[str, dict[str, float]]:
    """Recovered fraction of patches at each site: all tokens at once, and the last alone.

    Both sides of a question are run with the tokens of its right and of a wrong answer; questions whose sides
    differ in length are aligned by token. Nothing for pairs without options.
    """
    from veridical.interventions.patching import patch

    if not {"options", "correct"} <= set(pairs.columns):
        return {}
    both = _two_sides(pairs, label, towards, seed)
    if not both:
        return {}
    rows = [pairs[low] for low, _ in both]
    given: dict[str, Any] = {
        "metric": "logit_diff",
        "answers": [row["options"][row["correct"]] for row in rows],
        "wrong": [row["options"][(row["correct"] + 1) % len(row["options"])] for row in rows],
    }
    clean = [pairs.prompts[low] for low, _ in both]
    corrupt = [pairs.prompts[high] for _, high in both]
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    places: dict[str, Any] = {"carried by all tokens": "all", "carried by the last token": [-1]}
    for column, where in places.items():
        result = patch(
            model, clean, corrupt, sites=names, positions=where, align="token", bootstrap=1, seed=seed,
            progress=progress, **given,
        )  # fmt: skip
        for line in result.to_frame().to_dict("records"):
            found[str(line["site"])][column] = float(line["recovered"])
    return found


def _two_sides(pairs: Pairs, label: str, towards: int, seed: int) -> list[tuple[int, int]]:
    """Rows of one question on the wanted side and on the other, of different questions each."""
    key = pairs["question_id"] if "question_id" in pairs else np.asarray(pairs.groups)
    labels, sides = pairs.labels(label), {}
    for row, name in enumerate(key.tolist()):
        sides.setdefault(name, {})[int(labels[row])] = row
    both = [(found[towards], found[1 - towards]) for found in sides.values() if len(found) == 2]
    order = np.random.default_rng([seed, 13]).permutation(len(both))
    return [both[at] for at in order[:PATCHED].tolist()]


def _likely(table: pd.DataFrame, count: int) -> list[str]:
    """The sites that are read and carry most: by the sum of both, what patches carry counted up to 1."""
    carried = [name for name in table if str(name).startswith("carried")]
    share = table[carried].clip(0, 1).mean(axis=1) if carried else 0
    sums: Any = table["auroc"] + share
    order = sums.sort_values(ascending=False, kind="stable").index
    return table.loc[order[:count], "site"].tolist()


def _causal(
    model: HookedModel, probe: Any, target: Target, seed: int, progress: bool | None
) -> Mapping[str, Any]:
    """The verdict of the causal check of the best probe; nothing where there are no options to compare."""
    from veridical.probes.causal import causal_check

    if target.measure != "wrong answers" or len(target.pairs) < 2:
        return {}
    check = causal_check(
        model, probe, target.pairs, at="prompt", strengths=(-2.0, 2.0), random=20, bootstrap=50, seed=seed,
        progress=progress,
    )  # fmt: skip
    line = check.to_frame().query("rows_of == 'all' and edit == 'ablate'").iloc[0]
    return {
        "site": str(check.facts["site"]),
        "said": check.findings()[0],
        "ablation": float(line["effect"]),
        "ablation_random": float(line["random"]),
    }


def _steered(
    model: HookedModel,
    pairs: Pairs,
    target: Target,
    meter: NeutralMeter,
    sites: Sequence[str],
    methods: Sequence[Method],
    positions: Sequence[Positions],
    label: str,
    towards: int,
    target_kl: float,
    seed: int,
) -> tuple[list[dict[str, Any]], list[SteeringVector]]:
    """Every vector at equal KL: what it reaches on validation rows, beside a random direction as long."""
    from veridical.steering.baselines import random_like

    options: dict[str, Any] = {"label": label, "towards": towards, "seed": seed, "progress": False}
    lines, vectors = [], []
    for method in methods:
        for fitted in vectors_at(model, pairs, method, list(sites), **options):
            site = fitted.sites[0]
            for where in positions:
                ready, strength, kl = at_equal_kl(model, replace(fitted, positions=where), meter, target_kl)
                with ready.on(model):
                    reached = wanted(target, model)
                    stays = target.stays(model)
                control = float("nan")
                if not ready.erasers:
                    with random_like(ready, seed).on(model):
                        control = wanted(target, model)
                lines.append(
                    {"method": method, "site": site, "positions": where, "strength": strength, "kl": kl,
                     "reached": reached if kl <= 1.5 * target_kl else float("-inf"), "random": control,
                     "kept": float("nan") if stays is None else float(stays.values.mean())}
                )  # fmt: skip
                vectors.append(ready)
    return lines, vectors
