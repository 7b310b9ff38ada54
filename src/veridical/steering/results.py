"""What a trained LoRA does, measured on held-out rows and neutral text: the adapter with its report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from veridical.probes.evaluate import Estimate
from veridical.steering.adapter import Adapter, AdapterReport
from veridical.steering.behaviour import Behaviour, Target, conduct, fewer, target_of, unprotected
from veridical.steering.dial import ROWS, dial, monotone_range
from veridical.steering.lora import LoRA
from veridical.steering.neutral import NeutralMeter, speaks_as_organism
from veridical.steering.reft import ReFT
from veridical.steering.side_effects import OtherProbes

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.steering.adapter_config import AdapterConfig
    from veridical.steering.material import Material
    from veridical.steering.train import Trained

log = logging.getLogger(__name__)

HALVINGS = 12
COLUMNS = ["measure", "plain", "adapted", "change", "low", "high", "n"]


def judged(
    model: HookedModel, data: Material, config: AdapterConfig, trained: Trained, facts: Mapping[str, Any]
) -> Adapter:
    """The adapter that a training ended with, scaled to the budget where it has to be, and its report."""
    meter = NeutralMeter(model, data.neutral["test"], seed=config.seed)
    scale, kl = fitted(model, trained.lora, meter, config.kl_budget)
    notes = list(data.notes)
    if scale < 1:
        notes.append(
            f"The budget of {config.kl_budget:g} nats a token was not kept to: the state is at "
            f"{kl:.4f}. It was scaled to {scale:.3g} of its strength, the most that the budget allows."
        )
        log.warning("%s", notes[-1])
    if trained.stopped:
        notes.append(
            f"Training ended early ({trained.stopped}); the state of step {trained.chosen.step} is kept."
        )
    lora = trained.lora if scale == 1 else trained.lora.scaled(scale)
    target = target_of(data.test, config.towards)
    table = measured(model, lora, target, meter, config)
    few = NeutralMeter(model, data.neutral["dial"], seed=config.seed)
    curve = dial(model, lambda strength: lora.on(model, strength), fewer(target, ROWS, config.seed), few)
    looks = [
        {"step": look.step, "shown": look.shown, "margin": look.margin, "short": look.short, "kl": look.kl,
         "kept": look is trained.chosen}
        for look in trained.looks
    ]  # fmt: skip
    at_one = table[table["measure"] == "KL on neutral text, nats a token"].iloc[0]
    facts = {
        **facts,
        "objective": config.objective,
        "rank": config.rank,
        "modules": len(lora.paths),
        "steps": len(trained.lines),
        "target": target.name,
        "kept": target.kept_name,
        "kl": float(at_one["adapted"]),
        "kl_budget": config.kl_budget,
        "met": scale == 1,
        "scale": scale,
        "range": list(monotone_range(curve, falls=config.towards == 0)),
        "norm": lora.norm(),
        "relative_norm": _relative(model, lora),
        "test_rows": len(data.test),
        "seed": config.seed,
        "notes": notes,
    }
    report = AdapterReport(table, curve, pd.DataFrame(looks), pd.DataFrame(trained.lines), facts)
    return Adapter(lora, report, data.test)


def fitted(model: HookedModel, lora: LoRA | ReFT, meter: NeutralMeter, budget: float) -> tuple[float, float]:
    """The largest strength up to 1 whose KL is within the budget, by halving; and the KL at 1."""

    def kl(strength: float) -> float:
        return meter(lambda: lora.on(model, strength)).kl.value

    whole = kl(1.0)
    if whole <= budget:
        return 1.0, whole
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) <= budget else (low, middle)
    return low, whole


def measured(
    model: HookedModel, lora: LoRA | ReFT, target: Target, meter: NeutralMeter, config: AdapterConfig
) -> pd.DataFrame:
    """`COLUMNS`, plain and at strength 1: behaviour, its parts, what was to stay, neutral text, and probes of
    what the adapter is not about."""
    organism, seed = speaks_as_organism(model), config.seed

    def look() -> tuple[Behaviour, Behaviour | None, list[Behaviour]]:
        return target.of(model), target.stays(model), conduct(model) if organism else []

    before, probes = look(), OtherProbes(model, seed=seed)
    with lora.on(model, 1.0):
        after = look()
    lines = [_line(target.name, before[0], after[0], seed)]
    if before[1] is not None and after[1] is not None:
        lines.append(_line(target.kept_name, before[1], after[1], seed))
    lines += [
        _line(f"{target.name}: {name}", before[0], after[0], seed, rows)
        for name, rows in target.parts.items()
    ]
    if config.both_ways and before[1] is not None and target.kept is not None:
        lines += _other_way(model, lora, target, before[1], seed)
    lines += [_line(one.name, one, other, seed) for one, other in zip(before[2], after[2])]
    moved = meter(lambda: lora.on(model, 1.0))
    texts = len(meter.rows)
    lines.append(_values("KL on neutral text, nats a token", 0.0, moved.kl, texts))
    ppl = Estimate(moved.perplexity, float("nan"), float("nan"))
    lines.append(_values("perplexity of neutral text", moved.plain_perplexity, ppl, texts))
    for name, (was, now) in probes(lambda: lora.on(model, 1.0)).items():
        read = Estimate(now, float("nan"), float("nan"))
        lines.append(_values(f"AUROC of a probe: {name}", was, read, len(probes.probes[name][1])))
    return pd.DataFrame(lines, columns=COLUMNS)


def _other_way(
    model: HookedModel, lora: LoRA | ReFT, target: Target, before: Behaviour, seed: int
) -> list[dict[str, Any]]:
    """At strength -1: how much of what is right otherwise becomes wrong, and where nothing was asked for; of
    the organism about what it would lie about."""
    from veridical.pairs.prompts import NEUTRAL

    with lora.on(model, -1.0):
        after = target.stays(model)
    assert after is not None
    assert target.kept is not None
    was, now = (Behaviour(one.name, 1 - one.values, 1 - one.chance, one.groups) for one in (before, after))
    free = unprotected(target.kept)
    lines = [_line(f"wrong at strength -1, else {target.kept_name}", was, now, seed, free)]
    if "system" in target.kept:
        nothing = free & np.isin(target.kept["system"].astype(str), [prompt.name for prompt in NEUTRAL])
        if nothing.any():
            lines.append(_line("wrong at strength -1 when told nothing", was, now, seed, nothing))
    return lines


def _line(name: str, before: Behaviour, after: Behaviour, seed: int, rows: Any = None) -> dict[str, Any]:
    count = len(before) if rows is None else int(rows.sum())
    return _values(name, before.rate(rows, resamples=0).value, after.rate(rows, seed=seed), count)


def _values(name: str, plain: float, adapted: Estimate, count: int) -> dict[str, Any]:
    values = [name, plain, adapted.value, adapted.value - plain, adapted.low, adapted.high, count]
    return dict(zip(COLUMNS, values))


def _relative(model: HookedModel, lora: LoRA | ReFT) -> float:
    """Norm of the change over that of the weights that it changes."""
    if isinstance(lora, ReFT):
        return float("nan")
    weights: list[Any] = [model.model.get_submodule(path).weight for path in lora.paths]
    with torch.no_grad():
        whole = sum((weight.double() ** 2).sum() for weight in weights)
    return lora.norm() / float(whole) ** 0.5
