"""Training an adapter on internals under a KL budget: data, updates, looks, and which state is kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.adapters import lora_config
from veridical.config import build
from veridical.errors import InputError, NonFiniteError
from veridical.progress import bar
from veridical.steering import representation
from veridical.steering.adapter_config import AdapterConfig
from veridical.steering.constraint import Budget
from veridical.steering.lora import LoRA, lora_of, put_on
from veridical.steering.neutral import Neutral, NeutralMeter, kl_loss, neutral_texts
from veridical.steering.runner import Runner, lora_scaled
from veridical.steering.twins import Twin, balanced, twins

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs

log = logging.getLogger(__name__)

LOOKED = 48
"""Validation pairs, and rows of neutral text, at a look."""
LOSSES = {"representation": representation}


@dataclass(frozen=True)
class Look:
    """One look at the training.

    Attributes:
        step: After how many updates.
        shown: Share of validation pairs in which the unwanted answer is likelier than the wanted one.
        margin: Mean log p of the wanted answer less that of the unwanted one, nats.
        kl: On validation neutral text, nats a token.
        state: The weights then.
    """

    step: int
    shown: float
    margin: float
    kl: float
    state: Mapping[str, Tensor] = field(repr=False)


@dataclass
class Training:
    """One training.

    Args:
        model: The handle.
        adapted: PEFT's model on its module.
        runner: Passes.
        config: Options.
        budget: The constraint.
    """

    model: HookedModel
    adapted: Any
    runner: Runner
    config: AdapterConfig
    budget: Budget
    lines: list[dict[str, float]] = field(default_factory=list)

    def run(self, train: Sequence[Twin], neutral: Neutral, look: Any) -> tuple[list[Look], str]:
        """Updates to the end; returns the looks, and why it ended early ("" if it did not)."""
        config = self.config
        weights = [p for p in self.adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            weights, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, config.steps))
        batches = balanced(train, min(config.batch, len(train)), config.seed)
        texts = _texts(len(neutral), config.batch, config.seed)
        at = {round(config.steps * (n + 1) / config.checks) for n in range(config.checks)}
        looks: list[Look] = []
        with bar(config.steps, f"{config.objective}", "step", config.progress) as shown:
            for step in range(1, config.steps + 1):
                line = self._update(next(batches), neutral, next(texts), optimizer, weights)
                if why := _broken(line):
                    return looks, f"step {step}: {why}"
                schedule.step()
                self.lines.append({"step": step, **line})
                shown.set_postfix_str(f"loss {line['loss']:.3f}, KL {line['kl']:.4f}", refresh=False)
                shown.update()
                if step in at:
                    looks.append(look(step))
        return looks, ""

    def _update(
        self, items: list[Twin], neutral: Neutral, rows: list[int], optimizer: Any, weights: list[Tensor]
    ) -> dict[str, float]:
        config, find = self.config, LOSSES[self.config.objective].loss
        optimizer.zero_grad(set_to_none=True)
        forward = find(self.runner, items, 1.0, config.beta)
        forward.backward()
        line = {"forward": forward.item()}
        if config.both_ways:
            back = find(self.runner, [item.swapped for item in items], -1.0, config.beta)
            back.backward()
            line["backward"] = back.item()
        kl = self._kl(neutral, rows)
        (self.budget.multiplier * kl / self.budget.budget).backward()
        line |= {"kl": kl.item(), "multiplier": self.budget.multiplier}
        line["loss"] = line["forward"] + line.get("backward", 0.0)
        norm = torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        line["gradient"] = float(norm)
        if _broken(line):
            return line
        optimizer.step()
        self.budget.update(line["kl"])
        return line

    def _kl(self, neutral: Neutral, rows: list[int]) -> Tensor:
        inputs = self.model.batch([neutral.encoded[row] for row in rows])
        with torch.no_grad(), self.runner.changed(0.0):
            plain = self.model.run(inputs).logits
        with self.runner.changed(1.0):
            logits = self.model.run(inputs).logits
        return kl_loss(logits, plain, neutral.mask(rows))


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: a linear rise over a tenth, then a linear fall to a tenth."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 1 - 0.9 * (step - rise) / max(1, steps - rise)


def _texts(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    rng = np.random.default_rng([seed, 2])
    while True:
        order = rng.permutation(count).tolist()
        for start in range(0, count, batch):
            yield order[start : start + batch]


def _broken(line: Mapping[str, float]) -> str:
    return next((f"{name} is {value}" for name, value in line.items() if not math.isfinite(value)), "")
