"""Which pairs of models can be compared, by what, and what is said of the rest."""

import copy

import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import make
from verb_data import save_llama
from verb_data import tokenizer as other_tokenizer
from veridical.comparison import compare, load_pair
from veridical.comparison.duo import pair_of
from veridical.comparison.rows import rows_of
from veridical.errors import DataError, InputError, ModelError

QUICK = {"samples": 2, "max_new_tokens": 3, "bootstrap": 10, "behaviour_pairs": 4}
TEXTS = ["the capital of France is Paris", "tell the truth or tell a lie", "gold?"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


def handle(model, tokenizer):
    return vd.load(model, tokenizer=tokenizer, check=False)


def test_a_reference_that_is_the_policy(llama, tmp_path):
    with pytest.raises(InputError, match=r"both tiny-liar; expected the model that the policy started from"):
        load_pair("tiny-liar", reference="tiny-liar")
    (tmp_path / "link").symlink_to(llama)
    with pytest.raises(InputError, match="both"):
        load_pair(tmp_path / "link", reference=llama)
    with pytest.raises(InputError, match="needs a reference"):
        load_pair(llama)
    with pytest.raises(InputError, match="kind 'encoder'"):
        load_pair(make("bert"), reference=make("bert"))
    with pytest.raises(InputError, match="no model folder"):
        load_pair(llama, reference="./nowhere")


def test_two_folders(llama, tmp_path):
    other = save_llama(tmp_path / "other", seed=1)
    duo = load_pair(other, reference=llama)
    assert duo.not_applicable == {}
    assert duo.vocabulary == 400
    assert duo.layers == [(0, 0), (1, 1)]
    assert "tiny-llama" in repr(duo)


def test_another_vocabulary(tiny, tokenizer):
    other = other_tokenizer("causal")
    other.chat_template = None
    duo = pair_of(handle(make("qwen2", vocab_size=400), other), handle(tiny("llama"), tokenizer))
    assert not duo.same_tokens
    assert "the tokenizers differ" in duo.not_applicable["KL"]
    rows = rows_of(duo, TEXTS)
    for row, text in zip(rows.rows, TEXTS):
        for at, (ours, theirs) in enumerate(zip(row.places, row.others)):
            said = [
                one.decode(ids[: end + 1], skip_special_tokens=True)
                for one, ids, end in ((other, row.policy, ours), (tokenizer, row.reference, theirs))
            ]
            assert said[0] == said[1] == text[: len(said[0])], at
    found = compare(duo, TEXTS, **QUICK)
    assert {"cka", "drift", "generations"} <= set(found.tables)
    assert not any(name.startswith("outputs") for name in found.tables)
    assert any(line.startswith("Not applicable, as the tokenizers differ") for line in found.findings())
    with pytest.raises(InputError, match="do not share their tokens"):
        compare(duo, torch.ones(2, 4, dtype=torch.long), **QUICK)
    with pytest.raises(DataError, match="no chat template"):
        compare(duo, CHATS, **QUICK)


def test_another_depth_and_width(tokenizer):
    deep = handle(make("llama", num_hidden_layers=6), tokenizer)
    base = handle(make("llama"), tokenizer)
    duo = pair_of(deep, base)
    assert duo.layers == [(1, 0), (3, 1), (5, 2)]
    found = compare(duo, TEXTS, **QUICK)
    assert {"drift", "weights"} <= set(duo.not_applicable)
    assert {"outputs on fixed text", "cka", "procrustes", "difference lens"} <= set(found.tables)
    assert "drift" not in found.tables
    with pytest.raises(InputError, match="Not applicable: the policy has 6 layers and the reference 3"):
        found.table("drift")
    wide = pair_of(handle(make("llama", hidden_size=48), tokenizer), base)
    found = compare(wide, TEXTS, **QUICK)
    assert {"outputs on fixed text", "cka", "logit-lens divergence"} <= set(found.tables)
    assert not {"drift", "procrustes", "difference lens", "weights"} & set(found.tables)
    assert np.isfinite(found.table("cka")["cka"]).all()


def test_logits_over_more_tokens(tokenizer):
    """A policy whose vocabulary was padded is compared over the tokens of both."""
    duo = pair_of(handle(make("llama", vocab_size=320), tokenizer), handle(make("llama"), tokenizer))
    assert duo.vocabulary == 300
    assert "over the 300 that both have" in " ".join(duo.notes)
    line = compare(duo, TEXTS, **QUICK).table("outputs on fixed text").iloc[0]
    with torch.no_grad():
        logs = [
            model.logits(TEXTS[:1])[0, :, :300].double().log_softmax(-1)
            for model in (duo.policy, duo.reference)
        ]
    assert line["measure"] == "kl"
    one = compare(duo, TEXTS[:1], **QUICK).table("outputs on fixed text").iloc[0]
    expected = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert one["value"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", [0, 1])
def test_a_missing_chat_template(tiny, tokenizer, side):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    tokenizers = [tokenizer, bare] if side else [bare, tokenizer]
    models = [handle(tiny("llama"), one) for one in tokenizers]
    duo = pair_of(*models)
    assert f"{models[side].path} has no chat template; both read chats in that of" in " ".join(duo.notes)
    ours, theirs = duo.encode(CHATS)
    assert ours[0].ids == theirs[0].ids == handle(tiny("llama"), tokenizer).encode(CHATS)[0].ids
    assert "outputs on policy samples" in compare(duo, CHATS, **QUICK).tables
    assert models[side].tokenizer is bare, "the handle that was given stays as it was"
    neither = pair_of(*(handle(tiny("llama"), bare) for _ in range(2)))
    with pytest.raises(DataError, match="no chat template"):
        compare(neither, CHATS, **QUICK)


def lora(folder, base, layer=1, empty=False):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[layer])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not empty:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_a_lora_folder(llama, tmp_path):
    folder = lora(tmp_path / "lora", llama)
    duo = load_pair(folder, reference=llama)
    assert "merged into its weights" in " ".join(duo.notes)
    found = compare(duo, TEXTS, **QUICK)
    layers = found.table("weights by layer").set_index("layer")["share"]
    assert layers[1] == pytest.approx(1)
    module = found.table("weights").set_index("module").loc["model.layers.1.mlp.down_proj.weight"]
    assert module["rank"] == 2
    assert load_pair(folder).reference.fingerprint() == duo.reference.fingerprint()
    assert load_pair(str(folder), reference=llama).policy.fingerprint() == duo.policy.fingerprint()
    with pytest.raises(InputError, match="is an adapter, and a reference is the model before"):
        load_pair(llama, reference=folder)
    idle = load_pair(lora(tmp_path / "idle", llama, empty=True))
    assert "but changes nothing" in " ".join(idle.notes)


def test_a_lora_whose_base_is_not_here(llama, tmp_path):
    from veridical.files import read_json, write_json

    folder = lora(tmp_path / "lora", llama)
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": "./gone"})
    assert "(./gone) is not here; it was put on" in " ".join(load_pair(folder, reference=llama).notes)
    with pytest.raises(InputError, match=r"no model folder at \./gone"):
        load_pair(folder)
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": None})
    with pytest.raises(InputError, match="names no base"):
        load_pair(folder)
    write_json(folder / "adapter_config.json", {**config, "peft_type": "NOTHING"})
    with pytest.raises(ModelError, match="cannot put the adapter"):
        load_pair(folder, reference=llama)
