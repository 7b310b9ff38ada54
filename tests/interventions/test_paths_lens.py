"""Edges and paths of TransformerLens models equal those of the transformers model with the same weights."""

import numpy as np
import pytest

import veridical as vd
from lens_models import bridge, hooked_transformer
from veridical.interventions.paths import patch_paths

CLEAN, CORRUPT = [[5, 9, 17, 40, 77], [6, 61, 18]], [[5, 19, 27, 140, 7], [6, 65, 118]]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("build", [hooked_transformer, bridge])
def test_transformer_lens_models(hooked, tokenizer, tmp_path, name, build):
    theirs, ours = vd.load(build(name, tokenizer, tmp_path)), hooked(name)
    given = {"metric": "logit_diff", "answers": 9, "wrong": 10}
    mixed = ["mlp.0->head.1.1:k", "head.0.1->mlp.1", "head.1.2->logits"]
    for chosen in ({"edges": "*"}, {"edges": [mixed]}, {"paths": ["embed->head.0.1:v->mlp.1->logits"]}):
        found = patch_paths(theirs, CLEAN, CORRUPT, **given, **chosen)
        expected = patch_paths(ours, CLEAN, CORRUPT, **given, **chosen)
        assert found.names == expected.names
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-4)
        assert (expected.effects != 0).any()
