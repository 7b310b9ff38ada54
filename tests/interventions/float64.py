"""Models that compute in float64 throughout: transformers turns to float32 inside norms and softmax."""

import torch
from torch.overrides import TorchFunctionMode

import veridical as vd
from tiny_models import make

# Grouped products of experts are for less than float64.
EAGER = {key: {"experts_implementation": "eager"} for key in ("mixtral", "qwen3_moe")}


def exact(name):
    """The tiny model of a family in float64; to be run within `Float64`."""
    return vd.load(make(name, **EAGER.get(name, {})).double())


class Float64(TorchFunctionMode):
    """Within it, what asks for float32 gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_wider, args), **{name: _wider(value) for name, value in (kwargs or {}).items()})


def _wider(value):
    return torch.float64 if value is torch.float32 else value
