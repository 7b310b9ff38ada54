"""Steering: small changes of what a model represents, with what they do to its behaviour measured.

`neutral` has the text on which nothing should change, and the exact KL there; `behaviour` what a model does,
row by row. `vectors` is what is added to activations or erased from them, found by `directions`, at a
strength that `calibrate` sets, under the conditions of a `gate`; it is kept by `vector_files`, and handed on
as a control vector (`gguf`) or as biases (`merging`). `baselines` are what every intervention is compared
with, in one table that `evaluate` (in `evaluating`) makes and `evaluation` holds, with `fluency` and
`side_effects`. `propose` (in `choose`) says what to edit and why; `proposal` holds it.

`train_adapter` in `train` makes a LoRA from `material`: pairs as `twins`, and neutral text. What it is
trained for is one of `objectives`, each a file of its own, over the passes of a `runner` and under the
`constraint` of a KL budget; `results` judges it (with the `dial`), `adapter` is the result. `lora` puts a
LoRA on a model that stays as it was, `export` saves one with its `proof` from a fresh process, and
`combine` adds several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.steering.adapter import Adapter, AdapterReport
    from veridical.steering.adapter_config import AdapterConfig
    from veridical.steering.baselines import FewShot, Nothing, Prompt, engineered_prompt, random_like
    from veridical.steering.behaviour import Behaviour, Target, target_of
    from veridical.steering.choose import propose
    from veridical.steering.combine import merge
    from veridical.steering.evaluating import PerSeed, evaluate
    from veridical.steering.evaluation import Evaluation
    from veridical.steering.export import push_adapter
    from veridical.steering.neutral import NeutralKL, NeutralMeter, kl_loss, neutral_kl, neutral_texts
    from veridical.steering.proposal import Proposal
    from veridical.steering.train import train_adapter
    from veridical.steering.vectors import SteeringVector

_HOME = {
    "Adapter": "adapter",
    "AdapterConfig": "adapter_config",
    "AdapterReport": "adapter",
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
    "merge": "combine",
    "neutral_kl": "neutral",
    "neutral_texts": "neutral",
    "push_adapter": "export",
    "propose": "choose",
    "random_like": "baselines",
    "target_of": "behaviour",
    "train_adapter": "train",
}
__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterReport",
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
    "merge",
    "neutral_kl",
    "neutral_texts",
    "propose",
    "push_adapter",
    "random_like",
    "target_of",
    "train_adapter",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
