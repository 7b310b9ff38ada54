"""Supervised fine-tuning on the chosen answers, over TRL's `SFTTrainer`: the loss is on the answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veridical.preference.config import PreferConfig
from veridical.preference.data import Preference, conversational
from veridical.preference.trainers import Start, arguments, lora


def trainer(begin: Start, rows: Sequence[Preference], config: PreferConfig, folder: Path) -> Any:
    """An `SFTTrainer` that is ready to run; nothing is packed, cut or dropped."""
    import datasets
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    policy = begin.load()
    adapter = lora(config, policy, begin.name)
    options = SFTConfig(
        **arguments(config, folder, max_length=None, packing=False, completion_only_loss=True)
    )
    data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in conversational(rows)]
    return SFTTrainer(
        model=policy,  # type: ignore[arg-type]
        args=options,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=begin.tokenizer,
        peft_config=adapter,
    )
