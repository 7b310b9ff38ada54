"""A handle on a model that reads and edits its sites and never changes the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from veridical import scoring, tokens, weights
from veridical.architectures import Architecture, inner
from veridical.errors import DataError, InputError, ModelError, unknown
from veridical.hooks import Place, Run, Stop, attached, missed
from veridical.sites import KINDS, Site
from veridical.tokens import Encoded, Prompt

SiteSpec = str | Site | Sequence[str | Site]
# Keys are sites in any spelling; a Mapping's key type is invariant, so it is not spelt out.
Read = SiteSpec | Mapping[Any, Callable[[Tensor], Any]]
Write = Mapping[Any, Callable[[Tensor], Tensor]]
_GLOB = ("*", "?", "[")


class HookedModel:
    """A model with its tokenizer or image processor, and one engine of forward hooks over its sites.

    Made by `veridical.load`. The module keeps its device, dtype, mode, gradients and hooks.

    Attributes:
        model: The module as it was given or loaded.
        tokenizer: A transformers tokenizer, or None.
        processor: An image processor, or None.
        path: Where the model came from: hub name, folder, organism, or class name.
        kind: "causal", "encoder" or "vision".
        architecture: Dimensions and places of the sites.
        forward_parameters: Names of the arguments of the model's forward.
        n_layers, d_model, n_heads, n_kv_heads, d_head, context_length: Dimensions; 0 where the config does
            not tell.
        rewrite: What every prompt goes through before it is tokenised, where an intervention is a prompt;
            None otherwise.
        prompt_tokens: While prompts and answers are read in one pass, how many tokens each row's prompt has,
            for interventions that act on one of them only; None otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        *,
        tokenizer: Any = None,
        processor: Any = None,
        path: str = "",
        call: Callable[[nn.Module, dict[str, Any]], Any] | None = None,
        forward_parameters: frozenset[str] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.path = path or type(model).__name__
        self.architecture = architecture
        self.kind = architecture.kind
        self.n_layers = architecture.n_layers
        self.d_model = architecture.d_model
        self.n_heads = architecture.n_heads
        self.n_kv_heads = architecture.n_kv_heads
        self.d_head = architecture.d_head
        self.context_length = architecture.context_length
        self.forward_parameters = forward_parameters or frozenset(
            inspect.signature(inner(model).forward).parameters
        )
        self.rewrite: Callable[[Prompt], Prompt] | None = None
        self.prompt_tokens: Sequence[int] | None = None
        self._custom_call = call
        self._probed: dict[str, tuple[int, ...]] = {}

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"HookedModel({self.path}: {self.architecture.model_type}, {self.n_layers} layers of width "
            f"{self.d_model}, {size / 1e6:.1f} M parameters, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Device of the token embedding, where inputs go."""
        embed = self.architecture.places.get(Site("embed"))
        first = next(
            (p for module in [embed and embed.module, self.model] if module for p in module.parameters()),
            None,
        )
        return first.device if first is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the first floating-point parameter."""
        found = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(found, torch.float32)

    # Sites

    def sites(self, spec: SiteSpec = "*") -> list[str]:
        """Canonical names of the sites that `spec` matches, in order of depth; "*" is every named site."""
        if spec == "*" and not self.architecture.places:
            return []
        return [site.name for site in self.resolve(spec)]

    def resolve(self, spec: SiteSpec) -> list[Site]:
        """The sites that `spec` names, each once, in order of depth.

        Args:
            spec: A name, short form, glob or raw module path, several separated by commas, or a list of
                these. A negative layer counts from the last.

        Raises:
            UnknownNameError: A site that this model does not have; names the nearest.
        """
        if isinstance(spec, Site):
            spec = [spec]
        elif isinstance(spec, str):
            spec = [part for part in (piece.strip() for piece in spec.split(",")) if part]
        found = [site for part in spec for site in self._resolve_one(part)]
        if not found:
            raise InputError("no site was named; give one such as resid_post.0 or resid_post.*")
        return sorted(dict.fromkeys(found), key=self._depth)

    def width(self, site: str | Site) -> tuple[int, ...]:
        """Trailing shape of a site's value after [batch, pos], such as (d_model,) or (n_heads, d_head).

        Raises:
            InputError: A site without a fixed width (attention patterns).
            ModelError: A raw site whose width a short pass of the model does not tell.
        """
        (site,) = self.resolve(site)
        width = self.place(site).width
        if width is not None:
            return width
        if site.kind == "pattern":
            raise InputError(f"{site} is [batch, head, query, key] and has no fixed width")
        if site.name not in self._probed:
            with torch.no_grad():
                value = self.run(self.dummy_inputs(), read=[site], stop=True).values[site.name]
            self._probed[site.name] = tuple(value.shape[2:])
        return self._probed[site.name]

    def place(self, site: Site) -> Place:
        """Where a resolved site is found."""
        if not site.is_raw:
            return self.architecture.places[site]
        path, _, side = site.name.rpartition(":")
        return Place(self._modules[path], side)

    # Running

    def run(
        self, inputs: Mapping[str, Any], *, read: Read = (), write: Write | None = None, stop: bool = False
    ) -> Run:
        """One forward pass, with values read and edited on the way. Gradients are as the caller has set them.

        Args:
            inputs: Keyword arguments of the model's forward, as `batch` makes them (`pixel_values` for a
                ViT).
            read: Sites whose values to keep, or a mapping from site to a function of the value whose result
                is kept.
            write: For each site a function from its value to the value to put there, of the same shape and
                dtype. It gets its own copy. Edits come before reads at the same site.
            stop: End the pass as soon as every read was made: no later layer, no unembedding.

        Returns:
            The model's output (None if stopped early) and the values by canonical name. A value that is
            kept as it is shares its memory with the model's own activations.

        Raises:
            UnknownNameError: A site that this model does not have.
            ModelError: A site that the pass did not reach, or reached twice.
        """
        reads, writes = self._reads(read), self._writes(write or {})
        if stop and not reads:
            raise InputError("stop=True needs a site to read, to know where to stop")
        reached: set[Site] = set()
        noting = {site: (place, _noted(edit, site, reached)) for site, (place, edit) in writes.items()}
        with attached(reads, noting, stop=stop, once=True) as run:
            try:
                run.output = self.call(inputs)
            except Stop:
                return run
        missed(run, list(reads))
        if skipped := [site.name for site in writes if site not in reached]:
            raise ModelError(f"not reached in this forward pass, so not edited: {', '.join(skipped)}")
        return run

    @contextmanager
    def hooks(self, read: Read = (), write: Write | None = None) -> Iterator[Run]:
        """The same reads and edits for calls that you make yourself, `generate` included; undone at the end.

        Yields:
            A `Run` whose values hold what each site gave last.
        """
        with attached(self._reads(read), self._writes(write or {})) as run:
            yield run

    @contextmanager
    def reading(self, prompt_tokens: Sequence[int]) -> Iterator[None]:
        """Says of the passes within how many tokens each row's prompt has; see `prompt_tokens`."""
        before, self.prompt_tokens = self.prompt_tokens, prompt_tokens
        try:
            yield
        finally:
            self.prompt_tokens = before

    # Text

    def encode(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | None] | None = None,
        *,
        on_long: Literal["error", "truncate"] = "error",
        max_length: int | None = None,
    ) -> list[Encoded]:
        """Tokens of prompts (texts or chats), each joined with its completion; see `veridical.tokens`.

        Args:
            prompts: Texts or chats.
            completions: One for each prompt; None for none.
            on_long: For a row over `max_length`: "error", or "truncate" from the start of the prompt.
            max_length: Longest row in tokens; the model's context when not given.

        Raises:
            DataError: An empty or overlong prompt, or a chat without a template; names the row.
        """
        if self.tokenizer is None:
            raise DataError(f"{self.path} has no tokenizer; load it with tokenizer=..., or pass tokens")
        if self.rewrite is not None and not isinstance(prompts, str):
            prompts = [self.rewrite(prompt) for prompt in prompts]
        limit = max_length if max_length is not None else self.context_length or None
        drop_end = self.kind == "causal"
        return tokens.encode(
            self.tokenizer, prompts, completions, max_length=limit, on_long=on_long, drop_end=drop_end
        )

    def batch(
        self, encoded: Sequence[Encoded | Sequence[int]], padding_side: Literal["right", "left"] = "right"
    ) -> dict[str, Tensor]:
        """Padded inputs on the model's device: input_ids, attention_mask, position_ids where they are taken.

        Rows come out of the model as each would alone, on either side of the padding.
        """
        pad_id = tokens.pad_id(self.tokenizer, self.architecture.config)
        positions = "position_ids" in self.forward_parameters
        return tokens.pad(encoded, pad_id, padding_side, positions, self.device)

    def logits(self, prompts: Prompt | Sequence[Prompt] | Tensor) -> Tensor:
        """Logits of texts, chats, or token ids [batch, pos]: [batch, pos, vocabulary], padded on the right.

        Of a classifier, [batch, label]. Gradients are as the caller has set them.
        """
        if isinstance(prompts, Tensor):
            inputs = self.batch(prompts.reshape(-1, prompts.shape[-1]).tolist())
        else:
            inputs = self.batch(self.encode(scoring.as_list(prompts)))
        return self.run(inputs).logits

    def generate(self, prompts: Prompt | Sequence[Prompt], max_new_tokens: int = 32, **options: Any) -> Any:
        """The text that the model goes on with: greedy unless `do_sample=True`, and only what is new.

        Args:
            prompts: A text or chat, or a list of these, padded on the left.
            max_new_tokens: Most tokens to make; it ends before at the model's end of sequence.
            options: Further options of transformers' `generate`.

        Returns:
            One text for one prompt, a list for a list.
        """
        return scoring.generate(self, prompts, max_new_tokens, **options)

    def option_logprobs(
        self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]], batch_tokens: int = 4096
    ) -> list[np.ndarray]:
        """Log-probability of each option as the completion of its prompt, summed over the option's tokens.

        Args:
            prompts: Texts or chats.
            options: For each prompt its options.
            batch_tokens: Tokens in one batch, padding included.

        Returns:
            For each prompt a float64 array with one value (in nats) for each option.
        """
        return scoring.option_logprobs(self, prompts, options, batch_tokens)

    def fingerprint(self) -> str:
        """A digest of config and weights: the same in every process and folder; see `veridical.weights`."""
        return weights.fingerprint(self.model)

    def dummy_inputs(self, positions: int = 6) -> dict[str, Tensor]:
        """A small valid input: two rows of the token ids from 5 on, or one grey image."""
        if self.kind == "vision":
            config: Any = self.architecture.config
            shape = (1, config.num_channels, config.image_size, config.image_size)
            ramp = torch.linspace(-1, 1, shape[-1], device=self.device, dtype=self.dtype)
            return {"pixel_values": ramp.expand(shape).contiguous()}
        vocabulary = self.architecture.vocabulary or 16
        positions = min(positions, self.context_length or positions)
        rows = [[(5 + 3 * row + index) % vocabulary for index in range(positions)] for row in range(2)]
        return self.batch(rows)

    # Within

    @property
    def generates(self) -> bool:
        """Whether transformers' own `generate` makes this model's text."""
        return self._custom_call is None and callable(getattr(self.model, "generate", None))

    @property
    def _modules(self) -> dict[str, nn.Module]:
        found = dict(inner(self.model).named_modules())
        return {**found, **dict(self.model.named_modules())}

    def call(self, inputs: Mapping[str, Any]) -> Any:
        """The model's own forward, without a key/value cache; no hooks are added."""
        extra = {"use_cache": False} if "use_cache" in self.forward_parameters else {}
        given = {**extra, **inputs}
        return self.model(**given) if self._custom_call is None else self._custom_call(self.model, given)

    def _reads(self, read: Read) -> dict[Site, tuple[Place, Callable[[Tensor], Any] | None]]:
        if isinstance(read, Mapping):
            return {
                site: (self.place(site), act) for spec, act in read.items() for site in self.resolve(spec)
            }
        if not isinstance(read, (str, Site)) and not read:
            return {}
        return {site: (self.place(site), None) for site in self.resolve(read)}

    def _writes(self, write: Write) -> dict[Site, tuple[Place, Callable[[Tensor], Tensor]]]:
        return {site: (self.place(site), edit) for spec, edit in write.items() for site in self.resolve(spec)}

    def _resolve_one(self, spec: str | Site) -> list[Site]:
        text = spec.name if isinstance(spec, Site) else str(spec)
        places = self.architecture.places
        if any(sign in text for sign in _GLOB):
            if text.endswith((":in", ":out")):
                path, _, side = text.rpartition(":")
                sites = [
                    Site.parse(f"{name}:{side}") for name in self._modules if name and fnmatchcase(name, path)
                ]
            else:
                sites = [
                    site for site in places if fnmatchcase(site.name, text) or fnmatchcase(site.short, text)
                ]
            if not sites:
                raise self._unknown(text)
            return sites
        try:
            site = Site.parse(spec)
        except InputError:
            raise self._unknown(text) from None
        if site.is_raw:
            if site.name.rpartition(":")[0] not in self._modules:
                raise self._unknown(text)
            return [site]
        if site.layer is not None and site.layer < 0:
            site = Site(site.kind, site.layer + self.n_layers)
        if site not in places:
            raise self._unknown(text)
        return [site]

    def _unknown(self, text: str) -> InputError:
        raw = [f"{name}:{side}" for name in self._modules if name for side in ("in", "out")]
        places = self.architecture.places
        if not places:
            hint = (
                f"{self.architecture.model_type} is not in the table of families, "
                "so its sites are raw module paths that end in :in or :out"
            )
            return unknown("site", text, raw, hint)
        if ":" in text:
            return unknown("site", text, raw)
        options = [site.name if "hook" in text else site.short for site in places]
        return unknown("site", text, options, "A raw module path ends in :in or :out.")

    def _depth(self, site: Site) -> tuple[int, int, int]:
        if not site.is_raw:
            layer = site.layer if site.layer is not None else (-1 if site.kind == "embed" else self.n_layers)
            return layer, KINDS.index(site.kind), 0
        path, _, side = site.name.rpartition(":")
        order = {module: index for index, module in enumerate(self.model.modules())}
        module = self._modules[path]
        blocks = self.architecture.blocks
        for layer, block in enumerate(blocks):
            if module is block:
                return layer, -1 if side == "in" else len(KINDS), 0
            if any(module is part for part in block.modules()):
                return layer, KINDS.index("resid_mid"), order.get(module, 0)
        position = order.get(module, 0)
        before = not blocks or position < order.get(blocks[0], 0)
        return (-1 if before else self.n_layers), len(KINDS), position


def _noted(edit: Callable[[Tensor], Tensor], site: Site, reached: set[Site]) -> Callable[[Tensor], Tensor]:
    def noting(value: Tensor) -> Tensor:
        reached.add(site)
        return edit(value)

    return noting
