"""What every format needs: tensors read and checked, and an SAE made from them.

Traps that this is the one place for: decoder norms are either left where they are or moved into the encoder,
never both (`move_norms`); between encoders that read `x` and those that read `x - b_dec` the bias makes up
for the difference (`centred`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veridical import files
from veridical.config import build
from veridical.errors import DamagedFileError, InputError, NonFiniteError
from veridical.saes.base import SAE
from veridical.saes.config import SAEConfig
from veridical.saes.kinds import kind

UNSAVED = ("scale", "scale_out", "variance", "updates")
"""Buffers that matter in training only."""


@dataclass
class Parts:
    """The tensors of one SAE in Veridical's layout, before it is made.

    Attributes:
        architecture: Name of the architecture.
        tensors: `W_enc [F, d_in]`, `W_dec [F, d_out]`, `b_dec`, and what else the architecture has.
        options: Fields of `SAEConfig`.
        where: The file that they come from, for messages.
        centred: Whether this encoder reads `x - b_dec`; ours of that architecture may do otherwise.
    """

    architecture: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    where: str = "the folder"
    centred: bool = True

    def move_norms(self) -> Parts:
        """Moves decoder norms into the encoder: latents are then in units of unit decoder rows.

        Everything that pre-activations are compared with or that is added to them moves along. The output
        stays; a latent without a direction keeps its encoder.
        """
        norms = self.tensors["W_dec"].double().norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)
        self.tensors["W_dec"] = _times(self.tensors["W_dec"], 1 / norms[:, None])
        self.tensors["W_enc"] = _times(self.tensors["W_enc"], norms[:, None])
        for name in ("b_enc", "b_gate", "b_mag", "threshold"):
            if name in self.tensors:
                self.tensors[name] = _times(self.tensors[name], norms)
        return self

    def make(self) -> SAE:
        """The SAE.

        Raises:
            DamagedFileError: A tensor is missing, or has another shape than the others ask for.
            NonFiniteError: NaN or infinity in a tensor.
        """
        tensors = self._checked()
        if self.centred != kind(self.architecture).centred:
            _shift(tensors, 1.0 if kind(self.architecture).centred else -1.0)
        width, d_in = tensors["W_enc"].shape
        d_out = tensors["W_dec"].shape[1]
        config = build(
            SAEConfig, None, architecture=self.architecture, width=width, normalise="none", **self.options
        )
        sae = kind(self.architecture)(config, d_in, d_out)
        own = sae.state_dict()
        state = {name: value for name, value in own.items() if name in UNSAVED}
        for name, value in own.items():
            if name in state:
                continue
            if name not in tensors:
                raise DamagedFileError(f"{self.where} has no {name}, which a {self.architecture} SAE needs")
            if tensors[name].shape != value.shape:
                raise DamagedFileError(
                    f"{self.where}: {name} has shape {tuple(tensors[name].shape)}; expected "
                    f"{tuple(value.shape)}"
                )
            state[name] = tensors[name].contiguous()
        if left := sorted(set(tensors) - set(state)):
            raise DamagedFileError(
                f"{self.where} holds {', '.join(left)}, which a {self.architecture} SAE has no place for"
            )
        sae.load_state_dict(state, assign=True)
        return sae.eval().requires_grad_(False)

    def _checked(self) -> dict[str, Tensor]:
        for name in ("W_enc", "W_dec", "b_dec"):
            if name not in self.tensors:
                raise DamagedFileError(f"{self.where} has no {name}")
        for name, value in self.tensors.items():
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(f"{self.where}: {name} holds NaN or infinity")
        tensors = dict(self.tensors)
        if self.architecture in ("jumprelu", "jumprelu_transcoder") and "threshold" in tensors:
            # At or below 0 the ReLU decides, whatever the threshold.
            tensors["log_threshold"] = tensors.pop("threshold").clamp_min(0).log()
        return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a file that is none is named as damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"no {path.name} in {path.parent}")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is not readable safetensors ({error}); it was cut short") from error


def read_config(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`."""
    if not path.is_file():
        raise InputError(f"no {path.name} in {path.parent}: expected {what}")
    found = files.read_json(path)
    if not isinstance(found, dict):
        raise DamagedFileError(f"{path} holds a {type(found).__name__}; expected {what}")
    return found


def wanted(tensors: Mapping[str, Tensor], where: Path | str, **names: str) -> dict[str, Tensor]:
    """The tensors under our names, from their names there; one that is missing is named."""
    for theirs in names.values():
        if theirs not in tensors:
            raise DamagedFileError(f"{where} has no {theirs}; it holds {', '.join(sorted(tensors))}")
    return {ours: tensors[theirs] for ours, theirs in names.items()}


def _shift(tensors: dict[str, Tensor], sign: float) -> None:
    """Adds `sign` times what the encoder makes of `b_dec` to its biases."""
    shift = tensors["W_enc"].double() @ tensors["b_dec"].double() * sign
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in tensors:
            gain = tensors["r_mag"].double().exp() if name == "b_mag" else 1.0
            tensors[name] = (tensors[name].double() + gain * shift).to(tensors[name])


def _times(value: Tensor, factor: Tensor) -> Tensor:
    return (value.double() * factor).to(value)
