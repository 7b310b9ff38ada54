"""Planted changes of weights are found where they are, with their rank and directions."""

import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import make
from veridical.comparison.duo import pair_of
from veridical.comparison.weights import weight_change
from veridical.errors import InputError


@pytest.mark.parametrize("layer", [0, 2])
def test_a_low_rank_change_is_localised(duo_of, layer):
    duo = duo_of(layer, dtype=torch.float64, rank=3)
    found = weight_change(duo)
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    table = found.modules.set_index("module")
    ours, theirs = (model.model.get_parameter(name).detach() for model in (duo.policy, duo.reference))
    change = ours - theirs
    assert set(table.index[table["norm"] > 0]) == {name}
    line = table.loc[name]
    assert line["layer"] == layer
    assert line["part"] == "down_proj"
    assert line["relative"] == pytest.approx(float(change.norm() / theirs.norm()))
    assert line["largest"] == pytest.approx(float(change.abs().max()))
    assert line["rank"] == 3
    values = torch.linalg.svdvals(change)
    share = values / values.sum()
    assert line["effective_rank"] == pytest.approx(float((-(share * (share + 1e-300).log()).sum()).exp()))
    assert line["first_share"] == pytest.approx(float(values[0] ** 2 / values.square().sum()))
    np.testing.assert_allclose(found.spectra["value"], values, atol=1e-12)
    layers = found.by_layer().set_index("layer")["share"]
    assert layers[layer] == pytest.approx(1)
    assert layers.drop(layer).eq(0).all()
    assert set(layers.index) == {-1, 0, 1, 2}


def test_equal_weights_do_not_differ(duo_of):
    found = weight_change(duo_of(None))
    assert (found.modules[["relative", "norm", "largest"]] == 0).all(axis=None)
    assert (found.by_layer()["share"] == 0).all()
    assert found.spectra.empty


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["writes", "reads"])
def test_a_direction_is_found_on_its_side(family, side):
    """Linear layers hold [out, in], gpt2's hold [in, out]."""
    base, policy = make(family).double(), make(family).double()
    width, conv = base.config.hidden_size, family == "gpt2"
    path = {
        ("llama", "writes"): "model.layers.1.mlp.down_proj",
        ("llama", "reads"): "model.layers.1.mlp.up_proj",
        ("gpt2", "writes"): "transformer.h.1.mlp.c_proj",
        ("gpt2", "reads"): "transformer.h.1.mlp.c_fc",
    }[family, side]
    random = torch.Generator().manual_seed(0)
    u = torch.randn(width, generator=random, dtype=torch.float64)
    other = torch.randn(width, generator=random, dtype=torch.float64)
    weight = policy.get_submodule(path).weight
    stream_first = (side == "writes") != conv
    far = torch.randn(weight.shape[1 if stream_first else 0], generator=random, dtype=torch.float64)
    with torch.no_grad():
        weight += torch.outer(u, far) if stream_first else torch.outer(far, u)
    duo = pair_of(*(vd.load(model, check=False) for model in (policy, base)))
    overlaps = weight_change(duo, {"planted": u, "other": other, "plane": torch.stack([u, other])}).overlaps
    assert set(overlaps["side"]) == {side}
    found = overlaps.set_index("direction")
    cosine = float(u @ other / (u.norm() * other.norm()))
    assert found.loc["planted", "overlap"] == pytest.approx(1)
    assert found.loc["other", "overlap"] == pytest.approx(cosine**2)
    assert found.loc["plane", "overlap"] == pytest.approx(1)
    assert found.loc["planted", "chance"] == pytest.approx(1 / width)
    assert found.loc["plane", "chance"] == pytest.approx(2 / width)


def test_bad_directions(duo_of):
    with pytest.raises(InputError, match="the stream is 32 wide"):
        weight_change(duo_of(1), {"odd": np.ones(31)})
    with pytest.raises(InputError, match="is zero"):
        weight_change(duo_of(1), {"nothing": np.zeros(32)})
