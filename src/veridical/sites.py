"""One vocabulary for the places of a model: what can be read, edited, or stopped at.

A site is written as TransformerLens writes it (`blocks.5.hook_resid_post`) or in short (`resid_post.5`). A
raw module path with a side, `model.layers.5.mlp:out`, names any module's input or output. Globs such as
`resid_post.*` are resolved against a model by `HookedModel.resolve`.

What each kind holds, for a batch of b rows of p positions, h heads and g key/value heads:

- `embed` [b, p, d]: output of the token embedding, with Gemma's factor, without positions. In a ViT, the
  class token and patches with their positions, as they enter the first block.
- `resid_pre.L` [b, p, d]: the residual stream as it enters block L.
- `q.L` [b, p, h, d_head]: queries as projected, before the rotary turn and before query/key norms.
- `k.L`, `v.L` [b, p, g, d_head]: keys and values as projected, one for each key/value head.
- `pattern.L` [b, h, p, p]: attention probabilities; each row (query) sums to one.
- `z.L` [b, p, h, d_head]: each head's mix of values, the input of the output projection.
- `attn_out.L` [b, p, d]: what attention adds to the stream: after the output projection, and after the norm
  behind it where there is one (gemma, olmo2).
- `resid_mid.L` [b, p, d]: the stream between attention and MLP; absent where the two run in parallel
  (gpt-neox).
- `mlp_post.L` [b, p, m]: the neurons, input of the down projection; absent for mixtures of experts.
- `mlp_out.L` [b, p, d]: what the MLP, or all experts together, adds to the stream; as for `attn_out`.
- `resid_post.L` [b, p, d]: the stream as block L hands it on. It is HF's `hidden_states[L + 1]`, except
  that the last of these is after the final norm.
- `ln_final` [b, p, d]: output of the final norm with its weight and bias; absent where there is none (bert).

BERT normalises after adding: its `resid_mid` and `resid_post` are after that norm, which is what the next
    part
reads and what is carried on (TransformerLens's BertBlock gives those names to the sums before the norm),
and its `attn_out` and `mlp_out` are before it. In a ViT, position 0 is the class token; the patches follow
row by row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from veridical.errors import unknown

_NAMES = {
    "embed": "hook_embed",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "pattern": "blocks.{}.attn.hook_pattern",
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "mlp_post": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
    "ln_final": "ln_final.hook_normalized",
}
KINDS: tuple[str, ...] = tuple(_NAMES)
"""The kinds of site, in the order in which a forward pass reaches them."""

RAW = "raw"
HEAD_KINDS = ("q", "k", "v", "z")
"""Kinds whose values are [batch, pos, heads, d_head]."""

_LAYERLESS = {_NAMES[kind]: kind for kind in KINDS if "{}" not in _NAMES[kind]}
_TAILS = {_NAMES[kind].removeprefix("blocks.{}."): kind for kind in KINDS if "{}" in _NAMES[kind]}
_CANONICAL = re.compile(r"blocks\.(-?\d+)\.(.+)")
_SHORT = re.compile(r"([a-z_]+)\.(-?\d+)")


@dataclass(frozen=True)
class Site:
    """A place in a model.

    Attributes:
        kind: One of `KINDS`, or "raw".
        layer: Block number from 0; None for `embed`, `ln_final` and raw paths. Negative counts from the end
            until a model resolves it.
        path: For a raw site, the module path with ":in" or ":out".
    """

    kind: str
    layer: int | None = None
    path: str | None = None

    @property
    def name(self) -> str:
        """The canonical name, as TransformerLens writes it; for a raw site, its path."""
        return self.path or _NAMES[self.kind].format(self.layer)

    @property
    def short(self) -> str:
        """The short name, such as "resid_post.5"; for a raw site, its path."""
        return self.path or (self.kind if self.layer is None else f"{self.kind}.{self.layer}")

    @property
    def is_raw(self) -> bool:
        """Whether this names a module by its path."""
        return self.kind == RAW

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """The site that `text` names, in any spelling; globs need a model (`HookedModel.resolve`).

        Raises:
            UnknownNameError: Not a site; names the nearest.
        """
        if isinstance(text, Site):
            return text
        text = str(text).strip()
        if text.endswith((":in", ":out")) and len(text) > 4:
            return cls(RAW, path=text)
        site = _parse_named(text)
        if site is None:
            example = [name.format(0) for name in _NAMES.values()]
            shorts = [kind if kind in _LAYERLESS.values() else f"{kind}.0" for kind in KINDS]
            hint = "A raw module path ends in :in or :out, such as model.layers.5:out."
            raise unknown("site", text, [*shorts, *example], hint)
        return site


def _parse_named(text: str) -> Site | None:
    if text in _LAYERLESS:
        return Site(_LAYERLESS[text])
    if text in _LAYERLESS.values():
        return Site(text)
    if match := _CANONICAL.fullmatch(text):
        layer, tail = match.groups()
        return Site(_TAILS[tail], int(layer)) if tail in _TAILS else None
    if match := _SHORT.fullmatch(text):
        kind, layer = match.groups()
        return Site(kind, int(layer)) if kind in _TAILS.values() else None
    return None
