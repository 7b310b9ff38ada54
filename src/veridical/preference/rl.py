"""Reinforcement learning with a KL penalty to the frozen reference, over TRL's `RLOOTrainer`.

REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740): every prompt gets several sampled answers,
each judged against the mean reward of its siblings. The reward is the reward model's less beta times the
log-ratio of policy to reference, summed over the answer. TRL no longer has PPO. The reference is the model
that training begins at: with full weights a second copy loaded from the same folder, with a LoRA the weights
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from veridical.errors import ModelError
from veridical.preference.config import PreferConfig
from veridical.preference.data import Preference
from veridical.preference.trainers import Start, arguments, lora
from veridical.tokens import Prompt

Score = Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]
"""Prompts and answers to rewards [rows]."""


def trainer(
    begin: Start, rows: Sequence[Preference], config: PreferConfig, folder: Path, score: Score
) -> Any:
    """An `RLOOTrainer` that is ready to run. Answers are drawn from the whole distribution, temperature 1."""
    import datasets
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    policy = begin.load()
    options = RLOOConfig(
        **arguments(
            config,
            folder,
            beta=config.beta,
            num_generations=config.generations,
            max_completion_length=config.max_new_tokens,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            disable_dropout=True,
        )
    )
    return RLOOTrainer(
        model=policy,  # type: ignore[arg-type]
        reward_funcs=rewarding(score),  # type: ignore[arg-type]
        args=options,
        train_dataset=datasets.Dataset.from_list([{"prompt": row.prompt} for row in rows]),
        processing_class=begin.tokenizer,
        peft_config=lora(config, policy, begin.name),
    )


def rewarding(score: Score) -> Callable[..., list[float]]:
    """`score` as TRL calls it; answers arrive as texts or as one assistant message.

    Raises:
        ModelError: A reward that is not finite.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        answers = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        rewards = np.asarray(score(list(prompts), answers), dtype=np.float64)
        if rewards.shape != (len(answers),) or not np.isfinite(rewards).all():
            raise ModelError(
                f"the reward gave {rewards[:4]} for {len(answers)} answers; expected finite numbers"
            )
        return rewards.tolist()

    return reward
