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

from veridical.config import build, to_dict
from veridical.errors import NonFiniteError
from veridical.progress import bar
from veridical.provenance import fingerprint as digest
from veridical.steering.adapter_config import AdapterConfig
from veridical.steering.constraint import Budget
from veridical.steering.lora import LoRA
from veridical.steering.material import Material, material
from veridical.steering.neutral import Neutral, NeutralMeter, kl_loss, plainly
from veridical.steering.objectives import Loss, loss_of, sites_of, trainable
from veridical.steering.reft import ReFT
from veridical.steering.rerouting import retained
from veridical.steering.runner import Runner
from veridical.steering.twins import Twin, balanced

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.sites import Site
    from veridical.steering.adapter import Adapter

log = logging.getLogger(__name__)

Some = tuple[Neutral, list[int]]
"""Some rows of neutral text."""
LOOKED = 48
"""Validation pairs, and rows of neutral text, at a look."""


def train_adapter(
    model: Any,
    pairs: Pairs,
    config: AdapterConfig | None = None,
    *,
    neutral: Any = None,
    kept: Any = None,
    vector: Any = None,
    store: str | Path | None = None,
    **options: Any,
) -> Adapter:
    """Trains a LoRA that moves a behaviour within a KL budget on neutral text, and measures what it does.

    The model is afterwards as it was. A training whose loss is no number ends with the last good state; one
    that does not keep to the budget ends with the best state, scaled down until it does, and says so in its
    report. A training takes about a minute on the organism and is not resumed: killed, it begins again.

    Args:
        model: A handle, or what `veridical.load` takes.
        pairs: Labelled pairs: questions with options under two prompts, or prompts with two completions.
        config: Options; `options` win.
        neutral: Text on which nothing should change: texts, chats that end with an answer, or `Pairs` with
            completions. For an embedded organism its own rows where not given.
        kept: Likewise text of other behaviour, which training holds still too; not part of the budget.
        vector: For distil_vector: a `SteeringVector` that adds, or a mapping from site to `[d]`.
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
    model = load(model)
    asked = {
        "model": str(model.path),
        "model_fingerprint": model.fingerprint(),
        "data": pairs.name,
        "data_fingerprint": pairs.fingerprint,
        "texts": [_mark(neutral), _mark(kept), _mark(getattr(vector, "vectors", vector))],
        "options": {name: value for name, value in to_dict(config).items() if name != "progress"},
    }
    if store is not None and (found := stored(Path(store), asked)) is not None:
        return found
    loss = loss_of(config, model, vector)
    sites = sites_of(config, model, loss)
    data = material(model, pairs, config, neutral, kept)
    loss.check(data.train)
    began = time.perf_counter()
    trained = fit(model, data, config, loss, sites)
    facts = {**asked, "seconds": time.perf_counter() - began, "trained": len(data.train)}
    adapter = judged(model, data, config, trained, facts)
    if store is not None:
        adapter.save(store, model)
    return adapter


def _mark(given: Any) -> str | None:
    """A digest of texts or vectors that a training was given."""
    if given is None:
        return None
    if hasattr(given, "fingerprint"):
        return str(given.fingerprint)
    if isinstance(given, Mapping):
        return digest([f"{name} {np.asarray(value).tolist()}" for name, value in given.items()])
    return digest([repr(given)])


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

    lora: LoRA | ReFT
    looks: list[Look]
    chosen: Look
    lines: list[dict[str, float]]
    stopped: str


def fit(
    model: HookedModel, data: Material, config: AdapterConfig, loss: Loss, sites: Sequence[Site]
) -> Trained:
    """The updates; the model is afterwards as it was."""
    val = data.val[:: max(1, len(data.val) // LOOKED)][:LOOKED]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        with trainable(model, config, sites) as change:
            runner = Runner(model, sites, change.changed)
            meter = NeutralMeter(model, data.neutral["val"])
            with runner.changed(0.0):
                meter(plainly)

            def look(step: int) -> Look:
                with torch.no_grad():
                    turned = [item.swapped for item in val]
                    back = _margins(runner, turned, -1.0)[0] if config.both_ways else 0.0
                    kl = meter(lambda: runner.changed(1.0)).kl.value
                    return Look(step, *_margins(runner, val, 1.0), back, kl, change.state())

            training = Training(model, runner, config, loss, Budget(config.kl_budget))
            looks, stopped = training.run(data, change.weights, look)
    if not looks:
        raise NonFiniteError(f"{stopped}, before there was a good state to keep; lower the learning rate")
    if stopped:
        log.warning("training ended at %s; the state of step %d is kept", stopped, looks[-1].step)
    chosen = choose(looks, config.kl_budget)
    return Trained(change.done(chosen.state), looks, chosen, training.lines, stopped)


def choose(looks: Sequence[Look], budget: float) -> Look:
    """The look within the budget that moves most pairs both ways, at equal shares that with the lowest KL;
    where none is within the budget, of all."""
    return min(
        [item for item in looks if item.kl <= budget] or looks,
        key=lambda item: (item.shown + item.short, item.kl),
    )


def _margins(runner: Runner, items: Sequence[Twin], strength: float) -> tuple[float, float]:
    """Share of contrasts whose unwanted answer is likelier at a strength, and the mean margin."""
    prompts = [item.source for item in items]
    wanted, _ = runner.logprobs(runner.tokens(prompts, [item.wanted for item in items]), strength)
    unwanted, _ = runner.logprobs(runner.tokens(prompts, [item.unwanted for item in items]), strength)
    return float((unwanted > wanted).double().mean()), float((wanted - unwanted).mean())


@dataclass(frozen=True)
class Look:
    """One look at the training.

    Attributes:
        step: After how many updates.
        shown: Share of validation pairs in which the unwanted answer is likelier than the wanted one.
        margin: Mean log p of the wanted answer less that of the unwanted one, nats.
        short: At strength -1, share of pairs the other way round in which the model does not yet move; 0
            where
            negative strengths are not trained.
        kl: On validation neutral text, nats a token.
        state: The weights then.
    """

    step: int
    shown: float
    margin: float
    short: float
    kl: float
    state: Mapping[str, Tensor] = field(repr=False)


@dataclass
class Training:
    """One training.

    Args:
        model: The handle.
        runner: Passes.
        config: Options.
        loss: What is trained for.
        budget: The constraint.
    """

    model: HookedModel
    runner: Runner
    config: AdapterConfig
    loss: Loss
    budget: Budget
    lines: list[dict[str, float]] = field(default_factory=list)

    def run(
        self, data: Material, weights: list[Tensor], look: Callable[[int], Look]
    ) -> tuple[list[Look], str]:
        """Updates to the end; returns the looks, and why it ended early ("" if it did not)."""
        config = self.config
        optimizer = torch.optim.AdamW(
            weights, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, config.steps))
        batches = balanced(data.train, min(config.batch, len(data.train)), config.seed)
        texts = self._rows(data.neutral["train"], 2)
        still = None if data.kept is None else self._rows(data.kept, 4)
        at = {round(config.steps * (n + 1) / config.checks) for n in range(config.checks)}
        looks: list[Look] = []
        with bar(config.steps, f"{config.objective}", "step", config.progress) as shown:
            for step in range(1, config.steps + 1):
                line = self._update(
                    next(batches), next(texts), None if still is None else next(still), optimizer, weights
                )
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
        self, items: list[Twin], texts: Some, still: Some | None, optimizer: Any, weights: list[Tensor]
    ) -> dict[str, float]:
        config, find = self.config, self.loss.loss
        optimizer.zero_grad(set_to_none=True)
        forward = find(self.runner, items, 1.0, config.beta)
        forward.backward()
        line = {"forward": forward.item()}
        if config.both_ways:
            back = find(self.runner, [item.swapped for item in items], -1.0, config.beta)
            back.backward()
            line["backward"] = back.item()
        kl = self._kl(*texts)
        weight = self.budget.multiplier / self.budget.budget
        (weight * kl).backward()
        line |= {"kl": kl.item(), "multiplier": self.budget.multiplier}
        if still is not None:
            other, moved = self._still(*still)
            (weight * other + config.retain * moved).backward()
            line |= {"kept": other.item(), "moved": moved.item()}
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

    def _still(self, neutral: Neutral, rows: list[int]) -> tuple[Tensor, Tensor]:
        """KL and the relative change of the states on text of other behaviour."""
        inputs = self.model.batch([neutral.encoded[row] for row in rows])
        with torch.no_grad(), self.runner.changed(0.0):
            plain = self.model.run(inputs, read=self.runner.sites)
        with self.runner.changed(1.0):
            ours = self.model.run(inputs, read=self.runner.sites)
        states, before = (
            torch.stack([run.values[site.name] for site in self.runner.sites]) for run in (ours, plain)
        )
        moved = retained(states, before, inputs["attention_mask"].bool())
        return kl_loss(ours.logits, plain.logits, neutral.mask(rows)), moved

    def _rows(self, neutral: Neutral, stream: int) -> Iterator[Some]:
        """Endless batches of neutral rows, each row once before any comes again."""
        rng, count = np.random.default_rng([self.config.seed, stream]), max(1, self.config.batch // 2)
        while True:
            order = rng.permutation(len(neutral)).tolist()
            for start in range(0, len(neutral), count):
                yield neutral, order[start : start + count]


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: a linear rise over a tenth, then a linear fall to a tenth."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 1 - 0.9 * (step - rise) / max(1, steps - rise)


def _broken(line: Mapping[str, float]) -> str:
    return next((f"{name} is {value}" for name, value in line.items() if not math.isfinite(value)), "")
