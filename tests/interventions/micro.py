"""Models whose weights are written by hand, so that what a tool says can be held against it.

All are transformers models that do exactly what is written here, not about that. Two devices make it so:

- **Norms that do nothing.** A norm divides by `sqrt(mean(x ** 2) + eps)`. With `eps = 2 ** 100` and a weight
  of `2 ** 50` that is the identity, in Llama to the last bit. GPT-2's norm also centres; here every vector in
  its stream has mean zero, as the last dimension holds minus the sum of the others, up to rounding.
- **Saturated attention.** With `sharpness=EXACT` the scores of other tokens lie so far below that their
  attention is 0.0, and the right token's is 1.0. Gradients through queries and keys then vanish, so gradient
  methods are judged at `sharpness=SOFT`.

`Truth` names what matters in a model, as `veridical.interventions` names it: `head.0.1`, `mlp.1`, and edges
such as `head.0.1->head.1.2:k`. Whatever is not named has an effect of exactly zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from written import (
    BOS,
    FIRST,
    LETTERS,
    PAD,
    POSITIONS,
    VOCABULARY,
    bare,
    finished,
    from_rows,
    layout,
    matrix,
    set_head,
    turned_by_one,
    write,
    write_ends,
)

EXACT, SOFT = 4096.0, 8.0

FAMILIES = ("gpt2", "llama", "llama_grouped")
"""`llama_grouped` has two key/value heads for its four heads."""


@dataclass(frozen=True)
class Truth:
    """What matters between two texts that differ in one token, and how much.

    Attributes:
        nodes: Senders on the way, in order.
        edges: Every edge that matters. Taking any one of them from the other text takes the whole effect.
        cells: Site, position from the end (-1 is the last) and head (None: the whole vector) of each single
            patch that restores the whole effect; any other patch of these kinds of site restores none of it.
        effect: What the metric (answer's logit minus a letter's that stands nowhere) changes by in all.
    """

    nodes: tuple[str, ...]
    edges: frozenset[str]
    cells: frozenset[tuple[str, int, int | None]]
    effect: float


# Induction: "a b c a" is followed by "b"

PREVIOUS, INDUCTION = 1, 2
"""Head of layer 0 that copies the previous token, and of layer 1 that finds it."""
TOK, PREV, OUT, ONE, POS = layout(VOCABULARY, VOCABULARY, VOCABULARY, 1, POSITIONS)
"""Dimensions of the stream: token, token before, answer, a constant 1, and position (GPT-2 only)."""
ANSWER = 16.0
"""Logit of the answer where attention is saturated; every other logit is 0."""


def induction(family: str = "gpt2", sharpness: float = EXACT, noise: float = 0.0, seed: int = 0) -> nn.Module:
    """Two layers of four heads that complete a repeated text; MLPs write nothing.

    Head 0.1 attends to the token before and writes which one it is into a part of the stream of its own.
    Head 1.2 attends to where that part (its keys) holds the present token (its queries), and writes the token
    that stands there (its values) as the answer's logit, 16. Where nothing matches it rests on BOS, whose
    value is zero, and all logits are 0. So "a b c a" is completed by "b" with probability
    `e ** 16 / (e ** 16 + 23)`, and without head 0.1 every token has 1/24.

    In `gpt2` head 0.1 works by learned positions, in `llama` by the rotary turn; the induction head's queries
    and keys lie in dimensions that turn by less than 1e-14 a token. With grouped keys and values, head 0.0
    has 0.1's keys and values and head 1.3 has 1.2's: their `z` varies, and they write nothing.

    Args:
        family: One of `FAMILIES`.
        sharpness: Score of the right token over the others; EXACT or SOFT. At SOFT the answer's logit is
            about 15 and its probability about 0.999 for texts of 20 tokens.
        noise: Standard deviation of random weights that are added to heads and MLPs that do nothing.
        seed: Of the noise.
    """
    width, d_head = {"gpt2": (128, 32)}.get(family, (128, 64))
    model = bare(family, layers=2, width=width, d_head=d_head, positions=POSITIONS)
    # What leaves queries and keys as they are is at the end of each half of a head.
    still = list(range(VOCABULARY)) if family == "gpt2" else [*range(16, 32), *range(48, 64)][:VOCABULARY]
    letters = range(FIRST, VOCABULARY)
    if family == "gpt2":
        ahead = {POS[i]: i + 1 for i in range(d_head - 1)}
        set_head(
            model, 0, PREVIOUS, "q", matrix(width, d_head, {POS[i]: i for i in range(d_head)}, sharpness)
        )
        set_head(model, 0, PREVIOUS, "k", matrix(width, d_head, ahead))
    else:
        query, key = turned_by_one(d_head, sharpness)
        set_head(model, 0, PREVIOUS, "q", from_rows(width, {ONE[0]: query}))
        set_head(model, 0, PREVIOUS, "k", from_rows(width, {ONE[0]: key}))
    copied = {TOK[t]: t for t in letters}
    set_head(model, 0, PREVIOUS, "v", matrix(width, d_head, copied))
    set_head(model, 0, PREVIOUS, "o", matrix(d_head, width, {t: PREV[t] for t in letters}))
    # Every query has half the score with BOS, whose own part of the query stands for "anything".
    query = matrix(width, d_head, {TOK[t]: still[t] for t in letters}, sharpness)
    query[ONE[0], still[BOS]] = sharpness / 2
    key = matrix(width, d_head, {PREV[t]: still[t] for t in letters})
    key[TOK[BOS], still[BOS]] = 1.0
    set_head(model, 1, INDUCTION, "q", query)
    set_head(model, 1, INDUCTION, "k", key)
    set_head(model, 1, INDUCTION, "v", matrix(width, d_head, copied))
    set_head(model, 1, INDUCTION, "o", matrix(d_head, width, {t: OUT[t] for t in letters}))
    embedding = matrix(VOCABULARY, width, {t: TOK[t] for t in range(VOCABULARY)})
    embedding[:, ONE[0]] = 1.0
    write_ends(model, embedding, matrix(width, VOCABULARY, {OUT[t]: t for t in letters}, ANSWER).T)
    if family == "gpt2":
        write(model.transformer.wpe.weight, matrix(POSITIONS, width, dict(enumerate(POS))))
    return finished(model, noise, seed, busy={(0, PREVIOUS), (1, INDUCTION)})


def repeated(rows: int, length: int, seed: int = 0) -> Tensor:
    """`[rows, 1 + 2 * length]`: BOS, then `length` different letters, twice in the same order."""
    order = _shuffled(rows, seed)[:, :length]
    return torch.cat([torch.full((rows, 1), BOS), order, order], dim=1)


@dataclass(frozen=True)
class Contrast:
    """Texts that differ in one token, as token ids, with what the clean ones are followed by.

    Attributes:
        clean: `[rows, pos]`, "... A B ... A", every other letter different.
        corrupt: The same but for one token.
        answers: `[rows]`, the clean texts' B.
        wrong: `[rows]`, letters that stand nowhere.
        truth: What carries the difference.
        places: Positions of A, B and the last token, the same in every row.
    """

    clean: Tensor
    corrupt: Tensor
    answers: Tensor
    wrong: Tensor
    truth: Truth
    places: dict[str, int] = field(default_factory=dict)


def contrast(what: str, rows: int = 4, length: int = 10, at: int = 3, seed: int = 0) -> Contrast:
    """Clean and corrupt texts for `induction`, and what its tools must find between them at EXACT.

    Args:
        what: "key": the first A is another letter, so nothing matches the last token. "query": the last A is.
            "value": B is another letter, which is then predicted instead.
        rows: Number of texts.
        length: Tokens of each, with BOS.
        at: Position of the first A; B follows.
        seed: Of the letters.
    """
    order = _shuffled(rows, seed)
    clean = torch.cat([torch.full((rows, 1), BOS), order[:, : length - 1]], dim=1)
    clean[:, -1] = clean[:, at]
    other, wrong = order[:, length], order[:, length + 1]
    corrupt = clean.clone()
    changed = {"key": at, "query": length - 1, "value": at + 1}[what]
    corrupt[:, changed] = other
    previous, finder = f"head.0.{PREVIOUS}", f"head.1.{INDUCTION}"
    first, after = changed - length, at + 1 - length
    if what == "key":
        nodes = ("embed", previous, finder)
        edges = {f"embed->{previous}:v", f"{previous}->{finder}:k"}
        # Head 0.1 writes A at the place of B; from there on A's own place no longer matters.
        cells = {("v.0", first, PREVIOUS), ("z.0", after, PREVIOUS), ("attn_out.0", after, None)}
        cells |= {("k.1", after, INDUCTION)}
    else:
        nodes = ("embed", finder)
        edges = {f"embed->{finder}:{what[0]}"}
        cells = {(f"{what[0]}.1", first, INDUCTION)}
        after = first
    cells |= {("resid_pre.0", first, None), ("z.1", -1, INDUCTION), ("attn_out.1", -1, None)}
    cells |= {(site, after, None) for site in ("resid_mid.0", "resid_post.0", "resid_pre.1")}
    cells |= {(site, -1, None) for site in ("resid_mid.1", "resid_post.1")}
    truth = Truth(nodes, frozenset({*edges, f"{finder}->logits"}), frozenset(cells), ANSWER)
    return Contrast(
        clean, corrupt, clean[:, at + 1], wrong, truth, {"A": at, "B": at + 1, "last": length - 1}
    )


def cells(truth: Truth, family: str) -> set[tuple[str, int, int | None]]:
    """The cells of a truth in a model of `family`: heads of `k` and `v` are groups where these are shared."""
    grouped = family == "llama_grouped"
    return {
        (site, position, head // 2 if grouped and head is not None and site[0] in "kv" else head)
        for site, position, head in truth.cells
    }


def edges(truth: Truth, family: str) -> set[str]:
    """The edges of a truth in a model of `family`, likewise."""
    if family != "llama_grouped":
        return set(truth.edges)
    return {re.sub(r"(?<=\.)(\d+)(?=:[kv])", lambda found: str(int(found[0]) // 2), e) for e in truth.edges}


# A chain: embed -> head.0.1 -> mlp.1 -> logits, with parts beside it that write where nothing reads

CARRIER = 1
YES, NO, ASK = FIRST, FIRST + 1, FIRST + 2
GAIN = 8.0
CHAIN = (f"embed->head.0.{CARRIER}:v", f"head.0.{CARRIER}->mlp.1:in", "mlp.1->logits")


def chain() -> nn.Module:
    """A Llama that says whether the text's subject, "yes" (`a`) or "no" (`b`), was the one or the other.

    The circuit: `embed` says +1 of "yes" and -1 of "no", and 1 of both for being a subject. Head 0.1 attends
    to the subject from everywhere and carries the sign s. MLP 1 turns s into relu(s) for the logit of "yes"
    and relu(-s) for that of "no", times 8. So logit("yes") - logit("no") is 8 or -8, and no more than the
    three edges of `CHAIN` matter when the subject changes.

    Beside it, writing where nothing reads: head 0.2 carries the same s, MLP 0 writes relu(s) ** 2, and head
    1.3 the mean of s over all tokens. Head 1.0 reads that mean too, so its `z` varies, but it writes nothing.
    """
    sign, subject, one, carried, unread, said = layout(1, 1, 1, 1, 3, 2)
    width, d_head = 16, 8
    model = bare("llama", layers=2, width=width, d_head=d_head, positions=POSITIONS, mlp=4)
    still = d_head // 2 - 1  # turns by less than 1e-14 a token
    for head, into in ((CARRIER, carried[0]), (2, unread[0])):
        set_head(model, 0, head, "q", matrix(width, d_head, {one[0]: still}, EXACT))
        set_head(model, 0, head, "k", matrix(width, d_head, {subject[0]: still}))
        set_head(model, 0, head, "v", matrix(width, d_head, {sign[0]: 0}))
        set_head(model, 0, head, "o", matrix(d_head, width, {0: into}))
    for head, source, into in ((0, carried[0], None), (3, carried[0], unread[1])):
        set_head(model, 1, head, "v", matrix(width, d_head, {source: 0}))
        if into is not None:
            set_head(model, 1, head, "o", matrix(d_head, width, {0: into}))
    first, second = (layer.mlp for layer in model.model.layers)
    write(first.gate_proj.weight, matrix(width, 4, {carried[0]: 0}, 2.0**10).T)
    write(first.up_proj.weight, matrix(width, 4, {carried[0]: 0}).T)
    write(first.down_proj.weight, matrix(4, width, {0: unread[2]}).T)
    # silu(1024 * s) is 1024 * relu(s) in float32: the gate does the relu, the other factor is 1.
    gate = matrix(width, 4, {carried[0]: 0}, 2.0**10)
    gate[carried[0], 1] = -(2.0**10)
    up = matrix(width, 4, {one[0]: 0})
    up[one[0], 1] = 1.0
    write(second.gate_proj.weight, gate.T)
    write(second.up_proj.weight, up.T)
    write(second.down_proj.weight, matrix(4, width, {0: said[0], 1: said[1]}, GAIN / 2.0**10).T)
    embedding = matrix(VOCABULARY, width, {})
    embedding[:, one[0]] = 1.0
    embedding[YES, sign[0]], embedding[NO, sign[0]] = 1.0, -1.0
    embedding[[YES, NO], subject[0]] = 1.0
    write_ends(model, embedding, matrix(width, VOCABULARY, {said[0]: YES, said[1]: NO}).T)
    return finished(model)


def chain_texts(rows: int = 3, length: int = 6, seed: int = 0) -> Contrast:
    """Texts `BOS, subject, letters..., ask`, once with "yes" and once with "no" as their subject."""
    filler = torch.stack([row[row > ASK] for row in _shuffled(rows, seed)])[:, : length - 3]
    ends = torch.full((rows, 1), BOS), torch.full((rows, 1), ASK)
    clean = torch.cat([ends[0], torch.full((rows, 1), YES), filler, ends[1]], dim=1)
    corrupt = clean.clone()
    corrupt[:, 1] = NO
    answers, wrong = torch.full((rows,), YES), torch.full((rows,), NO)
    cells = {("resid_pre.0", 1 - length, None), ("v.0", 1 - length, CARRIER), ("z.0", -1, CARRIER)}
    later = (
        "attn_out.0",
        "resid_mid.0",
        "resid_post.0",
        "resid_pre.1",
        "resid_mid.1",
        "mlp_out.1",
        "resid_post.1",
    )
    cells |= {(site, -1, None) for site in later}
    truth = Truth(("embed", f"head.0.{CARRIER}", "mlp.1"), frozenset(CHAIN), frozenset(cells), 2 * GAIN)
    return Contrast(clean, corrupt, answers, wrong, truth, {"subject": 1, "last": length - 1})


# A linear model: every effect is a sum that can be done by hand

WEIGHTS = {"direct": 0.5, "head.0.0": 2.0, "head.0.1": -1.0}
RIGHT, WRONG = VOCABULARY - 2, VOCABULARY - 1


def linear(family: str = "llama") -> nn.Module:
    """One layer, uniform attention, no MLP: the logits are linear in the embeddings.

    Token t has the values x(t) and y(t) of `values`. Of a text of n tokens,

        logit(RIGHT) - logit(WRONG) = 0.5 * x(last) + 2 * mean(x) - mean(y)

    where the first term goes straight from the embedding, the second through head 0.0 and the third through
    head 0.1; heads 0.2 and 0.3 do nothing. Every other logit is 0. Half the difference is given to RIGHT and
    half, negated, to WRONG.
    """
    x, y, said = layout(1, 1, 1)
    width, d_head = 16, 4
    model = bare(family, layers=1, width=width, d_head=d_head, positions=POSITIONS)
    set_head(model, 0, 0, "v", matrix(width, d_head, {x[0]: 0}))
    set_head(model, 0, 0, "o", matrix(d_head, width, {0: said[0]}, WEIGHTS["head.0.0"]))
    set_head(model, 0, 1, "v", matrix(width, d_head, {y[0]: 0}))
    set_head(model, 0, 1, "o", matrix(d_head, width, {0: said[0]}, WEIGHTS["head.0.1"]))
    embedding = matrix(VOCABULARY, width, {})
    embedding[:, [x[0], y[0]]] = values()
    unembed = matrix(VOCABULARY, width, {})
    for token, share in ((RIGHT, 0.5), (WRONG, -0.5)):
        unembed[token, said[0]] = share
        unembed[token, x[0]] = share * WEIGHTS["direct"]
    write_ends(model, embedding, unembed)
    return finished(model)


def values() -> Tensor:
    """`[vocabulary, 2]`: x(t) = t / 4 and y(t) = (t mod 5) - 2 of the letters, 0 of BOS and PAD."""
    ids = torch.arange(VOCABULARY, dtype=torch.float32)
    found = torch.stack([ids / 4, ids % 5 - 2], dim=1)
    found[:FIRST] = 0
    return found


def by_hand(ids: Tensor) -> Tensor:
    """`[rows]`: logit(RIGHT) - logit(WRONG) of texts `[rows, pos]` without padding, as `linear` gives it."""
    x, y = values()[ids].unbind(-1)
    parts = WEIGHTS["direct"] * x[:, -1], WEIGHTS["head.0.0"] * x.mean(1), WEIGHTS["head.0.1"] * y.mean(1)
    return sum(parts[1:], parts[0])


def _shuffled(rows: int, seed: int) -> Tensor:
    """`[rows, letters]`: the ids of all letters, each row in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(len(LETTERS), generator=generator) + FIRST for _ in range(rows)])


# Words for the tokens


def tokenizer():
    """Texts such as "a b c a" to ids, with BOS in front; one letter is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<s>": BOS, "<pad>": PAD, **{c: FIRST + i for i, c in enumerate(LETTERS)}})
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", pad_token="<pad>")


def text(ids: Tensor) -> list[str]:
    """Rows of token ids as texts that `tokenizer` reads back."""
    return [" ".join(LETTERS[i - FIRST] for i in row if i >= FIRST) for row in ids.tolist()]


def handle(model: nn.Module):
    """The `HookedModel` of a micro-model. Not checked at load, as some of its parts do nothing on purpose."""
    import veridical as vd

    return vd.load(model, tokenizer=tokenizer(), check=False)


def options(texts):
    """How texts are judged: the logit of each row's right answer less that of its wrong one."""
    return {"metric": "logit_diff", "answers": texts.answers, "wrong": texts.wrong, "progress": False}
