"""Tiny models of every supported family and a tokenizer trained here, made offline, once for the session."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

from tiny_models import VOCABULARY, make
from verb_data import save_llama, save_statements

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """The model of a family, made once; tests leave it as it is."""

    def get(name):
        if name not in MADE:
            MADE[name] = make(name)
        return MADE[name]

    return get


MADE = {}


@pytest.fixture(autouse=True)
def _shared_models_are_left_without_hooks():
    yield
    if MADE:
        from veridical.hooks import standing_hooks

        left = {name: hooks for name, module in MADE.items() if (hooks := standing_hooks(module))}
        for name in left:
            del MADE[name]  # made anew for the next test that asks for it
        assert not left, f"hooks left on models that all tests share: {left}"


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """The folder of a small chat model with random weights."""
    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def statements(tmp_path):
    """A csv of pairs of a true and a false statement."""
    return save_statements(tmp_path / "pairs.csv")


@pytest.fixture
def one_thread():
    """One thread for what runs small products; what there was is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CORPUS = (
    "the capital of France is Paris and the capital of Italy is Rome. "
    "what is the symbol of gold? it is Au, and that of silver is Ag! "
    "tell the truth or tell a lie; answer yes or no, true or false."
)
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE; its chat template holds the begin-of-sequence token, and plain text gets one too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([CORPUS] * 3, trainer)
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
        ]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="session")
def hooked(tiny, tokenizer):
    """The handle of a family, made once."""
    import veridical as vd

    made = {}

    def get(name):
        if name not in made:
            made[name] = vd.load(tiny(name), tokenizer=tokenizer if name != "vit" else None)
        return made[name]

    return get
