"""The options of a comparison. Nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from veridical.config import STRICT, Count, Seed


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CompareConfig:
    """What is measured of a policy and its reference, and on how much text."""

    label: str = "label"
    """Label column of two classes, whose direction is compared in both models, where there is one."""
    samples: int = 64
    """Prompts that the policy answers by sampling, for the KL on its own samples; 0 leaves that out."""
    max_new_tokens: Count = 32
    """Tokens of a sampled answer at most."""
    temperature: float = 1.0
    """Temperature of the samples. Only at 1 does their mean KL estimate the KL that training penalises."""
    lens_tokens: Count = 2
    """Tokens of each text, drawn at random, at which every layer is unembedded."""
    behaviour_pairs: int = 100
    """Pairs, drawn with the seed, on which answers are scored and generated; 0 leaves that out."""
    crosscoder: str | None = None
    """Site at which a crosscoder is trained on both models, and on the reference against itself; none when
    not given."""
    crosscoder_tokens: Count = 20000
    """Tokens that the crosscoder is trained and judged on, drawn in the pass."""
    crosscoder_passes: Count = 10
    """Passes over them."""
    crosscoder_width: int | None = None
    """Latents of the crosscoder; four times the width of the site when not given."""
    crosscoder_k: Count = 16
    """Latents that are active for one token on average."""
    where: int = 24
    """Prompts on which the models are patched into each other (layer, position, head); 0 leaves that out."""
    weights: bool = True
    """Compare the weights, where both have the same."""
    bootstrap: Count = 200
    """Poisson resamples of whole pairs for the 95 % intervals."""
    batch_tokens: Count = 1024
    """Tokens in one batch, padding included; logits of both models are held for as many at once."""
    max_length: int | None = None
    """Longest row in tokens; the models' context when not given."""
    on_long: Literal["error", "truncate"] = "error"
    """What to do with a row over max_length."""
    seed: Seed = 0
    """Seed of samples, resamples and drawn tokens."""
    progress: bool | None = None
    """Progress bars; by default only on a terminal or in a notebook."""
