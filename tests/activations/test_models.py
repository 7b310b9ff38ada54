"""Collection on real (tiny, random) transformers: batched, padded and picked equals each prompt alone."""

import pandas as pd
import pytest
import torch

import veridical as vd
from veridical.errors import DataError, InputError, UnknownNameError
from veridical.hooks import standing_hooks

TEXTS = ["the capital of France", "a", "tell the truth or tell a lie; answer yes or no", "gold"]
CHATS = [
    [{"role": "system", "content": "tell the truth"}, {"role": "user", "content": "the capital of Italy"}],
    [{"role": "user", "content": "gold"}],
]


def alone(model, text, site, completion=None):
    """Every token's vector with nothing else in the batch, read by the engine without stopping early."""
    encoded = model.encode([text], [completion] if completion else None)
    with torch.no_grad():
        return model.run(model.batch(encoded), read=[site]).values[site][0], encoded[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3_moe", "bert"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_batch_equals_each_prompt_alone(hooked, family, padding):
    model = hooked(family)
    acts = vd.collect(model, TEXTS, tokens="all", padding=padding, batch_tokens=64)
    assert len(acts.sites) == model.n_layers
    for site in acts.sites:
        wanted = torch.cat([alone(model, text, site)[0] for text in TEXTS])
        torch.testing.assert_close(acts[site], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["z.1", "k.2", "mlp_out.0", "embed", "ln_final", "model.layers.1.mlp:in"])
def test_every_kind_of_site(hooked, site):
    model = hooked("llama")
    acts = vd.collect(model, TEXTS, sites=site, tokens="last", batch_tokens=30)
    name = acts.sites[0]
    wanted = torch.stack([alone(model, text, name)[0][-1] for text in TEXTS])
    torch.testing.assert_close(acts[name], wanted, rtol=1e-4, atol=1e-5)


def test_the_completion_is_what_answer_reads_also_in_a_chat(hooked):
    model = hooked("llama")
    pairs = vd.Pairs.from_pandas(
        pd.DataFrame({"prompt": CHATS, "completion": ["Rome", "it is Au"], "label": [1, 0]})
    )
    acts = vd.collect(model, pairs, sites="resid_post.1", tokens="answer")
    for row, said in enumerate(["Rome", "it is Au"]):
        read = acts.index[acts.index["row"] == row]
        assert model.tokenizer.decode(read["token_id"].tolist()) == said
    before = vd.collect(model, pairs, sites="resid_post.1", tokens="prompt_last")
    assert before.index["token"].tolist() == ["<|assistant|>"] * 2
    values, encoded = alone(model, CHATS[1], "blocks.1.hook_resid_post", "it is Au")
    torch.testing.assert_close(
        before["resid_post.1"][1], values[encoded.prompt_tokens - 1], rtol=1e-4, atol=1e-5
    )
    assert acts.labels("label").tolist() == [1 if row == 0 else 0 for row in acts.index["row"]]


def test_a_span_reads_the_tokens_of_its_characters(hooked):
    import datasets

    model = hooked("llama")
    text = "the capital of France is Paris"
    data = datasets.Dataset.from_dict({"text": [text], "span_start": [15], "span_end": [21]})
    acts = vd.collect(model, data, sites="resid_post.0", tokens="span")
    assert "".join(acts.index["token"]).strip() == "France"


def test_nothing_beyond_the_deepest_site_runs(tiny, hooked):
    model = hooked("llama")
    ran = []
    module = tiny("llama")
    watched = [*module.model.layers, module.model.norm, module.lm_head]
    handles = [part.register_forward_hook(lambda m, *_: ran.append(watched.index(m))) for part in watched]
    try:
        vd.collect(model, TEXTS, sites=["resid_post.1", "mlp_out.0"])
    finally:
        for handle in handles:
            handle.remove()
    assert max(ran) <= 1


def test_the_model_is_as_before(tiny, hooked):
    model, module = hooked("llama"), tiny("llama")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.train()
    try:
        vd.collect(model, TEXTS, sites="resid_post.*,z.1")
        assert module.training
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert not standing_hooks(module)
        assert all(parameter.requires_grad for parameter in module.parameters())
    finally:
        module.eval()


def test_hooks_are_gone_after_an_error_in_the_middle(tiny, hooked, tmp_path):
    model, module = hooked("llama"), tiny("llama")
    weight = module.model.layers[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        with pytest.raises(vd.VeridicalError, match=r"NaN at blocks.1.hook_resid_post in row \d at position"):
            vd.collect(model, TEXTS, store=tmp_path / "store")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert not standing_hooks(module)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_store_holds_what_memory_holds(hooked, tmp_path, dtype):
    model = hooked("gpt2")
    options = {"sites": "resid_post.*", "tokens": "all", "dtype": dtype, "batch_tokens": 16}
    memory = vd.collect(model, TEXTS * 5, **options)
    disk = vd.collect(model, TEXTS * 5, store=tmp_path / "store", **options)
    again = vd.Activations.open(tmp_path / "store")
    for site in memory.sites:
        assert torch.equal(memory[site], disk[site])
        assert torch.equal(memory[site], again[site])
        assert torch.equal(memory.moments[site].mean, again.moments[site].mean)


def test_a_store_of_another_model_is_refused(hooked, tmp_path):
    vd.collect(hooked("llama"), TEXTS, store=tmp_path / "store")
    with pytest.raises(vd.VeridicalError, match=r"model fingerprint: .* -> "):
        vd.collect(hooked("mistral"), TEXTS, store=tmp_path / "store")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sites": "resid_pst.1"}, UnknownNameError, "resid_post"),
        ({"sites": "resid_post.9"}, UnknownNameError, "resid_post"),
        ({"sites": "pattern.0"}, InputError, "read it with model.run"),
        ({"max_length": 3}, DataError, "row 0"),
    ],
)
def test_what_cannot_be_collected(hooked, options, error, said):
    with pytest.raises(error, match=said):
        vd.collect(hooked("llama"), TEXTS, **options)


def test_a_long_prompt_is_cut_when_asked(hooked):
    acts = vd.collect(hooked("llama"), TEXTS, tokens="all", max_length=4, on_long="truncate")
    assert acts.index.groupby("row").size().max() == 4


def test_images_are_not_text(hooked):
    with pytest.raises(InputError, match="vision transformer"):
        vd.collect(hooked("vit"), TEXTS)


def test_a_pair_is_one_group(hooked):
    frame = pd.DataFrame({"pair": ["x", "x", "y"], "prompt": ["a", "gold", "Au"], "label": [0, 1, 1]})
    acts = vd.collect(hooked("llama"), vd.Pairs.from_pandas(frame), tokens="last")
    assert acts.groups[0] == acts.groups[1] != acts.groups[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", ["last", "all", "mean"])
def test_a_gpu_gives_what_the_cpu_gives(tiny, tokenizer, hooked, tmp_path, tokens):
    import copy

    options = {"tokens": tokens, "batch_tokens": 16}
    cpu = vd.collect(hooked("llama"), TEXTS * 8, **options)
    gpu = vd.load(copy.deepcopy(tiny("llama")).cuda(), tokenizer=tokenizer)
    acts = vd.collect(gpu, TEXTS * 8, store=tmp_path / "store", **options)
    for site in cpu.sites:
        torch.testing.assert_close(acts[site], cpu[site], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(acts.moments[site].mean, acts[site].double().mean(0))
    acts.verify()
