"""A steering vector as a bias: a plain model that needs no hooks, where that is exact.

What is added to the residual stream behind a block at every token is a bias of the block's last projection,
where nothing stands between that projection and the stream. A model whose projections have no biases gets
them where its config has a switch for them (`mlp_bias` of Llama), with zeros elsewhere. Every other case is
refused, and what was made is compared with the hooks before it is handed out.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veridical.architectures import inner
from veridical.errors import InputError, ModelError
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.steering.vectors import SteeringVector

SWITCHES = {"resid_post": ("mlp_bias",), "mlp_out": ("mlp_bias",), "resid_mid": ("attention_bias",),
            "attn_out": ("attention_bias",)}  # fmt: skip
"""Names of the switches in a config that give the projection behind each kind of site a bias."""
INPUTS = {"resid_post": "mlp_post", "mlp_out": "mlp_post", "resid_mid": "z", "attn_out": "z"}
"""The site that is the input of that projection."""
CLOSE = 1e-3
"""Largest difference of log-probabilities to the hooked model, in float32; rounding is far below."""


def merged(vector: SteeringVector, model: HookedModel, strength: float = 1.0) -> nn.Module:
    """A copy of the model with the vector in its biases.

    `save_pretrained` of what comes back writes a folder that plain transformers loads, without custom code.

    Args:
        vector: One that adds, at every token, without a gate.
        model: A transformers model.
        strength: Factor.

    Raises:
        InputError: A vector or a model for which there is no exact bias.
        ModelError: The copy does not give what the hooks give.
    """
    if vector.erasers or vector.gate is not None or vector.positions != "all":
        raise InputError("a bias acts at every token alike: erasers, gates and choices of tokens are none")
    with vector(model, strength):  # checks that it belongs here
        pass
    plain = _with_biases(model, {_site(model, site).kind for site in vector.vectors})
    from veridical.models import load

    handle = load(plain, tokenizer=model.tokenizer, check=False)
    with torch.no_grad():
        for site, added in vector.vectors.items():
            bias = _projection(handle, _site(handle, site)).bias
            bias += torch.as_tensor(added * strength).to(bias)
    _compare(vector, model, handle, strength)
    return plain


def _site(model: HookedModel, name: str) -> Site:
    (site,) = model.resolve(name)
    if site.kind not in INPUTS:
        raise InputError(f"a vector at {name} is no bias; resid_post, resid_mid, mlp_out and attn_out can be")
    return site


def _projection(model: HookedModel, site: Site) -> Any:
    """The last projection before the site; one that has no bias is refused."""
    source = Site(INPUTS[site.kind], site.layer)
    place = model.architecture.places.get(source)
    if place is None or not hasattr(place.module, "weight"):
        raise InputError(f"{model.path} has no single projection before {site}, so no bias is exact there")
    if getattr(place.module, "bias", None) is None:
        raise InputError(
            f"the projection before {site} has no bias in {model.architecture.model_type}, and its config "
            "has no switch for one; save a GGUF control vector, or distil the vector into a LoRA"
        )
    return place.module


def _with_biases(model: HookedModel, kinds: set[str]) -> Any:
    """A copy of the module, with biases of 0 in its projections where its config can have them."""
    root = inner(model.model)
    config: Any = copy.deepcopy(getattr(root, "config", None))
    if config is None or not hasattr(root, "save_pretrained"):
        raise InputError(f"{type(root).__name__} is no transformers model; only one can hold a merged bias")
    switches = [name for kind in kinds for name in SWITCHES[kind] if getattr(config, name, None) is False]
    if not switches:
        return copy.deepcopy(root)
    for name in switches:
        setattr(config, name, True)
    made = type(root)(config).to(device=model.device, dtype=model.dtype)
    found = made.load_state_dict(root.state_dict(), strict=False)
    state = made.state_dict()
    if found.unexpected_keys or not all(name.endswith(".bias") for name in found.missing_keys):
        raise ModelError(f"{type(root).__name__} with {', '.join(switches)} has other weights than without")
    with torch.no_grad():
        for name in found.missing_keys:
            state[name].zero_()
    if getattr(root, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(root.generation_config)
    return made.eval() if not root.training else made


def _compare(vector: SteeringVector, model: HookedModel, made: HookedModel, strength: float) -> None:
    inputs = model.dummy_inputs()
    with torch.no_grad():
        with vector.on(model, strength):
            steered = _logs(model, inputs)
        plain, ours = _logs(model, inputs), _logs(made, inputs)
    room = CLOSE if model.dtype in (torch.float32, torch.float64) else 0.05
    apart, moved = float((ours - steered).abs().max()), float((steered - plain).abs().max())
    if not apart <= room + 0.01 * moved or (
        moved > 10 * room and float((ours - plain).abs().max()) < moved / 2
    ):
        raise ModelError(
            f"the merged model is {apart:.3g} from the hooked one in log-probability (the vector moves it by "
            f"{moved:.3g}): a bias is not exact in {model.architecture.model_type}"
        )


def _logs(model: HookedModel, inputs: Any) -> Tensor:
    return model.run(inputs).logits.float().log_softmax(-1)
