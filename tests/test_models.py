"""Loading, the self-test, fingerprints, log-probabilities of options, and generation."""

import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import CAUSAL, TINY, make
from veridical import selftest, weights
from veridical.errors import DataError, InputError, ModelError
from veridical.hooks import standing_hooks
from veridical.models import choose
from veridical.sites import Site

CHAT = [{"role": "user", "content": "what is the capital of France?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("llama")
    make("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# Loading


def test_a_folder(folder, hooked, caplog):
    with caplog.at_level(logging.INFO, "veridical"):
        model = vd.load(folder)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert line == f"{folder}: float32 on cpu: no accelerator found" or torch.cuda.is_available()
    assert (model.kind, model.path) == ("causal", str(folder))
    assert not model.model.training
    text = "the capital of France is"
    torch.testing.assert_close(model.logits(text), hooked("llama").logits(text))
    assert "llama, 3 layers of width 32" in repr(model)
    assert vd.load(model) is model


@pytest.mark.parametrize(
    "name", [name for name in TINY if "_" not in name or name in ("gpt_neox", "qwen3_moe")]
)
def test_every_family_from_its_folder(tmp_path, name, hooked):
    """The class is chosen from the config: head and all."""
    make(name).save_pretrained(tmp_path)
    model = vd.load(tmp_path)
    assert type(model.model) is type(hooked(name).model)
    assert model.kind == {"bert": "encoder", "vit": "vision"}.get(name, "causal")
    inputs = model.dummy_inputs()
    torch.testing.assert_close(model.run(inputs).logits, hooked(name).run(inputs).logits)


def test_loading_is_quiet_and_needs_no_network(folder):
    code = f"import veridical as vd; m = vd.load({str(folder)!r}); print(len(m.sites()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "35"
    assert run.stderr.strip() == ""


def test_options_pass_through(folder):
    assert vd.load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert vd.load(folder, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(InputError, match="unknown dtype 'float33'"):
        vd.load(folder, dtype="float33")


def test_placement_options_reach_transformers(folder, monkeypatch):
    import transformers

    seen, plain = {}, transformers.AutoModelForCausalLM.from_pretrained

    def spy(path, **options):
        seen.update(options)
        return plain(path)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy)
    quantised = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = vd.load(folder, device_map="auto", quantization_config=quantised, dtype="bfloat16")
    assert (seen["device_map"], seen["quantization_config"]) == ("auto", quantised)
    assert (seen["dtype"], seen["use_safetensors"], seen["trust_remote_code"]) == (
        torch.bfloat16,
        True,
        False,
    )
    assert model.n_layers == 3


def test_the_choice_of_device_says_why(monkeypatch):
    class Config:
        dtype = torch.bfloat16

    assert choose("cpu", None, Config)[2] == "float32 on cpu: as asked"
    assert choose("cpu", "bfloat16", Config)[1] == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    where, number, why = choose(None, None, Config)
    assert (where.type, number) == ("cuda", torch.bfloat16)
    assert why == "bfloat16 on cuda: found a GPU; the checkpoint's own format"


def test_pickled_weights_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match="holds no weights"):
        vd.load(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only as pytorch_model\.bin, a format that can run code"):
        vd.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nothing-here", "no model folder at ./nothing-here"),
        ("tiny-lair", "unknown model 'tiny-lair'; nearest: tiny-liar"),
        ("some-org/no-such-model", "cannot load 'some-org/no-such-model'"),
    ],
)
def test_names_that_are_no_model(name, said):
    with pytest.raises((InputError, ModelError), match=said) as raised:
        vd.load(name)
    assert "\n" not in str(raised.value)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        vd.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "the-base"}))
    with pytest.raises(ModelError, match="cannot load"):
        vd.load(tmp_path)
    with pytest.raises(InputError, match="cannot load a int"):
        vd.load(3)


def test_damaged_weights_are_one_line(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(content if name == "config.json" else content[:1000])
    with pytest.raises(ModelError, match="cannot load") as raised:
        vd.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_remote_code_only_on_the_flag(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "code.py").write_text("raise SystemExit('remote code ran')\n")
    with pytest.raises(ModelError, match="cannot load"):
        vd.load(tmp_path)


def test_a_given_module_is_left_as_it_is(tokenizer):
    module = make("llama")
    module.train()
    module.model.layers[0].eval()
    module.requires_grad_(False)
    modes = [part.training for part in module.modules()]
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random = torch.get_rng_state()
    model = vd.load(module, tokenizer=tokenizer)
    assert model.model is module
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in module.modules()] == modes
    assert not standing_hooks(module)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    for option in ({"device": "cpu"}, {"dtype": "float32"}, {"device_map": "auto"}):
        with pytest.raises(InputError, match="left as it is"):
            vd.load(module, **option)


def test_dropout_in_training_mode_is_said(caplog):
    module = make("gpt2")
    vd.load(module)
    assert "dropout" not in caplog.text
    vd.load(module.train())
    assert "training mode with dropout" in caplog.text
    assert module.training


def test_peft_models(tokenizer):
    peft = pytest.importorskip("peft")
    base = vd.load(make("llama"), tokenizer=tokenizer)
    torch.manual_seed(0)
    module = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2))
    model = vd.load(module.eval(), tokenizer=tokenizer)
    assert model.sites() == base.sites()
    assert model.fingerprint() != base.fingerprint()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    changed = model.fingerprint()
    inputs = base.batch([[5, 6, 7]])
    with module.disable_adapter():
        assert model.fingerprint() == base.fingerprint()
        assert torch.equal(model.run(inputs, read="z.1")["z.1"], base.run(inputs, read="z.1")["z.1"])
    assert model.fingerprint() == changed
    assert not torch.allclose(model.run(inputs, read="q.1")["q.1"], base.run(inputs, read="q.1")["q.1"])
    assert model.sites("base_model.model.model.layers.0:out, model.layers.1:out")
    assert isinstance(model.generate("the capital"), str)


# The self-test


def break_z(model):
    place = model.place(Site("z", 0))
    model.architecture.places[Site("z", 0)] = type(place)(place.module, "in", (3, 5), place.view)


def break_attn_out(model):
    place = model.place(Site("attn_out", 1))
    model.architecture.places[Site("attn_out", 1)] = type(place)(
        model.model.model.layers[1].input_layernorm, "out", (32,)
    )


def break_mid(model):
    place = model.place(Site("resid_mid", 0))
    model.architecture.places[Site("resid_mid", 0)] = type(place)(place.module, "in", (32,), carried=False)


def break_effect(model):
    """A module on the side, whose output is used by nothing."""
    block = model.model.model.layers[0]
    block.side = torch.nn.Identity()
    block.mlp.register_forward_hook(lambda module, args, output: block.side(output) is None or None)
    place = model.place(Site("mlp_out", 0))
    model.architecture.places[Site("mlp_out", 0)] = type(place)(block.side, "out", (32,))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (break_z, r"the site z\.0 has shape"),
        (break_attn_out, r"the site resid_mid\.1 is not resid_pre \+ attn_out"),
        (break_mid, r"the site resid_mid\.0 reaches the MLP when edited, but not the residual stream"),
        (break_effect, r"the site mlp_out\.0 can be edited without effect"),
    ],
)
def test_the_self_test_finds_what_is_wrong(spoil, said):
    model = vd.load(make("llama"))
    spoil(model)
    with pytest.raises(ModelError, match=said) as raised:
        selftest.check(model)
    assert "\n" not in str(raised.value)


def test_the_self_test_finds_rows_that_do_not_sum_to_one(monkeypatch):
    from veridical import attention

    model, right = vd.load(make("llama")), attention.pattern_of
    monkeypatch.setattr(attention, "pattern_of", lambda *args, **options: right(*args, **options) * 0.9)
    with pytest.raises(ModelError, match=r"pattern\.0 holds rows that do not sum to one"):
        selftest.check(model)


def test_a_large_model_is_checked_in_its_first_block(monkeypatch, caplog):
    monkeypatch.setattr(selftest, "LARGE", 10)
    model, calls = vd.load(make("llama"), check=False), []
    model.model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.INFO, "veridical"):
        selftest.check(model)
    assert not calls
    assert "first block only" in caplog.text


def test_the_meta_device_is_not_checked(caplog):
    with torch.device("meta"):
        module = make("llama")
    with caplog.at_level(logging.INFO, "veridical"):
        model = vd.load(module)
    assert "meta device" in caplog.text
    assert len(model.sites()) == 35


# Fingerprints


def test_fingerprints_are_stable_and_see_edits(folder, tmp_path):
    first = vd.load(folder).fingerprint()
    module = make("llama")
    assert vd.load(module).fingerprint() == first
    module.save_pretrained(tmp_path)
    code = f"import veridical as vd; print(vd.load({str(tmp_path)!r}).fingerprint())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == first
    for name, parameter in module.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[parameter.numel() // 2] += 0.001
        assert weights.fingerprint(module) != first, name
        with torch.no_grad():
            parameter.copy_(before)
    assert weights.fingerprint(module) == first
    assert weights.fingerprint(module.to(torch.bfloat16)) != first
    assert (
        weights.fingerprint(make("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
        != first
    )
    assert weights.fingerprint(make("llama", attn_implementation="eager")) == first


def test_large_tensors_are_sampled_with_their_ends():
    layer = torch.nn.Linear(1024, 1024, bias=False)
    first = weights.fingerprint(layer)
    for index in (0, -1):
        with torch.no_grad():
            layer.weight.view(-1)[index] += 1
        assert weights.fingerprint(layer) != first
        first = weights.fingerprint(layer)
    with torch.no_grad():
        layer.weight += 1e-3 * torch.randn(1024, 1) @ torch.randn(1, 1024)  # of rank one
    assert weights.fingerprint(layer) != first


# Log-probabilities of options


def naive(model, prompt, option):
    """One option at a time, full logits, plain softmax."""
    (item,) = model.encode([prompt], [option])
    with torch.no_grad():
        logits = model.model(torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
    return sum(logits[at - 1, item.ids[at]].item() for at in range(item.prompt_tokens, len(item.ids)))


PROMPTS = ["the capital of France is", CHAT, "yes", "tell the truth or tell a lie; it is "]
OPTIONS = [
    [" Paris", " Rome", " Paris and Rome", " P"],
    ["Paris", "Rome"],
    [" or no!"],
    ["true", "false", "a lie?"],
]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_option_logprobs_equal_the_plain_loop(hooked, name, batch_tokens):
    model = hooked(name)
    found = model.option_logprobs(PROMPTS, OPTIONS, batch_tokens=batch_tokens)
    assert [len(values) for values in found] == [4, 2, 1, 3]
    for prompt, options, values in zip(PROMPTS, OPTIONS, found):
        expected = [naive(model, prompt, option) for option in options]
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


def test_option_probabilities_sum_to_one(hooked, tokenizer):
    """All single tokens as options cover everything."""
    model = hooked("llama")
    prompt = "the capital of France is"
    options = [tokenizer.decode([index]) for index in range(6, 300)]
    usable = [
        option
        for option in options
        if len(model.encode([prompt], [option])[0].ids) == len(model.encode([prompt])[0].ids) + 1
    ]
    (values,) = model.option_logprobs([prompt], [usable])
    assert len(usable) > 100
    assert 0 < math.fsum(np.exp(values)) <= 1


def test_options_of_one_token_share_a_row(hooked, monkeypatch):
    from veridical import scoring

    rows, plain = [], scoring.last_logits
    monkeypatch.setattr(
        scoring, "last_logits", lambda model, given, count: rows.extend(given) or plain(model, given, count)
    )
    model = hooked("llama")
    model.option_logprobs(["the capital is", "the capital is"], [["!", "?", "! and so on"], ["!", "?"]])
    assert len(rows) == 1


def test_options_that_cannot_be_scored(hooked):
    model = hooked("llama")
    with pytest.raises(DataError, match="row 1 has no options"):
        model.option_logprobs(["a", "b"], [["x"], []])
    with pytest.raises(DataError, match="2 prompts but 1 lists"):
        model.option_logprobs(["a", "b"], [["x"]])
    with pytest.raises(DataError, match="row 0: the option '' has no tokens"):
        model.option_logprobs(["a"], [["x", ""]])
    with pytest.raises(DataError, match="no prompts"):
        model.option_logprobs([], [])


# Text


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_in_a_batch_equals_alone(hooked, name):
    model = hooked(name)
    prompts = ["the capital of France is", CHAT, "gold"]
    together = model.generate(prompts, max_new_tokens=5)
    assert together == [model.generate(prompt, max_new_tokens=5) for prompt in prompts]
    assert len(together) == 3


def test_generation_is_the_argmax_of_the_logits(hooked, tokenizer):
    model = hooked("llama")
    ids = list(model.encode(["the capital of France is"])[0].ids)
    start = len(ids)
    for _ in range(5):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    new = tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert model.generate("the capital of France is", max_new_tokens=5) == new
    torch.manual_seed(0)
    assert model.generate("the capital", max_new_tokens=8, do_sample=True, temperature=5.0) != model.generate(
        "the capital", max_new_tokens=8
    )


def test_an_encoder_does_not_generate(hooked):
    with pytest.raises(InputError, match="does not generate"):
        hooked("bert").generate("the capital")


def test_logits_of_texts_chats_and_tokens(hooked, tokenizer):
    model = hooked("llama")
    texts = ["the capital of France", "gold"]
    logits = model.logits(texts)
    for row, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        alone = model.model(ids).logits[0]
        torch.testing.assert_close(logits[row, : ids.shape[1]], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.logits(ids)[0], alone)
    assert model.logits(CHAT).shape[0] == 1


def test_dimensions_of_a_vision_model(hooked):
    model = hooked("vit")
    assert (model.kind, model.context_length, model.width("resid_post.0")) == ("vision", 10, (32,))
    run = model.run({"pixel_values": torch.randn(2, 3, 24, 24)}, read=["resid_post.0"])
    assert run["resid_post.0"].shape == (2, 10, 32)
    assert run.logits.shape == (2, 3)


def test_loading_time_of_the_self_test():
    """The whole check of a small model stays well under a second."""
    import time

    model = vd.load(make("llama"))
    begin = time.perf_counter()
    selftest.check(model)
    assert time.perf_counter() - begin < 0.5
