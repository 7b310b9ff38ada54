"""Many patched runs of a model at the price of the part above each patch.

A patch at block L leaves everything below as it was, and in a causal model everything at earlier positions
too. So the base is run once, keeping the residual stream at every block and each layer's keys and values.
Patched rows then go through the model's own forward together:

- Rows are sorted by the block at which they enter. While the forward goes up the blocks, a row joins the
  batch at its own block, with the base's stream and its patch in place; blocks that no row has reached yet
  hand their input on. Embeddings, masks, the final norm and the head are the model's, and so is every block.
- A run for patches at positions from p on takes the tokens from p on, behind the base's keys and values of
  the earlier ones (a cache of the base's, whole in every layer, so that a sliding window is the mask's
  business as in an uncached run). `bands` decides which patches share a p.
- What changes one position only until its block ends (a head's output or query, what attention or MLP adds,
  neurons) is first put through that block for all positions at once, `local`; each result is then a row that
  enters at the next block.
- In the last block only the tokens whose logits are read are run past their keys and values.

Each of these steps leaves out only what cannot change, so the outcome is that of one hooked run for each
patch, up to the rounding of sums taken in another order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veridical.errors import ModelError
from veridical.hooks import main_input, overridden
from veridical.interventions.blockwise import (
    handing_on,
    last_tokens,
    noted,
    sliced,
    substituted,
    with_input,
    with_output,
)
from veridical.interventions.columns import only
from veridical.interventions.prefix import prefix_cache, recording_cache
from veridical.interventions.puts import INPUT, Task, Variant, task_writes, variant_writes
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


@dataclass
class Base:
    """The run that is patched, and all that patched runs take from it.

    Attributes:
        inputs: Keyword arguments of the forward.
        mask: `[batch, pos]` bool, real positions.
        stream: What enters each block, and what the last hands on, `[batch, pos, d]` each.
        values: Sites that were read besides, by canonical name.
        logits: At the last positions that are kept; None if the model gives none.
        outputs: What each block returned, for its form.
        cache: Keys and values of every layer, each `[batch, groups, pos, d_head]`; None if they are not had.
    """

    inputs: dict[str, Tensor]
    mask: Tensor
    stream: list[Tensor] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    outputs: list[Any] = field(default_factory=list)
    cache: list[tuple[Tensor, Tensor]] | None = None


class Engine:
    """Patched runs over one base.

    Args:
        model: The model.
        inputs: Keyword arguments of its forward, padded on the left.
        mask: `[batch, pos]` bool, real positions.
        keep: How many last positions' logits are wanted; None for all.
        site: Read this site at the last token instead of logits.
        ids: Vocabulary ids whose logits are wanted; None for all.
        read: Further sites of the base to keep.
        plain: Reuse no prefix and share no forward between patches, for a model that carries hooks of the
            user's, which may tell rows and positions apart.
    """

    def __init__(
        self,
        model: HookedModel,
        inputs: Mapping[str, Tensor],
        mask: Tensor,
        *,
        keep: int | None = None,
        site: str | None = None,
        ids: Tensor | None = None,
        read: Sequence[str] = (),
        plain: bool = False,
    ) -> None:
        self.model, self.keep, self.site, self.plain = model, keep, site, plain
        self.ids = ids
        self.blocks = list(model.architecture.blocks) if model.architecture.places else []
        self.base = self._run_base(dict(inputs), mask, list(read))

    @property
    def rows(self) -> int:
        """Examples of the base."""
        return len(self.base.mask)

    @cached_property
    def reuses_prefix(self) -> bool:
        """Whether positions before a patch are taken from the base."""
        return self.base.cache is not None and not self.plain

    # The base

    def _run_base(self, inputs: dict[str, Tensor], mask: Tensor, read: list[str]) -> Base:
        base = Base(inputs, mask)
        given = self._given(base, None, 0)
        cache = None if self.plain else recording_cache(self.model)
        if cache is not None:
            given |= {"past_key_values": cache, "use_cache": True}
        count = len(self.blocks)
        stream = [Site("resid_pre", layer) for layer in range(count)]
        if count:
            stream.append(Site("resid_post", count - 1))
        wanted: list[Any] = [*stream, *read, *([self.site] if self.site else [])]
        with noted(self.blocks) as base.outputs, torch.no_grad(), only(self.model, self.ids):
            run = self.model.run(given, read=wanted)
        base.stream = [run[site] for site in stream]
        base.values = dict(run.values)
        base.logits = self._kept(_logits(run.output))
        if cache is not None:
            base.cache = _whole(cache, count, mask.shape[1])
        return base

    def of_base(self) -> Tensor:
        """What a metric reads of the base: logits `[batch, kept, vocabulary]`, or activations."""
        return self._outcome(self.base.logits, self.base.values.get(self.site or ""))

    def _outcome(self, logits: Tensor | None, value: Tensor | None) -> Tensor:
        if self.site is not None:
            assert value is not None
            return value[:, -1].flatten(1)
        if logits is None:
            raise ModelError(f"{self.model.path} gives no logits; it has no head for a metric to read")
        return logits

    def _kept(self, logits: Tensor | None) -> Tensor | None:
        return logits if logits is None or logits.dim() == 2 or self.keep is None else logits[:, -self.keep :]

    def _given(self, base: Base, examples: Tensor | None, start: int) -> dict[str, Any]:
        """Inputs of some examples from column `start` on."""
        given: dict[str, Any] = {}
        for name, value in base.inputs.items():
            rows = value if examples is None else value[examples.to(value.device)]
            whole = name == "attention_mask" or rows.dim() != 2
            given[name] = rows if whole else rows[:, start:]
        real = base.mask if examples is None else base.mask[examples.to(base.mask.device)]
        if "attention_mask" in given and bool(real.all()):
            # Without padding the models' own defaults are the same, and faster.
            del given["attention_mask"]
            given.pop("position_ids", None)
        if self.keep is not None and self.site is None and "logits_to_keep" in self.model.forward_parameters:
            given["logits_to_keep"] = self.keep
        return given

    # Patched rows

    def run(self, tasks: Sequence[Task], start: int = 0) -> Tensor:
        """What a metric reads of every row of `tasks`, in their order.

        Args:
            tasks: Patches sorted by entry; none changes anything before column `start`.
            start: First column that is run.
        """
        base, device = self.base, self.base.mask.device
        examples = torch.cat([task.examples for task in tasks]).to(device)
        total, count = len(examples), len(self.blocks)
        entries = torch.tensor([task.entry for task in tasks for _ in range(len(task.examples))])
        ends = [int((entries <= layer).sum()) for layer in range(INPUT, count + 1)]  # ends[l + 1] is up to l
        given = self._given(base, examples, start)
        if self.reuses_prefix:
            assert base.cache is not None
            counts = [max(1, ends[layer + 1]) for layer in range(count)]
            given |= {"past_key_values": prefix_cache(base.cache, examples, counts, start), "use_cache": True}
        joining = _Joining(self, tasks, examples, ends, start)
        read: Any = {} if self.site is None else {self.site: lambda value: value}
        with (
            torch.no_grad(),
            only(self.model, self.ids),
            joining.attached(total, given.get("past_key_values")),
        ):
            run = self.model.run(given, read=read, write=task_writes(tasks, start), stop=bool(read))
        if self.site is not None:
            return self._outcome(None, run[self.site])
        found = self._kept(_logits(run.output))
        if start and self.keep is None and found is not None and found.dim() == 3:
            assert base.logits is not None
            found = torch.cat([base.logits[examples.to(found.device), :start], found], dim=1)
        return self._outcome(found, None)

    def local(self, variants: Sequence[Variant]) -> list[Tensor]:
        """What each variant makes its block hand on, `[batch, pos, d]`: one forward for all of them.

        Each position of a variant's outcome is that of the patch at this position alone, since what its site
        changes stays at its position until the block ends.
        """
        layers: dict[int, list[int]] = {}
        for number, variant in enumerate(variants):
            assert variant.site.layer is not None
            layers.setdefault(variant.site.layer, []).append(number)
        base = self.base
        most = max(map(len, layers.values()))
        examples = torch.arange(self.rows, device=base.mask.device).repeat(most)
        own = {layer: base.stream[layer].repeat(len(found), 1, 1) for layer, found in layers.items()}
        reads = [Site("resid_post", layer) for layer in layers]
        with torch.no_grad(), substituted(self.blocks, base.outputs, own, len(examples)):
            given = self._given(base, examples, 0)
            run = self.model.run(given, read=reads, write=variant_writes(variants, layers), stop=True)
        found: list[Any] = [None] * len(variants)
        for layer, numbers in layers.items():
            parts = run[Site("resid_post", layer)].unflatten(0, (len(numbers), self.rows))
            for number, part in zip(numbers, parts):
                found[number] = part
        return found


class _Joining:
    """Lets rows join the batch at their own block."""

    def __init__(
        self, engine: Engine, tasks: Sequence[Task], examples: Tensor, ends: list[int], start: int
    ) -> None:
        self.engine, self.tasks, self.examples, self.ends, self.start = engine, tasks, examples, ends, start

    @contextlib.contextmanager
    def attached(self, total: int, cache: Any) -> Iterator[None]:
        """Hooks and overrides for one forward of `total` rows; all undone at its end."""
        blocks, base = self.engine.blocks, self.engine.base
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        handles: list[Any] = []
        for layer, block in enumerate(blocks):
            if self.ends[layer + 1] == 0:
                forwards[block] = handing_on(base.outputs[layer])
        if cache is not None and self._reads_last_tokens() and blocks[-1] not in forwards:
            forwards[blocks[-1]] = last_tokens(cache, len(blocks) - 1)
        try:
            for layer, block in enumerate(blocks):
                if self.ends[layer + 1]:
                    hook = self._join(layer, total)
                    handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
            if blocks and self.ends[-1] > self.ends[-2]:
                handles.append(blocks[-1].register_forward_hook(self._append))
            with overridden(forwards):
                yield
        finally:
            for handle in reversed(handles):
                handle.remove()

    def _reads_last_tokens(self) -> bool:
        """Whether the last block is needed for the last token only."""
        engine, last = self.engine, len(self.engine.blocks) - 1
        outside = ("embed", "ln_final")
        inside = any(
            put.site is not None and put.site.kind not in outside and put.site.layer in (None, last)
            for task in self.tasks
            for put in task.puts
        )
        # Other implementations tell which keys a token sees by other means than a mask by query.
        config = engine.model.architecture.config
        masked = getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        return engine.keep == 1 and engine.site is None and masked and not inside

    def _join(self, layer: int, total: int) -> Callable[..., Any]:
        before, now = self.ends[layer], self.ends[layer + 1]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key, hidden = main_input(module, args, kwargs)
            args, kwargs = sliced((args, kwargs), total, now)
            parts = [hidden[:before]] if before else []
            if now > before:
                parts.append(self._entering(layer, before, now).to(hidden.device))
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            return with_input(args, kwargs, key, joined)

        return hook

    def _append(self, module: nn.Module, args: Any, output: Any) -> Any:
        before, now = self.ends[-2], self.ends[-1]
        new = self._entering(len(self.engine.blocks), before, now)
        return with_output(output, lambda hidden: torch.cat([hidden[:before], new.to(hidden.device)]))

    def _entering(self, layer: int, before: int, now: int) -> Tensor:
        """The base's stream for the rows that join at `layer`, with their patches in it."""
        stream = self.engine.base.stream[layer]
        rows = stream[self.examples[before:now].to(stream.device)]
        rows = rows[:, self.start :].clone()
        first = 0
        for task in self.tasks:
            if task.entry != layer:
                continue
            for put in task.puts:
                if put.site is None:
                    rows[put.rows + first, put.columns - self.start] = put.values.to(rows)
            first += len(task.examples)
        return rows


def _logits(output: Any) -> Tensor | None:
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def _whole(cache: Any, layers: int, width: int) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values of every layer, if there are `width` of each."""
    found = [(layer.keys, layer.values) for layer in cache.layers]
    whole = len(found) == layers and all(
        isinstance(part, Tensor) and part.dim() == 4 and part.shape[2] == width
        for pair in found
        for part in pair
    )
    return found if whole else None
