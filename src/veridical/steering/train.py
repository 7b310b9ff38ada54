"""Training an adapter on internals under a KL budget: data, updates, looks, and which state is kept."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.adapters import lora_config
from veridical.config import build, to_dict
from veridical.errors import NonFiniteError, unknown
from veridical.progress import bar
from veridical.steering import representation
from veridical.steering.adapter_config import AdapterConfig
from veridical.steering.constraint import Budget
from veridical.steering.lora import LoRA, lora_of, put_on
from veridical.steering.material import Material, material
from veridical.steering.neutral import Neutral, NeutralMeter, kl_loss, plainly
from veridical.steering.runner import Runner, lora_scaled
from veridical.steering.twins import Twin, balanced

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.sites import Site
    from veridical.steering.adapter import Adapter

log = logging.getLogger(__name__)

LOOKED = 48
"""Validation pairs, and rows of neutral text, at a look."""
LOSSES: dict[str, Any] = {"representation": representation}


def train_adapter(
    model: Any,
    pairs: Pairs,
    config: AdapterConfig | None = None,
    *,
    neutral: Any = None,
    store: str | Path | None = None,
    **options: Any,
) -> Adapter:
    """Trains a LoRA that moves a behaviour within a KL budget on neutral text, and measures what it does.

    The model is afterwards as it was. A training whose loss is no number ends with the last good state; one
    that does not keep to the budget ends with the best state, scaled down until it does, and says so in its
    report.

    Args:
        model: A handle, or what `veridical.load` takes.
        pairs: Labelled pairs: questions with options under two prompts, or prompts with two completions.
        config: Options; `options` win.
        neutral: Text on which nothing should change: texts, chats that end with an answer, or `Pairs` with
            completions. For an embedded organism its own rows where not given.
        store: Folder that the adapter is saved in, with its proof; called again with the same model, data and
            options, it is read from there.
        **options: Fields of `AdapterConfig`.

    Raises:
        DataError: Nothing to learn: no pair shows the behaviour; gives the yield.
        UnknownNameError: Modules or sites that the model does not have.
        NonFiniteError: The loss was no number before the first look.
        StoreMismatchError: `store` holds an adapter of something else.
    """
    from veridical.models import load
    from veridical.steering.export import stored
    from veridical.steering.results import judged

    config = build(AdapterConfig, config, **options)
    if config.objective not in LOSSES:
        raise unknown("objective of an adapter", config.objective, LOSSES)
    model = load(model)
    asked = {
        "model": str(model.path),
        "model_fingerprint": model.fingerprint(),
        "data": pairs.name,
        "data_fingerprint": pairs.fingerprint,
        "options": {name: value for name, value in to_dict(config).items() if name != "progress"},
    }
    if store is not None and (found := stored(Path(store), asked)) is not None:
        return found
    sites = model.resolve(config.sites)
    lora = lora_config(model.model, config.rank, config.modules, config.layers, base=str(model.path))
    data = material(model, pairs, config, neutral)
    began = time.perf_counter()
    trained = fit(model, data, config, lora, sites)
    facts = {**asked, "seconds": time.perf_counter() - began, "trained": len(data.train)}
    adapter = judged(model, data, config, trained, facts)
    if store is not None:
        adapter.save(store, model)
    return adapter


@dataclass(frozen=True)
class Trained:
    """What a training ended with.

    Attributes:
        lora: The chosen state.
        looks: All looks.
        chosen: The look that `lora` is of.
        lines: Losses, KL and multiplier of every step.
        stopped: Why it ended early; "" if it did not.
    """

    lora: LoRA
    looks: list[Look]
    chosen: Look
    lines: list[dict[str, float]]
    stopped: str


def fit(model: HookedModel, data: Material, config: AdapterConfig, lora: Any, sites: Sequence[Site]) -> Trained:
    """The updates; the model is afterwards as it was."""
    from peft import get_peft_model_state_dict

    loss = LOSSES[config.objective]
    loss.check(data.train)
    val = data.val[:: max(1, len(data.val) // LOOKED)][:LOOKED]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        with put_on(model.model, lora) as adapted:
            runner = Runner(model, sites, lambda strength: lora_scaled(adapted, strength))
            meter = NeutralMeter(model, data.neutral["val"])
            with runner.changed(0.0):
                meter(plainly)

            def look(step: int) -> Look:
                state = {n: v.detach().cpu().clone() for n, v in get_peft_model_state_dict(adapted).items()}
                with torch.no_grad():
                    return Look(step, *_margins(runner, val), meter(lambda: runner.changed(1.0)).kl.value, state)

            training = Training(model, runner, config, Budget(config.kl_budget))
            weights = [p for p in adapted.parameters() if p.requires_grad]
            looks, stopped = training.run(data.train, data.neutral["train"], weights, look)
    if not looks:
        raise NonFiniteError(f"{stopped}, before there was a good state to keep; lower the learning rate")
    if stopped:
        log.warning("training ended at %s; the state of step %d is kept", stopped, looks[-1].step)
    chosen = choose(looks, config.kl_budget)
    return Trained(lora_of(lora, chosen.state), looks, chosen, training.lines, stopped)


def choose(looks: Sequence[Look], budget: float) -> Look:
    """The look within the budget that shows the behaviour least, at equal shares by the largest margin; where
    none is within the budget, of all."""
    return min([item for item in looks if item.kl <= budget] or looks, key=lambda item: (item.shown, -item.margin))


def _margins(runner: Runner, items: Sequence[Twin]) -> tuple[float, float]:
    """Share of contrasts whose unwanted answer is likelier at strength 1, and the mean margin."""
    prompts = [item.source for item in items]
    wanted, _ = runner.logprobs(runner.tokens(prompts, [item.wanted for item in items]), 1.0)
    unwanted, _ = runner.logprobs(runner.tokens(prompts, [item.unwanted for item in items]), 1.0)
    return float((unwanted > wanted).double().mean()), float((wanted - unwanted).mean())


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
        runner: Passes.
        config: Options.
        budget: The constraint.
    """

    model: HookedModel
    runner: Runner
    config: AdapterConfig
    budget: Budget
    lines: list[dict[str, float]] = field(default_factory=list)

    def run(
        self, train: Sequence[Twin], neutral: Neutral, weights: list[Tensor], look: Callable[[int], Look]
    ) -> tuple[list[Look], str]:
        """Updates to the end; returns the looks, and why it ended early ("" if it did not)."""
        config = self.config
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
