"""Direct preference optimisation and IPO, over TRL's `DPOTrainer`.

With h = (log pi - log ref)(chosen) - (log pi - log ref)(rejected), the loss of DPO is -log sigmoid(beta h)
(Rafailov et al. 2023, arXiv 2305.18290), that of IPO (h - 1 / (2 tau))^2 (Azar et al. 2023, arXiv
2310.12036).
TRL's IPO takes each log-probability per token of the answer, as IPO's authors do, so its tau is not on DPO's
scale. Both lower the likelihood of the chosen answer too where that lowers the rejected one's more, and
break long answers first; `sft_weight` adds the chosen answers' own loss against that (RPO, Pang et al. 2024,
arXiv 2404.19733).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from veridical.preference.config import PreferConfig
from veridical.preference.data import Preference, conversational
from veridical.preference.trainers import Start, arguments, lora

LOSSES = {"dpo": "sigmoid", "ipo": "ipo"}


def trainer(
    begin: Start,
    rows: Sequence[Preference],
    config: PreferConfig,
    folder: Path,
    method: Literal["dpo", "ipo"],
) -> Any:
    """A `DPOTrainer` that is ready to run.

    The reference is a second copy of the starting weights, loaded from the same folder; for a LoRA, the same
    weights with the LoRA switched off.
    """
    import datasets
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    policy = begin.load()
    adapter = lora(config, policy, begin.name)
    options = DPOConfig(
        **arguments(
            config,
            folder,
            beta=config.beta,
            loss_type=[LOSSES[method], *(["sft"] if config.sft_weight else [])],
            loss_weights=[1.0, *([config.sft_weight] if config.sft_weight else [])],
            max_length=None,
            disable_dropout=True,
        )
    )
    return DPOTrainer(
        model=policy,  # type: ignore[arg-type]
        ref_model=None if adapter is not None else begin.load(),  # type: ignore[arg-type]
        args=options,
        train_dataset=datasets.Dataset.from_list(conversational(rows)),
        processing_class=begin.tokenizer,
        peft_config=adapter,
    )
