"""A policy and the reference that it is compared with, and which measures the two allow.

Measures that ask for more than the two have in common are not refused with the rest: each is named in
`Duo.not_applicable` with its reason, and everything else is given.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical import adapters, architectures
from veridical.errors import InputError, ModelError
from veridical.hooked import HookedModel

if TYPE_CHECKING:
    from veridical.tokens import Encoded, Prompt

log = logging.getLogger(__name__)

PATCHING = "cross-model patching"
TOKENS = (
    "KL", "shifted tokens", "agreement", "policy samples", "logit-lens divergence", "probes", PATCHING,
)  # fmt: skip
"""Measures that compare distributions over the same tokens."""
WIDTH = ("drift", "Procrustes", "difference lens", "directions", "probes", "SAEs", "crosscoder", PATCHING)
"""Measures that subtract one residual stream from the other, rotate it, put it into the other model, or read
both by one set of weights."""
DEPTH = ("drift", "weights", "probes", "SAEs", PATCHING)
"""Measures that name a layer in both."""


@dataclass(frozen=True, repr=False)
class Duo:
    """Two models, made by `load_pair`.

    Attributes:
        policy: The model after preference training.
        reference: The frozen model that it started from. Where the two share their tokens, both handles have
            one tokenizer, so that both read the same; the models themselves are as they were given.
        not_applicable: Measure to the reason why these two cannot be compared by it.
        notes: What was decided for the two, such as whose chat template is used.
        vocabulary: Tokens that both give logits for; 0 where their tokenizers differ.
    """

    policy: HookedModel
    reference: HookedModel
    not_applicable: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    vocabulary: int = 0

    @property
    def same_tokens(self) -> bool:
        """Whether both read and predict the same tokens."""
        return self.vocabulary > 0

    @property
    def context_length(self) -> int:
        """Positions that both have; 0 where neither config tells."""
        known = [model.context_length for model in (self.policy, self.reference) if model.context_length]
        return min(known, default=0)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Layers that go together, (policy, reference): the same number, or the same share of the depth."""
        ours, theirs = self.policy.n_layers, self.reference.n_layers
        if ours == theirs:
            return [(layer, layer) for layer in range(ours)]
        fewer = min(ours, theirs)
        return [((at + 1) * ours // fewer - 1, (at + 1) * theirs // fewer - 1) for at in range(fewer)]

    def applies(self, measure: str) -> bool:
        """Whether a measure can be had of these two."""
        return measure not in self.not_applicable

    def encode(
        self, prompts: list[Prompt], completions: list[str] | None = None, **options: Any
    ) -> tuple[list[Encoded], list[Encoded]]:
        """Tokens of the same rows for policy and reference; see `HookedModel.encode`.

        Raises:
            DataError: Rows that cannot be tokenised; chats where neither model has a template, or only one
                has and the two do not share their tokens.
        """
        if self.same_tokens:
            if options.get("max_length") is None:
                options["max_length"] = self.context_length or None
            rows = self.policy.encode(prompts, completions, **options)
            return rows, rows
        return (
            self.policy.encode(prompts, completions, **options),
            self.reference.encode(prompts, completions, **options),
        )

    def __repr__(self) -> str:
        missing = f", without {', '.join(self.not_applicable)}" if self.not_applicable else ""
        return f"Duo({self.policy.path} against {self.reference.path}{missing})"


def load_pair(policy: Any, reference: Any = None, **options: Any) -> Duo:
    """Loads a policy and its reference, and says which measures the two allow.

    Args:
        policy: Anything that `veridical.load` takes, or the folder of a LoRA, which is merged in memory into
            its base. The base is the one that the adapter names, or, where that is not at hand, the
            reference.
        reference: Likewise. For a LoRA folder the adapter's base when not given.
        **options: Passed to `veridical.load` for both, such as `device` and `dtype`.

    Raises:
        InputError: No reference, the policy's own path as reference, or a model without a vocabulary of
            tokens.
        ModelError: A model or adapter that cannot be loaded.
    """
    from veridical.models import load

    adapter = _adapter_folder(policy)
    if reference is None:
        if adapter is None:
            raise InputError(f"{_name(policy)} needs a reference to be compared with; pass reference=...")
        reference = _base_of(adapter)
    if _adapter_folder(reference) is not None and adapter is None:
        raise InputError(
            f"{_name(reference)} is an adapter, and a reference is the model before training; "
            "expected its base (did you mean it as the policy?)"
        )
    refuse_own_path(policy, reference)
    theirs = load(reference, **options)
    notes: list[str] = []
    ours = (
        load(policy, **options) if adapter is None else _with_adapter(policy, adapter, theirs, options, notes)
    )
    return pair_of(ours, theirs, notes)


def pair_of(policy: HookedModel, reference: HookedModel, notes: list[str] | None = None) -> Duo:
    """The pair of two loaded models, with what they have in common worked out.

    Raises:
        InputError: Models of different kinds, or of a kind that predicts no next token.
    """
    for model in (policy, reference):
        if model.kind != "causal":
            raise InputError(
                f"{model.path} is a model of kind {model.kind!r}; expected two causal language models"
            )
    notes = list(notes or ())
    missing: dict[str, str] = {}
    vocabulary, why = shared_vocabulary(policy, reference, notes)
    if not vocabulary:
        missing |= dict.fromkeys(TOKENS, why)
        notes.append(
            f"{why}: texts are read by each model in its own tokens, and activations are compared only where "
            "tokens of both end at the same character."
        )
    sizes = [model.architecture.vocabulary for model in (policy, reference)]
    if vocabulary and sizes[0] != sizes[1]:
        missing[PATCHING] = f"the policy has {sizes[0]} logits and the reference {sizes[1]}"
    if policy.d_model != reference.d_model:
        said = f"the policy is {policy.d_model} wide and the reference {reference.d_model}"
        missing |= dict.fromkeys((*WIDTH, "weights"), said)
    if policy.n_layers != reference.n_layers:
        said = f"the policy has {policy.n_layers} layers and the reference {reference.n_layers}"
        missing |= dict.fromkeys(DEPTH, said)
        notes.append(f"{said[0].upper()}{said[1:]}: layers of the same share of the depth are compared.")
    if not (policy.n_layers and reference.n_layers):
        lone = policy if not policy.n_layers else reference
        said = f"the layers of {lone.path} ({lone.architecture.model_type}) are not known"
        missing |= dict.fromkeys((*WIDTH, "CKA", "logit-lens divergence"), said)
    if "weights" not in missing and (why := _unlike(policy, reference, vocabulary)):
        missing["weights"] = why
    policy, reference = _one_voice(policy, reference, vocabulary, notes)
    for note in notes:
        log.info("%s", note)
    return Duo(policy, reference, missing, tuple(notes), vocabulary)


def shared_vocabulary(policy: HookedModel, reference: HookedModel, notes: list[str]) -> tuple[int, str]:
    """How many tokens both have, with the same ids from 0 on, and otherwise the reason why not."""
    sizes = [model.architecture.vocabulary for model in (policy, reference)]
    count = min(sizes)
    tables = [_table(model) for model in (policy, reference)]
    if tables[0] is None or tables[1] is None:
        if sizes[0] != sizes[1]:
            return 0, f"the vocabularies have {sizes[0]} and {sizes[1]} tokens, and a tokenizer is missing"
        return count, ""
    differing = [at for at in tables[0].keys() & tables[1].keys() if tables[0][at] != tables[1][at]]
    lone = [at for at in tables[0].keys() ^ tables[1].keys() if at < count]
    if differing:
        at = min(differing)
        return 0, f"the tokenizers differ (token {at} is {tables[0][at]!r} and {tables[1][at]!r})"
    if lone and sizes[0] == sizes[1]:
        notes.append(f"{len(lone)} tokens are named in one tokenizer only; all others have the same ids.")
    if sizes[0] != sizes[1]:
        notes.append(
            f"The policy has {sizes[0]} logits and the reference {sizes[1]}: distributions are taken over "
            f"the {count} that both have."
        )
    return count, ""


def _unlike(policy: HookedModel, reference: HookedModel, vocabulary: int) -> str:
    """Why the weights of the two can't be subtracted; "" if they can."""
    ours, theirs = (
        {name: tuple(weight.shape) for name, weight in architectures.inner(model.model).named_parameters()}
        for model in (policy, reference)
    )
    if lone := sorted(ours.keys() ^ theirs.keys()):
        return f"{lone[0]} is in one of the two only"
    sizes = (policy.architecture.vocabulary, reference.architecture.vocabulary)
    for name, shape in ours.items():
        padded = vocabulary and (shape[:1], theirs[name][:1]) == (sizes[:1], sizes[1:])
        if shape != theirs[name] and not (padded and shape[1:] == theirs[name][1:]):
            return f"{name} has shape {shape} in the policy and {theirs[name]} in the reference"
    return ""


def _table(model: HookedModel) -> dict[int, str] | None:
    if model.tokenizer is None or not hasattr(model.tokenizer, "get_vocab"):
        return None
    return {number: token for token, number in model.tokenizer.get_vocab().items()}


def _one_voice(
    policy: HookedModel, reference: HookedModel, vocabulary: int, notes: list[str]
) -> tuple[HookedModel, HookedModel]:
    """Handles that turn a prompt into the same tokens, where the models share theirs."""
    ours, theirs = (getattr(model.tokenizer, "chat_template", None) for model in (policy, reference))
    lone = bool(ours) != bool(theirs)
    without, with_one = (reference, policy) if ours else (policy, reference)
    if not vocabulary:
        if lone:
            notes.append(f"{without.path} has no chat template and other tokens: give prompts as text.")
        return policy, reference
    if lone:
        notes.append(f"{without.path} has no chat template; both read chats in that of {with_one.path}.")
    elif ours != theirs:
        notes.append("The chat templates differ; both read chats in the policy's.")
    speaks = with_one if lone else (policy if policy.tokenizer is not None else reference)
    return speaking(policy, speaks), speaking(reference, speaks)


def speaking(model: HookedModel, like: HookedModel) -> HookedModel:
    """A handle on the same module with the tokenizer of another."""
    if model.tokenizer is like.tokenizer:
        return model
    made = copy.copy(model)
    made.tokenizer = like.tokenizer
    return made


def _adapter_folder(source: Any) -> Path | None:
    """The folder of an adapter without a model beside it, or None."""
    if not isinstance(source, str | Path):
        return None
    from veridical import organisms

    folder = organisms.path(str(source)) if str(source) in organisms.NAMES else Path(source)
    return folder if adapters.is_adapter(folder) else None


def _base_of(folder: Path) -> str:
    from veridical.files import read_json

    base = read_json(folder / adapters.CONFIG).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{folder} is an adapter that names no base; pass reference=...")
    return str(base)


def _with_adapter(
    named: Any, folder: Path, reference: HookedModel, options: dict[str, Any], notes: list[str]
) -> HookedModel:
    """The adapter's base with the adapter merged in; the reference stands in for a base that is not there."""
    from veridical.models import load

    base = _base_of(folder)
    try:
        loaded = load(base, **options)
    except (InputError, ModelError) as error:
        if reference.path == base:
            raise
        notes.append(f"The base that {folder} names ({base}) is not here; it was put on {reference.path}.")
        log.debug("base of %s: %s", folder, error)
        base, loaded = reference.path, copy.copy(reference)
        loaded.model = copy.deepcopy(reference.model)
    before = loaded.fingerprint()
    try:
        merged = adapters.merged(loaded.model, folder)
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"cannot put the adapter {folder} on {base}: {said}") from error
    made = HookedModel(merged, architectures.describe(merged), tokenizer=loaded.tokenizer, path=str(named))
    same = made.fingerprint() == before
    done = "but changes nothing in them" if same else "merged into its weights"
    notes.append(f"The policy is {base} with the adapter {folder.name} {done}.")
    return made


def refuse_own_path(policy: Any, reference: Any) -> None:
    """Refuses a policy that is its own reference.

    Raises:
        InputError: Both are the same path.
    """
    if not (isinstance(policy, str | Path) and isinstance(reference, str | Path)):
        return
    if _resolved(policy) == _resolved(reference):
        raise InputError(
            f"policy and reference are both {_name(reference)}; "
            "expected the model that the policy started from"
        )


def _resolved(source: str | Path) -> str:
    from veridical import organisms

    if str(source) in organisms.NAMES:
        return str(organisms.path(str(source)).resolve())
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else getattr(source, "path", type(source).__name__)
