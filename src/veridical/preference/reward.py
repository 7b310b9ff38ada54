"""Pairwise reward models (Bradley and Terry 1952; Ouyang et al. 2022), over TRL's `RewardTrainer`.

The loss is -log sigmoid(r(chosen) - r(rejected) - margin), with the margins of Touvron et al. 2023 where the
data have them. The reward is read at the end-of-sequence token that follows the answer. Training and scoring
share the one tokenisation that puts it there (`data.ended`), so both read the reward of the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from veridical import adapters, models
from veridical.errors import InputError, ModelError
from veridical.preference.config import PreferConfig
from veridical.preference.data import Preference, ended
from veridical.preference.trainers import Start, arguments, load_trained, lora, start
from veridical.tokens import Prompt, pad

KIND = "AutoModelForSequenceClassification"
HEAD = "score"


def trainer(begin: Start, rows: Sequence[Preference], config: PreferConfig, folder: Path) -> Any:
    """A `RewardTrainer` that is ready to run, on rows that are tokenised here.

    The head begins at zero: all rewards are 0 and the first loss is ln 2, or the mean of
    log(1 + exp(margin)).
    """
    import datasets
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    model = fresh(begin)
    adapter = lora(config, model, begin.name, "SEQ_CLS", modules_to_save=[HEAD])
    prompts = [row.prompt for row in rows]
    data: dict[str, list[Any]] = {
        "chosen_ids": ended(begin.tokenizer, prompts, [row.chosen for row in rows]),
        "rejected_ids": ended(begin.tokenizer, prompts, [row.rejected for row in rows]),
    }
    if any(row.margin for row in rows):
        data["margin"] = [row.margin for row in rows]
    options = RewardConfig(**arguments(config, folder, max_length=None, disable_dropout=True))
    return RewardTrainer(
        model=model,  # type: ignore[arg-type]
        args=options,
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=begin.tokenizer,
        peft_config=adapter,
    )


def fresh(begin: Start) -> nn.Module:
    """The starting model with a head of one score, at zero, in place of the unembedding."""
    pad_token = begin.tokenizer.pad_token_id
    model = begin.load(KIND, num_labels=1)
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{begin.name} has no linear head called {HEAD} as a reward model")
    nn.init.zeros_(head.weight)
    model.config.pad_token_id = begin.tokenizer.eos_token_id if pad_token is None else pad_token  # type: ignore[union-attr]
    return model


@dataclass(frozen=True)
class RewardModel:
    """A reward model with the tokenizer that it was trained with.

    Attributes:
        model: Gives one score at each position.
        tokenizer: Its tokenizer.
        name: Where it came from.
    """

    model: nn.Module
    tokenizer: Any
    name: str

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], answers: Sequence[str], batch: int = 64) -> np.ndarray:
        """The reward of each answer [rows], read at the end token behind it; an empty answer is scored too.

        The position is given by the row's own length, so neither padding nor an end token that is also the
        padding can move it.
        """
        from veridical.tokens import encode

        tokenizer = self.tokenizer
        rows = [
            (*item.ids, tokenizer.eos_token_id) for item in encode(tokenizer, list(prompts), list(answers))
        ]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        rewards, device = np.zeros(len(rows)), next(self.model.parameters()).device
        body, head = self.model.base_model, getattr(self.model, HEAD)
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            inputs = pad([rows[row] for row in chosen], tokenizer.eos_token_id, device=device)
            hidden = body(**inputs).last_hidden_state  # type: ignore[operator]
            last = inputs["attention_mask"].sum(1) - 1
            scores = head(hidden[torch.arange(len(chosen), device=device), last])[:, 0]
            rewards[chosen] = scores.double().cpu().numpy()
        return rewards


def load_reward(source: Any, begin: Start | None = None) -> RewardModel:
    """A saved reward model: an embedded name, or a folder of full weights or of a LoRA.

    Args:
        source: Its name or folder; a `RewardModel` is given back.
        begin: The model that a LoRA was trained on, where the folder does not name it.

    Raises:
        InputError: No model there, or one without a head of one score.
    """
    if isinstance(source, RewardModel):
        return source
    folder = Path(models.folder_of(str(source)))
    if adapters.is_adapter(folder):
        if not adapters.scores(folder):
            raise InputError(f"{source} is an adapter for text; expected a reward model")
        base = begin or start(adapters.base_of(folder), folder)
        model, tokenizer = load_trained(folder, base, KIND, num_labels=1), base.tokenizer
    else:
        handle = models.load(str(source), device="cpu", dtype="float32", check=False)
        model, tokenizer = handle.model, handle.tokenizer
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(f"{source} has no head of one score; expected a reward model")
    return RewardModel(model.eval(), tokenizer, str(source))
