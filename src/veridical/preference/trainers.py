"""What every recipe over TRL shares: options that are safe on a CPU, LoRA, checkpoints, the first loss.

TRL's defaults are bf16, gradient checkpointing and telemetry; here training is in float32, nothing is sent.
`DPOTrainer` and its siblings patch the model's `forward`, so what was in memory during training is never
analysed: it is saved and loaded again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical import adapters
from veridical.errors import InputError, ModelError
from veridical.preference.config import Method, PreferConfig, first_losses
from veridical.progress import quiet_datasets, watched

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

STATE = "trainer_state.json"
FIRST_LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Start:
    """The model that training begins at.

    Attributes:
        name: As it was named by whoever asked.
        folder: Folder or hub name of its full weights.
        tokenizer: Its tokenizer.
        context: Its context in tokens; 0 where it does not say.
    """

    name: str
    folder: str
    tokenizer: Any
    context: int

    def load(self, kind: str = "AutoModelForCausalLM", **options: Any) -> nn.Module:
        """A fresh copy of its weights, in float32."""
        import torch
        import transformers

        from veridical.scoring import quiet

        with quiet():
            return getattr(transformers, kind).from_pretrained(
                self.folder, dtype=torch.float32, use_safetensors=True, **options
            )


def start(name: str, out: Path) -> Start:
    """The model called `name`; an adapter is first merged into its base and kept in `out/start`.

    TRL loads references again from the path in the config, where it would find the base without the adapter.

    Raises:
        InputError: No such model, or one that has no tokenizer or gives no text.
    """
    from veridical.models import folder_of, load

    handle = load(str(name), dtype="float32", device="cpu", check=False)
    if handle.kind != "causal" or not handle.generates:
        raise InputError(
            f"{name} is a model of kind {handle.kind!r}; preference training needs one that writes"
        )
    if handle.tokenizer is None:
        raise InputError(f"{name} has no tokenizer")
    folder = folder_of(str(name))
    if Path(folder).is_dir() and adapters.is_adapter(folder):
        folder = str(out / "start")
        handle.model.save_pretrained(folder)  # type: ignore[operator]
        handle.tokenizer.save_pretrained(folder)
    return Start(str(name), folder, handle.tokenizer, handle.context_length or 0)


def arguments(config: PreferConfig, folder: Path, **own: Any) -> dict[str, Any]:
    """Options for any of TRL's configs; `own` are those of the method."""
    import torch

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    shown = watched() if config.progress is None else config.progress
    return {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": config.steps // 10,
        "max_grad_norm": config.max_grad_norm,
        "save_strategy": "steps",
        "save_steps": config.steps // config.checkpoints,
        "logging_steps": 1,
        "report_to": "none",
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": not shown,
        "log_level": "error",
        **own,
    }


def lora(config: PreferConfig, model: nn.Module, base: str, task: str = "CAUSAL_LM", **own: Any) -> Any:
    """The LoRA that the options ask for, or None.

    Raises:
        UnknownNameError: Modules that the model does not have; gives the nearest.
        InputError: Blocks that it does not have.
    """
    if not config.lora_rank:
        return None
    return adapters.lora_config(
        model, config.lora_rank, config.lora_modules, config.lora_layers, base=base, task_type=task, **own
    )


def run(
    trainer: Any, method: Method, config: PreferConfig, folder: Path, margins: Sequence[float] = (0.0,)
) -> list[dict[str, Any]]:
    """Trains to the end, from the last whole checkpoint where there is one; returns the log by step.

    Args:
        trainer: As one of the methods makes it.
        method: Which.
        config: Options.
        folder: Where its checkpoints are.
        margins: Margins of the rows (reward models), for the first loss.

    Raises:
        ModelError: The first loss is not the one that the method has where policy and reference are one, or a
            loss is not finite.
    """
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_guard(first_losses(config, method, margins)))
    done = checkpoints(folder)
    last = done[max(done)] if done else None
    if last is not None and max(done) >= config.steps:
        return json.loads((last / STATE).read_text())["log_history"]
    if last is not None:
        log.info("  goes on at step %d of %d", max(done), config.steps)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return trainer.state.log_history


def checkpoints(folder: Path) -> dict[int, Path]:
    """Whole checkpoints by step, in order; those that a kill left half-written are deleted.

    The Trainer writes its state last, so a checkpoint with a readable state is whole.
    """
    found = {}
    for place in sorted(folder.glob("checkpoint-*"), key=lambda place: int(place.name.split("-")[1])):
        try:
            step = json.loads((place / STATE).read_text(encoding="utf-8"))["global_step"]
        except (OSError, ValueError, KeyError):
            shutil.rmtree(place)
            continue
        found[int(step)] = place
    return found


def load_trained(folder: Path, base: Start, kind: str = "AutoModelForCausalLM", **options: Any) -> nn.Module:
    """What was saved in `folder`, full weights or a LoRA on `base`, as a plain module in evaluation mode."""
    import torch
    import transformers

    from veridical.scoring import quiet

    if adapters.is_adapter(folder):
        model = adapters.merged(base.load(kind, **options), folder)
    else:
        with quiet():
            model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()


def _guard(expected: tuple[float, float] | None) -> Any:
    """Stops a training whose first loss or KL is not the method's, or whose loss is not finite."""
    from transformers import TrainerCallback

    class Guard(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                raise ModelError(f"the loss is {loss} at step {state.global_step}; lower the learning rate")
            if state.global_step == 1 and expected is not None:
                check_first("loss", loss, expected, logs.get("reward_std", 0.0))
                for what, key in (("KL", "kl"), ("margin", "rewards/margins")):
                    check_first(what, logs.get(key, 0.0), (0.0, 0.0))

    return Guard()


def check_first(what: str, value: float, expected: tuple[float, float], scale: float = 0.0) -> None:
    """Refuses a first loss, KL or margin that is not `expected`: another loss, or another reference.

    Raises:
        ModelError: It lies outside by more than a thousandth (of `scale`, where what it is made of is large).
    """
    low, high = expected
    slack = FIRST_LOSS_TOLERANCE * max(1.0, abs(low), scale)
    if not low - slack <= value <= high + slack:
        wanted = f"{low:.4f}" if low == high else f"from {low:.4f} to {high:.4f}"
        raise ModelError(
            f"the first {what} is {value:.4f} and should be {wanted}, as policy and reference are one "
            "before the first update; the trainer runs another loss, or the reference is another model"
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No bars and no warnings of TRL, PEFT and transformers about their own parts, nor of `datasets`."""
    from veridical.scoring import quiet

    with warnings.catch_warnings(), quiet(), quiet_datasets():
        warnings.simplefilter("ignore")
        yield
