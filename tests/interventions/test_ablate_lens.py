"""Ablation of TransformerLens models: the same calls, the same numbers."""

import pytest
import torch

import veridical as vd
from tiny_models import make
from veridical.interventions import ablate

ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]


@pytest.fixture(scope="module")
def handles(tokenizer, tmp_path_factory):
    pytest.importorskip("transformer_lens")
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    theirs = TransformerBridge.boot_transformers(
        "tiny",
        hf_model=make("gpt2", attn_implementation="eager"),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
    )
    return vd.load(make("gpt2"), tokenizer=tokenizer, check=False), vd.load(theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"sites": "z.1", "heads": [0, 2]},
        {"sites": "mlp_out.0", "mode": "mean", "over": torch.tensor([[5, 6, 7], [20, 21, 22]])},
        {"sites": "resid_post.1", "positions": [1, -1]},
        {"sites": "mlp_post.1", "neurons": [4, 9], "positions": slice(1, None)},
    ],
)
def test_a_bridge_gives_what_the_model_gives(handles, options):
    options = dict(options)
    sites, found = options.pop("sites"), []
    for model in handles:
        inputs = model.batch(ROWS)
        with torch.no_grad(), ablate(model, sites, **options):
            logits = model.run(inputs).logits
        found.append(logits[inputs["attention_mask"].bool()].log_softmax(-1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
