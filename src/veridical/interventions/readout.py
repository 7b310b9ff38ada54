"""The way from the residual stream to logits, through the model's own final norm and unembedding.

Nothing of any family is written anew: the model itself runs, with every block standing aside and the last
one handing on the vectors that are asked about, so that softcaps, scaled logits, projections and heads with
layers of their own (bert) all count. Embeddings are run, blocks are not. The head of a vision transformer
reads one token of an image; there each vector takes that token's place.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veridical.errors import InputError
from veridical.hooks import first_tensor, replaced

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Readout:
    """Logits of vectors of the residual stream after the last block.

    Raises:
        InputError: A model without blocks that are known.
    """

    def __init__(self, model: HookedModel) -> None:
        if not model.architecture.blocks:
            raise InputError(
                f"{model.path}: the blocks of a {model.architecture.model_type} are not known, so they can't "
                "be left out"
            )
        self.model = model
        self._outputs = _block_outputs(model)

    def __call__(self, vectors: Tensor, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits `[..., vocabulary]` (or `[..., labels]`); gradients as the caller has set them.

        Args:
            vectors: `[batch, pos, d_model]` with the `inputs` of the same batch, or `[n, d_model]`.
            inputs: As `HookedModel.batch` makes them. With those of the batch that the vectors came from, the
                arithmetic is that of the model's own pass, to the last bit.
        """
        if self.model.kind == "vision":
            # Each vector is the only token, and so the one that is read, of an image.
            given = self.model.dummy_inputs() if inputs is None else inputs
            return self._run(vectors.reshape(-1, 1, vectors.shape[-1]), given).unflatten(
                0, vectors.shape[:-1]
            )
        if inputs is None:
            # Each vector is the only token of a row.
            one = self.model.batch([[0]])
            single = {name: value.expand(len(vectors), 1).contiguous() for name, value in one.items()}
            return self(vectors[:, None], single)[:, 0]
        return self._run(vectors, inputs)

    def _run(self, vectors: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        with self._standing_aside(vectors):
            output = self.model.call(inputs)
        return output if isinstance(output, Tensor) else output.logits

    @contextlib.contextmanager
    def _standing_aside(self, vectors: Tensor) -> Iterator[None]:
        """Every block returns at once, the last one with `vectors`; as it was afterwards.

        Hooks on the blocks themselves wait outside: one that edits the last block's output has acted on the
        pass that the vectors came from, and would act on every layer's anew.
        """
        saved: list[tuple[nn.Module, dict[str, Any]]] = []
        try:
            for block, output in zip(self.model.architecture.blocks, self._outputs):
                saved.append((block, {name: block.__dict__.get(name) for name in ("forward", *_HOOKS)}))
                block.__dict__["forward"] = lambda *_, output=output, **__: _with(output, vectors)
                for name in _HOOKS:
                    block.__dict__[name] = OrderedDict()
            yield
        finally:
            for block, own in saved:
                for name, value in own.items():
                    if value is None:
                        block.__dict__.pop(name, None)
                    else:
                        block.__dict__[name] = value


def _block_outputs(model: HookedModel) -> list[Any]:
    """What each block returns, seen on a short pass: a tensor, or something that holds one."""
    found: dict[nn.Module, Any] = {}
    handles = [
        block.register_forward_hook(lambda module, _, output: found.update({module: output}))
        for block in model.architecture.blocks
    ]
    try:
        with torch.no_grad():
            model.call(model.dummy_inputs())
    finally:
        for handle in handles:
            handle.remove()
    return [found[block] for block in model.architecture.blocks]


def _with(output: Any, vectors: Tensor) -> Any:
    if isinstance(output, Tensor):
        return vectors
    first = first_tensor(output)
    return replaced(output, first[0] if first is not None else 0, vectors)
