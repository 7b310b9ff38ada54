"""SAEs of every architecture with weights that are nothing special."""

import torch

from veridical.saes import SAEConfig
from veridical.saes.kinds import kind

D = 12
CONFIGS = {
    "relu": {"sparsity": 0.3},
    "gated": {"sparsity": 0.3},
    "jumprelu": {"sparsity": 0.2, "bandwidth": 0.4},
    "topk": {"k": 5},
    "batch_topk": {"k": 5},
    "matryoshka": {"k": 5, "prefixes": (7, 20, 40)},
    "transcoder": {"k": 5, "site": "resid_pre.0", "target_site": "mlp_out.0", "skip": True},
    "jumprelu_transcoder": {
        "sparsity": 0.2,
        "bandwidth": 0.4,
        "site": "resid_pre.0",
        "target_site": "mlp_out.0",
        "skip": True,
    },
    "crosscoder": {"k": 5, "sites": ("resid_post.0", "resid_post.1", "resid_post.2")},
}


def config(architecture, **options):
    return SAEConfig(architecture=architecture, width=40, **{**CONFIGS[architecture], **options})


def jittered(sae, seed=3):
    """Weights that differ in every entry, scales that are not 1, float64."""
    random = torch.Generator().manual_seed(seed)
    sae = sae.double()
    with torch.no_grad():
        for value in sae.parameters():
            value += 0.2 * torch.randn(value.shape, generator=random, dtype=torch.float64)
        sae.scale.fill_(0.7)
        sae.scale_out.fill_(0.7 if sae.d_in == sae.d_out else 1.3)
        sae.variance.fill_(9.0)
    return sae


def made(architecture, seed=3, **options):
    """One SAE of 40 latents, jittered."""
    d_out = 9 if "transcoder" in architecture else None
    return jittered(kind(architecture)(config(architecture, **options), D, d_out), seed)
