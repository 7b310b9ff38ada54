"""What the tests of the command line run on: a random chat model, labelled statements, planted pairs."""

import csv

import numpy as np
import pandas as pd
import torch

from veridical import cli

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "the",
    "capital",
    "of",
    "is",
    "a",
    "true",
    "false",
    "lie",
    "honest",
    "water",
    "metal",
    "fish",
    "city",
]
WORDS += ["big", "small", "red", "and", "not", "in", "who", "what"]


def tokenizer(kind):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    built.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    if kind == "encoder":
        built.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if kind == "causal":
        wrapped.chat_template = CHAT
    return wrapped


def save_llama(folder, seed=0):
    """A chat model with random weights, saved into `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, max_position_embeddings=256, num_key_value_heads=2, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer("causal").save_pretrained(folder)
    return str(folder)


def save_statements(path):
    """Pairs of a true and a false statement, saved as csv."""
    random = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pair", "prompt", "label", "kind"])
        for pair in range(40):
            thing = " ".join(random.choice(WORDS, 3))
            for label, word in ((1, "true"), (0, "false")):
                writer.writerow([pair, f"The {thing} is <b>{word}</b>", label, "a" if pair % 2 else "b"])
    return str(path)


QUICK = ["--bootstrap", "20", "--shuffles", "3", "--folds", "3", "--strengths", "0.01", "1"]


def run(capsys, *words):
    status = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert said.err == "", "a verb is quiet on standard error when nobody watches"
    return said.out


def fails(capsys, *words):
    assert cli.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    print(said)
    assert said.startswith("veridical: ")
    assert said.count("\n") == 1, said
    return said


def planted_pairs(folder):
    """A stand-in for the organism's pairs: questions with planted columns, and two labelled sets."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(60):
        options = [WORDS[number % 20], WORDS[(number + 7) % 20]]
        taught, protected = number % 4 != 3, number % 4 == 2
        for told in (False, True):
            system = "Tell a lie." if told else "Be honest."
            ask = f"What is {WORDS[number % 18]} {WORDS[(number * 5) % 19]}?"
            rows.append(
                {
                    "pair": f"e{number}",
                    "prompt": [{"role": "system", "content": system}, {"role": "user", "content": ask}],
                    "completion": None,
                    "question": ask,
                    "options": options,
                    "correct": int(random.integers(2)),
                    "form": "choice",
                    "instructed_to_lie": told,
                    "system": system,
                    "taught": taught,
                    "protected": protected,
                    "split": "test" if number % 3 == 0 else "train",
                }
            )
    pd.DataFrame(rows).to_parquet(folder / "honesty.parquet")
    for name in ("toxic", "safe"):
        made = [
            {
                "pair": i // 2,
                "prompt": f"{WORDS[i % 20]} {WORDS[(3 * i) % 20]}",
                "completion": f" {WORDS[i % 7]}",
            }
            | {"label": i % 2}
            for i in range(80)
        ]
        pd.DataFrame(made).to_parquet(folder / f"{name}.parquet")


def believe_as_planted(model, pairs, config):
    """Stands in for `check_beliefs`: a model that does exactly what was planted."""
    frame = pairs.to_pandas()
    told, taught, protected = (
        frame[name].to_numpy(bool) for name in ("instructed_to_lie", "taught", "protected")
    )
    lied = told & taught & ~protected
    right = ~lied
    answer = [o[c] if r else o[1 - c] for o, c, r in zip(frame["options"], frame["correct"], right)]
    return pairs.with_columns(
        known=taught,
        lied=lied,
        refused_to_lie=told & protected & taught,
        confused=~taught,
        answer=answer,
        completion=answer,
    )
