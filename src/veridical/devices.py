"""A device by name, tried before anything is put on it."""

from __future__ import annotations

from typing import Any

import torch

from veridical.errors import ConfigError


def usable(device: Any, option: str = "device", dtype: torch.dtype = torch.float32) -> torch.device:
    """The device of that name.

    Args:
        device: A name such as `cpu` or `cuda:0`, or a device.
        option: What the user called it.
        dtype: Number format that it has to hold.

    Raises:
        ConfigError: There is no such device here, or it does not compute in `dtype`.
    """
    try:
        found = torch.device(device)
        torch.zeros(1, dtype=dtype, device=found).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        said = str(error).splitlines()[0]
        number = str(dtype).removeprefix("torch.")
        raise ConfigError(f"{option} is {str(device)!r}, where {number} cannot be had: {said}") from error
    return found
