"""Steering: small changes of what a model represents, with what they do to its behaviour measured.

`neutral` has the text on which nothing should change, and the exact KL there; `behaviour` what a model does,
row by row. `vectors` is what is added to activations or erased from them, found by `directions`, at a
strength that `calibrate` sets, under the conditions of a `gate`; it is kept by `vector_files`, and handed on
as a control vector (`gguf`) or as biases (`merging`). `baselines` are what every intervention is compared
with, in one table that `evaluate` (in `evaluating`) makes and `evaluation` holds, with `fluency` and
`side_effects`. `propose` (in `choose`) says what to edit and why; `proposal` holds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.steering.baselines import FewShot, Nothing, Prompt, engineered_prompt, random_like
    from veridical.steering.behaviour import Behaviour, Target, target_of
    from veridical.steering.choose import propose
    from veridical.steering.evaluating import PerSeed, evaluate
    from veridical.steering.evaluation import Evaluation
    from veridical.steering.neutral import NeutralKL, NeutralMeter, kl_loss, neutral_kl, neutral_texts
    from veridical.steering.proposal import Proposal
    from veridical.steering.vectors import SteeringVector

_HOME = {
    "Behaviour": "behaviour",
    "Evaluation": "evaluation",
    "FewShot": "baselines",
    "NeutralKL": "neutral",
    "NeutralMeter": "neutral",
    "Nothing": "baselines",
    "PerSeed": "evaluating",
    "Prompt": "baselines",
    "Proposal": "proposal",
    "SteeringVector": "vectors",
    "Target": "behaviour",
    "engineered_prompt": "baselines",
    "evaluate": "evaluating",
    "kl_loss": "neutral",
    "neutral_kl": "neutral",
    "neutral_texts": "neutral",
    "propose": "choose",
    "random_like": "baselines",
    "target_of": "behaviour",
}
__all__ = [
    "Behaviour",
    "Evaluation",
    "FewShot",
    "NeutralKL",
    "NeutralMeter",
    "Nothing",
    "PerSeed",
    "Prompt",
    "Proposal",
    "SteeringVector",
    "Target",
    "engineered_prompt",
    "evaluate",
    "kl_loss",
    "neutral_kl",
    "neutral_texts",
    "propose",
    "random_like",
    "target_of",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
