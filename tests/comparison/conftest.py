"""Pairs of models with a change that was planted."""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from comparison_oracles import changed

import veridical as vd
from veridical.comparison.duo import pair_of


@pytest.fixture(scope="session")
def duo_of(tiny, tokenizer):
    """A pair from the tiny Llama: the policy has a change of rank 2 in the MLP of `layer`."""

    def get(layer=None, dtype=torch.float32, **options):
        base = copy.deepcopy(tiny("llama")).to(dtype)
        policy = changed(base, layer, **options)
        models = [vd.load(model, tokenizer=tokenizer, check=False) for model in (policy, base)]
        return pair_of(*models)

    return get
