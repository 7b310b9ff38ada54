"""SAEs of every architecture with random weights, an exact one and an empty one."""

import torch

from veridical.saes.config import SAEConfig
from veridical.saes.kinds import KINDS, kind

PLAIN = ("relu", "gated", "jumprelu", "topk", "batch_topk", "matryoshka")
EVERY = tuple(KINDS)
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


def random_sae(
    architecture, d_in=12, d_out=None, width=40, k=5, seed=0, scale=1.0, scale_out=None, **options
):
    """An SAE in which nothing is at its initial value: biases, thresholds, decoder norms, scales."""
    if architecture == "crosscoder":
        options.setdefault("sites", ("resid_post.0", "resid_post.1"))
    config = SAEConfig(architecture=architecture, width=width, k=k, **options)
    sae = kind(architecture)(config, d_in, d_out)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sae.named_parameters():
            drawn = torch.randn(value.shape, generator=random)
            if name == "log_threshold":
                drawn = 0.3 * drawn - 1
            elif name.startswith(("b_", "r_")):
                drawn = 0.3 * drawn
            elif name == "W_enc":
                drawn = drawn / value.shape[1] ** 0.5
            value.copy_(drawn)
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.4)
        sae.scale.fill_(scale)
        sae.scale_out.fill_(scale if scale_out is None else scale_out)
    return sae.eval().requires_grad_(False)


def made(architecture, seed=3, **options):
    """A random SAE of 40 latents to train: float64, scales that are not 1, a transcoder's targets 9 wide."""
    d_out = 9 if "transcoder" in architecture else None
    sae = random_sae(
        architecture, D, d_out, seed=seed, scale=0.7, scale_out=1.3 if d_out else 0.7,
        **{**CONFIGS[architecture], **options},
    )  # fmt: skip
    sae.variance.fill_(9.0)
    return sae.double().train().requires_grad_(True)


def exact_sae(d, site=None):
    """An SAE whose output is its input, bit for bit: each dimension and its negative, by ReLU."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    return _relu(both, both, site)


def empty_sae(d, site=None):
    """An SAE whose output is zero."""
    return _relu(torch.zeros(2 * d, d), torch.zeros(2 * d, d), site)


def _relu(W_enc, W_dec, site):
    sae = kind("relu")(SAEConfig(architecture="relu", width=len(W_enc), site=site), W_enc.shape[1])
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae.eval().requires_grad_(False)


def vectors(rows, d, seed=1, dtype=torch.float32):
    """Rows around a mean that is not 0."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, d, generator=random, dtype=torch.float64) + 0.3).to(dtype)
