"""Sparse autoencoders: one file per architecture, one trainer for many over one stream of activations.

`config` says what one SAE is, `base` is what all share, `kinds` their names: `relu`, `gated`, `jumprelu` pay
a penalty for active latents; `topk`, `batch_topk`, `matryoshka`, `transcoder`, `crosscoder` keep a number of
them and train sparsely (`sparse`, over `kernels`), with `auxk` for their dead latents.

`train_saes` in `trainer` steps members of like shape as one (`group`), over vectors from a store, tensors, an
iterator (`stream`) or a running model (`model_stream`), with exact resume (`checkpoint`); `measure` gives
figures on held-out vectors, `runs` is what comes back. `sweep_saes` in `sweep` cancels bad members early by
the rules of `halving`, here or over a cluster (`ray_engine`); `tracking` sends figures to trackio or wandb.
`exclusive` checks a crosscoder's exclusive latents.

`saved` keeps an SAE as a SAELens folder, `formats` read those of other libraries. `evaluate` judges one on
held-out rows (`held_out`) beside dictionaries that know nothing (`baselines`), and inside the model (`loss`,
`splice`, which also steers, clamps and ablates features); `mcc` against planted features, `sparse_probing`
and `absorption` against labels. `features` lists what each latent fires on (`feature_pages`,
`logit_effects`), `separate` those that tell two labels or two models apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.saes.absorption import Absorption, measure_absorption
    from veridical.saes.base import SAE
    from veridical.saes.config import SAEConfig
    from veridical.saes.evaluate import evaluate_sae
    from veridical.saes.evaluation import Evaluation, frontier
    from veridical.saes.exclusive import LatentScaling, latent_scaling
    from veridical.saes.features import FeatureTable, feature_table
    from veridical.saes.formats import (
        from_dictionary_learning,
        from_saelens,
        from_sparsify,
        pull_sae,
        push_sae,
        to_saelens,
    )
    from veridical.saes.logit_effects import top_tokens
    from veridical.saes.mcc import Matching, match_features
    from veridical.saes.origin import SAEOrigin
    from veridical.saes.runs import SAERuns
    from veridical.saes.saved import load_sae, save_sae
    from veridical.saes.separate import Separation, separate_labels, separate_models
    from veridical.saes.sparse_probing import SparseProbing, sparse_probes
    from veridical.saes.splice import ablate, clamp, spliced, steer
    from veridical.saes.sweep import sweep_saes
    from veridical.saes.sweep_config import SweepConfig
    from veridical.saes.swept import SAESweep
    from veridical.saes.trainer import train_saes

_HOME = {
    "SAE": "base",
    "Absorption": "absorption",
    "Evaluation": "evaluation",
    "FeatureTable": "features",
    "LatentScaling": "exclusive",
    "Matching": "mcc",
    "SAEConfig": "config",
    "SAEOrigin": "origin",
    "SAERuns": "runs",
    "SAESweep": "swept",
    "Separation": "separate",
    "SparseProbing": "sparse_probing",
    "SweepConfig": "sweep_config",
    "ablate": "splice",
    "clamp": "splice",
    "evaluate_sae": "evaluate",
    "feature_table": "features",
    "from_dictionary_learning": "formats",
    "from_saelens": "formats",
    "from_sparsify": "formats",
    "frontier": "evaluation",
    "latent_scaling": "exclusive",
    "load_sae": "saved",
    "match_features": "mcc",
    "measure_absorption": "absorption",
    "pull_sae": "formats",
    "push_sae": "formats",
    "save_sae": "saved",
    "separate_labels": "separate",
    "separate_models": "separate",
    "sparse_probes": "sparse_probing",
    "spliced": "splice",
    "steer": "splice",
    "sweep_saes": "sweep",
    "to_saelens": "formats",
    "top_tokens": "logit_effects",
    "train_saes": "trainer",
}
__all__ = [
    "SAE",
    "Absorption",
    "Evaluation",
    "FeatureTable",
    "LatentScaling",
    "Matching",
    "SAEConfig",
    "SAEOrigin",
    "SAERuns",
    "SAESweep",
    "Separation",
    "SparseProbing",
    "SweepConfig",
    "ablate",
    "clamp",
    "evaluate_sae",
    "feature_table",
    "from_dictionary_learning",
    "from_saelens",
    "from_sparsify",
    "frontier",
    "latent_scaling",
    "load_sae",
    "match_features",
    "measure_absorption",
    "pull_sae",
    "push_sae",
    "save_sae",
    "separate_labels",
    "separate_models",
    "sparse_probes",
    "spliced",
    "steer",
    "sweep_saes",
    "to_saelens",
    "top_tokens",
    "train_saes",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
