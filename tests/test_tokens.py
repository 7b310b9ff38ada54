"""Prompts to tokens: borders, special tokens, truncation, padding, and input that cannot be used."""

import pytest
import torch

import veridical as vd
from tiny_models import make
from veridical import tokens
from veridical.errors import DataError, InputError

CHAT = [
    {"role": "system", "content": "tell the truth"},
    {"role": "user", "content": "what is the capital of France?"},
]


@pytest.fixture(scope="module")
def model(hooked):
    return hooked("llama")


def spans(item):
    return [item.text[start:end] for start, end in item.offsets]


def test_text_gets_the_tokenizers_own_specials(model, tokenizer):
    (item,) = model.encode(["the capital of France"])
    assert item.ids[0] == tokenizer.bos_token_id
    assert list(item.ids) == tokenizer("the capital of France")["input_ids"]
    assert item.text == "the capital of France"
    assert (item.prompt_chars, item.prompt_tokens) == (len(item.text), len(item.ids))
    assert "".join(spans(item)) == item.text


def test_a_chat_holds_one_begin_token(model, tokenizer):
    (item,) = model.encode([CHAT], ["Paris"])
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert item.text == expected + "Paris"
    assert item.text[: item.prompt_chars] == expected
    assert expected.endswith("<|assistant|>")
    assert item.ids.count(tokenizer.bos_token_id) == 1
    same = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    same = same["input_ids"] if not isinstance(same, list) else same
    assert list(item.ids[: item.prompt_tokens]) == list(same)
    assert tokenizer.decode(item.ids[item.prompt_tokens :]) == "Paris"


@pytest.mark.parametrize(
    ("prompt", "completion", "first"),
    [
        ("the capital of France is", " Paris.", " Paris"),
        ("the capital of France is ", "Paris.", " Paris"),  # a token straddles the border: the completion's
        ("the capital of Fran", "ce is Paris", " France"),
        ("it is ü", "ß and 🜁", "ß"),
        ("tell", " ", " "),
        ("the symbol\n", "\nof gold", None),
    ],
)
def test_the_border(model, prompt, completion, first):
    (item,) = model.encode([prompt], [completion])
    assert item.text == prompt + completion
    assert item.prompt_chars == len(prompt)
    ends = [end for _, end in item.offsets]
    assert all(end <= len(prompt) for end in ends[: item.prompt_tokens])
    assert ends[item.prompt_tokens] > len(prompt)
    if first is not None:
        assert first in spans(item)[item.prompt_tokens] or spans(item)[item.prompt_tokens] in first


def test_joint_tokens_are_those_of_the_joined_text(model, tokenizer):
    """Not those of prompt and completion apart, which the model never reads."""
    (item,) = model.encode(["the capital of France i"], ["s Paris"])
    assert list(item.ids) == tokenizer("the capital of France is Paris")["input_ids"]
    apart = tokenizer("the capital of France i")["input_ids"] + tokenizer("s Paris")["input_ids"][1:]
    assert list(item.ids) != apart


def test_rows_with_and_without_completion_and_of_both_forms(model):
    items = model.encode(["the capital", CHAT, "yes or no"], [None, "Paris", ""])
    assert [item.prompt_tokens < len(item.ids) for item in items] == [False, True, False]


def test_a_complete_chat(model):
    whole = [*CHAT, {"role": "assistant", "content": "Paris"}]
    (item,) = model.encode([whole])
    assert item.text.endswith("<|assistant|>Paris</s>")
    with pytest.raises(DataError, match="already ends with the assistant"):
        model.encode([whole], ["Rome"])


class Slow:
    """The same tokenizer without offsets, as a slow one is."""

    is_fast = False

    def __init__(self, fast):
        self._fast = fast

    def __getattr__(self, name):
        return getattr(self._fast, name)

    def __call__(self, *args, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self._fast(*args, **options)


def test_a_slow_tokenizer(tokenizer):
    slow = Slow(tokenizer)
    prompts, completions = ["the capital of France is", CHAT], [" Paris", "Rome"]
    fast, found = tokens.encode(tokenizer, prompts, completions), tokens.encode(slow, prompts, completions)
    for one, other in zip(fast, found):
        assert (one.ids, one.prompt_tokens, other.offsets) == (other.ids, other.prompt_tokens, None)
    with pytest.raises(DataError, match=r"row 0: prompt and completion share a token"):
        tokens.encode(slow, ["the capital of France i"], ["s Paris"])


def test_an_added_end_token_is_left_off(tokenizer):
    """Some tokenizers end plain text with the end-of-sequence token; a prompt is there to be continued."""
    import copy

    from tokenizers import processors

    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    text = "the capital of France"
    assert ending(text)["input_ids"][-1] == 2
    for chosen in (ending, Slow(ending)):
        (item,) = tokens.encode(chosen, [text])
        assert list(item.ids) == tokenizer(text)["input_ids"]
        (kept,) = tokens.encode(chosen, [text + "</s>"])
        assert kept.ids[-1] == 2  # it stands in the text
        (whole,) = tokens.encode(chosen, [text], drop_end=False)
        assert whole.ids[-1] == 2


def test_an_encoder_keeps_its_closing_token(tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {
        word: index for index, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "gold", "is", "Au"])
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    own = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    model = vd.load(make("bert"), tokenizer=own, check=False)
    (item,) = model.encode(["gold is"], [" Au"])
    assert item.ids == (1, 4, 5, 6, 2)
    assert item.prompt_tokens == 3


def test_truncation_keeps_the_end(model, tokenizer):
    prompt, completion = "the capital of France is Paris and the capital of Italy is", " Rome"
    (full,) = model.encode([prompt], [completion])
    (cut,) = model.encode([prompt], [completion], on_long="truncate", max_length=6)
    assert len(cut.ids) == 6
    assert cut.ids[0] == tokenizer.bos_token_id
    assert cut.ids[1:] == full.ids[-5:]
    assert cut.offsets[1:] == full.offsets[-5:]
    assert cut.ids[cut.prompt_tokens :] == full.ids[full.prompt_tokens :]
    assert (cut.text, cut.prompt_chars) == (full.text, full.prompt_chars)
    (same,) = model.encode([prompt], [completion], on_long="truncate")
    assert same == full


def test_too_long(model):
    long = "the capital of France is Paris. " * 20
    with pytest.raises(DataError, match=r"row 1 has \d+ tokens, over the limit of 64"):
        model.encode(["short", long])
    with pytest.raises(DataError, match=r"row 0: its completion has \d+ tokens"):
        model.encode(["the"], [long], on_long="truncate")
    assert len(model.encode([long], on_long="truncate")[0].ids) == 64


@pytest.mark.parametrize(
    ("prompts", "completions", "said"),
    [
        ([], None, "there are no prompts"),
        ("the capital", None, "put it in a list"),
        (CHAT, None, "not one chat"),
        (["the", ""], None, "row 1: the prompt is empty"),
        (["the", []], None, "row 1: the chat has no messages"),
        ([3], None, "row 0: a prompt is text or a list of messages, not a int"),
        ([[{"role": "user"}]], None, "row 0: each message of a chat needs"),
        (["the", "a"], ["x"], "2 prompts but 1 completions"),
        (["the"], [3], "row 0: the completion is a int"),
    ],
)
def test_prompts_that_cannot_be_used(model, prompts, completions, said):
    with pytest.raises(DataError, match=said) as raised:
        model.encode(prompts, completions)
    assert "\n" not in str(raised.value)


def test_a_missing_or_refusing_chat_template(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match=r"row 1 is a chat, but this tokenizer has no chat template"):
        tokens.encode(bare, ["text", CHAT])
    bare.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match=r"row 0: the chat template refused the chat \(no system role here\)"):
        tokens.encode(bare, [CHAT])


def test_no_tokenizer():
    with pytest.raises(DataError, match="has no tokenizer"):
        vd.load(make("llama"), check=False).encode(["a"])


def test_bad_options(model):
    with pytest.raises(InputError, match="on_long is 'cut'"):
        model.encode(["a"], on_long="cut")
    with pytest.raises(InputError, match="padding_side is 'both'"):
        model.batch([[1, 2]], "both")
    with pytest.raises(DataError, match="empty batch"):
        model.batch([])


def test_batches(model, hooked):
    items = model.encode(["the capital of France", "gold"])
    right, left = model.batch(items), model.batch(items, "left")
    lengths = [len(item.ids) for item in items]
    short = lengths[1]
    assert right["attention_mask"].sum(1).tolist() == left["attention_mask"].sum(1).tolist() == lengths
    assert right["input_ids"][1, :short].tolist() == list(items[1].ids)
    assert left["input_ids"][1, -short:].tolist() == list(items[1].ids)
    assert right["input_ids"][1, short:].unique().tolist() == [0]
    for batch in (right, left):
        real = batch["attention_mask"].bool()
        assert torch.equal(batch["position_ids"][1][real[1]], torch.arange(short))
    assert set(hooked("bert").batch([[1]])) == {"input_ids", "attention_mask", "position_ids"}


def test_padding_id(tokenizer):
    class Config:
        pad_token_id, eos_token_id = None, [7, 8]

    assert tokens.pad_id(tokenizer, Config) == 0
    assert tokens.pad_id(None, Config) == 7
    assert tokens.pad_id(None, None) == 0


def test_batches_by_length():
    lengths = [3, 9, 1, 8, 3, 20, 2]
    batches = tokens.by_length(lengths, 18)
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert batches[0] == [5]  # alone, over the budget
    for batch in batches[1:]:
        assert max(lengths[row] for row in batch) * len(batch) <= 18
    assert tokens.by_length(lengths, 1000) == [[5, 1, 3, 0, 4, 6, 2]]
