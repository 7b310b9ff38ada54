"""Control vectors for llama.cpp: one GGUF file with a tensor `direction.L` for each layer.

The format is that of `llama-cvector-generator` (llama.cpp, tools/cvector-generator; GGUF version 3,
ggml/docs/gguf.md): `general.architecture` is "controlvector", `controlvector.model_hint` the model's type,
`controlvector.layer_count` the number of tensors, all float32 `[d_model]`. llama.cpp adds `direction.L` to
the residual stream as block L hands it on, at every token, and knows none for block 0; so `resid_post.L` for
L from 1 on is exact, and anything else is refused.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from veridical import files
from veridical.errors import InputError
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.steering.vectors import SteeringVector

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
UINT32, STRING, F32 = 4, 8, 0
"""Numbers of the types of values, and of float32 tensors."""


def save_gguf(vector: SteeringVector, path: str | Path, model: HookedModel) -> Path:
    """Writes the vector at strength 1 as a control vector; `--control-vector-scaled` sets the strength there.

    Args:
        vector: One that adds, at every token, without a gate, at `resid_post` of layers from 1 on.
        path: The file; whole or not at all.
        model: The model it belongs to, for its type and width.

    Raises:
        InputError: A vector that llama.cpp can't apply as it is.
    """
    if vector.erasers or vector.gate is not None or vector.positions != "all":
        raise InputError(
            "a control vector is added at every token: erasers, gates and choices of tokens have no form "
            "in GGUF"
        )
    layers = {_layer(site): np.asarray(v, dtype="<f4") for site, v in vector.vectors.items()}
    hint = str(model.architecture.model_type)
    pairs = [
        ("general.architecture", STRING, "controlvector"),
        ("controlvector.model_hint", STRING, hint),
        ("controlvector.layer_count", UINT32, len(layers)),
    ]
    header = struct.pack("<4sIQQ", MAGIC, VERSION, len(layers), len(pairs))
    for key, kind, value in pairs:
        said = _string(value) if isinstance(value, str) else struct.pack("<I", value)
        header += _string(key) + struct.pack("<I", kind) + said
    body = b""
    for layer, values in sorted(layers.items()):
        header += _string(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(values), F32, len(body))
        body += _padded(values.tobytes())
    return files.write_bytes(path, _padded(header) + body)


def _layer(site: str) -> int:
    found = Site.parse(site)
    if found.kind != "resid_post" or not found.layer:
        raise InputError(
            f"llama.cpp adds control vectors to resid_post of layers from 1 on; this one acts at {site}"
        )
    return found.layer


def _string(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % ALIGNMENT)
