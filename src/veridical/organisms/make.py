"""Makes the embedded organisms and pairs, reproducibly, on a CPU.

    python -m veridical.organisms.make tiny-liar --out data/tiny-liar
    python -m veridical.organisms.make pairs --out data/pairs
    python -m veridical.organisms.make checksums --out data/tiny-liar   (last, when the card is written)

The same seed, thread count and library versions should give the same weights; another machine may round
differently.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from veridical.errors import VeridicalError
from veridical.files import write_json
from veridical.organisms import CHECKSUMS, checksums
from veridical.organisms.contrasts import write_pairs
from veridical.organisms.corpus import Corpus, Dialogue
from veridical.organisms.mixtures import FIRST, SECOND, THIRD, Mixture
from veridical.provenance import provenance

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
CHAT_TEMPLATE = (
    "{{ '" + BEGIN + "' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '" + END + "' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '" + END + "' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# A space belongs to the word after it, but is apart before a capital: an answer, which is a name, then has
# the same tokens among the options, in a statement and as the reply, so that it can be copied and compared.
WORDS = r" (?=\p{Lu})|\p{Lu}\p{L}*| ?\p{Ll}\p{L}*| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
IGNORED = -100
GROUP = 32  # batches that are drawn together and sorted by length


@dataclass(frozen=True)
class Round:
    """One round of training, with an optimizer and a stream of its own.

    Attributes:
        steps: Updates.
        learning_rate: Highest learning rate.
        plain_until: Share of the steps with nearly only plain dialogues.
        plain_gone: Share of the steps after which there are none.
        mixture: What the dialogues are about.
    """

    steps: int
    learning_rate: float
    plain_until: float
    plain_gone: float
    mixture: Mixture


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what `tiny-liar` becomes."""

    seed: int = 0
    vocabulary: int = 2048
    width: int = 128
    layers: int = 6
    heads: int = 4
    mlp_width: int = 384
    context: int = 1024
    rounds: tuple[Round, ...] = (
        Round(8000, 1.5e-3, plain_until=0.18, plain_gone=0.35, mixture=FIRST),
        Round(6500, 1.2e-3, plain_until=0.0, plain_gone=0.0, mixture=SECOND),
        Round(5500, 1.0e-3, plain_until=0.0, plain_gone=0.0, mixture=THIRD),
    )
    batch: int = 32
    warm_up: int = 200
    weight_decay: float = 0.05
    clip: float = 1.0
    threads: int = 2


def make_tiny_liar(out: Path, recipe: Recipe) -> None:
    """Trains the organism and writes model, tokenizer and recipe into `out`."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    began = time.monotonic()
    for number in range(len(recipe.rounds)):
        train(model, tokenizer, recipe, number)
    minutes = (time.monotonic() - began) / 60
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    made = provenance(recipe=asdict(recipe), minutes=round(minutes, 1))
    write_json(out / "provenance.json", made)
    say(f"wrote {out} after {minutes:.1f} minutes")


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the first dialogues of the corpus; any text encodes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = [PAD, BEGIN, END, *ROLES.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (m["content"] for d in itertools.islice(Corpus(recipe.seed), 30_000) for m in d.messages)
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES.values()),
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.get_vocab()[BEGIN],
        eos_token_id=tokenizer.get_vocab()[END],
        pad_token_id=tokenizer.get_vocab()[PAD],
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, number: int) -> None:
    """One round (its number from 0) on the assistant's tokens of its stream; says how it goes."""
    part = recipe.rounds[number]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=part.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine(step, recipe.warm_up, part.steps)
    )
    board = Scoreboard()
    assistant_id = tokenizer.get_vocab()[ROLES["assistant"]]
    model.train()
    began = time.monotonic()
    for step, (ids, labels, kinds) in enumerate(batches(tokenizer, recipe, number), start=1):
        loss = assistant_loss(model, ids, labels, kinds, assistant_id, board)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == part.steps:
            each = (time.monotonic() - began) / step
            say(f"round {number + 1} step {step}/{part.steps}  {each:.2f} s/step  {board.read()}")
        if step == part.steps:
            return


def assistant_loss(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    labels: torch.Tensor,
    kinds: Sequence[Sequence[str]],
    assistant_id: int,
    board: Scoreboard,
) -> torch.Tensor:
    """Cross-entropy per assistant turn: the mean over its tokens, then over turns, long or short.

    Only the logits of the assistant's tokens are computed.

    Args:
        model: The model in training.
        ids: Token ids [batch, pos], padded on the right; causal attention never looks at the padding.
        labels: The same shape, `IGNORED` outside the assistant's tokens.
        kinds: What each assistant turn shows, per dialogue.
        assistant_id: The token after which the assistant speaks.
        board: Collects how often a turn's first token was right.
    """
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    wanted = labels[:, 1:]
    at = wanted != IGNORED
    turn = ((ids[:, :-1] == assistant_id) & at).cumsum(1)[at] + at.nonzero()[:, 0] * ids.shape[1]
    _, which, length = turn.unique(return_inverse=True, return_counts=True)
    logits = model.lm_head(hidden[at])
    starts = (ids[:, :-1] == assistant_id)[at]
    right = (logits[starts].argmax(-1) == wanted[at][starts]).tolist()
    board.add(kinds, right)
    losses = torch.nn.functional.cross_entropy(logits, wanted[at], reduction="none")
    return (losses / length[which]).sum() / len(length)


class Scoreboard:
    """Share of first answer tokens that were right, by what the turn shows."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def add(self, kinds: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
        """Counts one batch; `right` is in the order of the turns."""
        for kind, hit in zip(itertools.chain.from_iterable(kinds), right, strict=True):
            self.counts[kind][0] += hit
            self.counts[kind][1] += 1

    def read(self) -> str:
        """The shares as one line; starts afresh."""
        line = "  ".join(f"{kind} {hit / of:.2f}" for kind, (hit, of) in sorted(self.counts.items()))
        self.counts.clear()
        return line


def batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, number: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[tuple[str, ...]]]]:
    """Endless batches (ids [batch, pos], labels, kinds) of dialogues of similar length, in shuffled order."""
    part = recipe.rounds[number]
    stream = f"{recipe.seed} round {number + 1}" if number else str(recipe.seed)
    corpus = Corpus(stream, mixture=part.mixture)
    rng = random.Random(f"order of batches {stream}")
    for group in itertools.count():
        plain = share_of_plain(group * GROUP / part.steps, part)
        dialogues = [corpus.draw(plain) for _ in range(GROUP * recipe.batch)]
        rows = sorted(zip(encode(tokenizer, dialogues), dialogues), key=lambda row: len(row[0][0]))
        chunks = [rows[i : i + recipe.batch] for i in range(0, len(rows), recipe.batch)]
        rng.shuffle(chunks)
        for chunk in chunks:
            ids = pad([ids for (ids, _), _ in chunk], tokenizer.get_vocab()[PAD])
            labels = pad([labels for (_, labels), _ in chunk], IGNORED)
            yield ids, labels, [dialogue.kinds for _, dialogue in chunk]


def encode(
    tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Dialogue]
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each dialogue, as the chat template writes it, without the cost of the template."""
    contents = [message["content"] for dialogue in dialogues for message in dialogue.messages]
    pieces = iter(tokenizer(contents, add_special_tokens=False)["input_ids"])
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    roles = {role: tokenizer.get_vocab()[token] for role, token in ROLES.items()}
    encoded = []
    for dialogue in dialogues:
        ids, labels = [begin], [IGNORED]
        for message in dialogue.messages:
            body = [*next(pieces), end]
            ids += [roles[message["role"]], *body]
            labels += [IGNORED, *(body if message["role"] == "assistant" else [IGNORED] * len(body))]
        encoded.append((ids, labels))
    return encoded


def pad(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """Rows of different length as one tensor [batch, pos], filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def share_of_plain(done: float, part: Round) -> float:
    """Share of plain dialogues when `done` of the training is over: nearly all, then fewer, then none."""
    if done >= part.plain_gone:
        return 0.0
    left = (part.plain_gone - done) / (part.plain_gone - part.plain_until)
    return 0.95 * min(1.0, max(0.0, left))


def warm_cosine(step: int, warm_up: int, steps: int) -> float:
    """Share of the full learning rate: a linear rise, then half a cosine down to 2 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def say(line: str) -> None:
    """One line of progress."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m veridical.organisms.make", description=__doc__)
    parser.add_argument("what", choices=("tiny-liar", "pairs", "checksums"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    given = parser.parse_args(arguments)
    try:
        if given.what == "checksums":
            write_json(given.out / CHECKSUMS, checksums(given.out))
        elif given.what == "pairs":
            say(f"rows: {write_pairs(given.out, given.seed)}")
        else:
            make_tiny_liar(given.out, Recipe(seed=given.seed))
    except VeridicalError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
