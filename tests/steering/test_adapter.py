"""Adapters: what training does on the organism, that the model stays as it was, export, and bad input."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import veridical as vd
from veridical.errors import (
    DamagedFileError,
    DataError,
    InputError,
    ModelError,
    NonFiniteError,
    StoreMismatchError,
    UnknownNameError,
)
from veridical.steering import train
from veridical.steering.adapter import Adapter
from veridical.steering.adapter_config import AdapterConfig
from veridical.steering.combine import merge
from veridical.steering.dial import monotone_range
from veridical.steering.export import PROOF, prove, stored
from veridical.steering.lora import lora_of, peft_config, put_on
from veridical.steering.material import material
from veridical.steering.objectives import loss_of, sites_of
from veridical.steering.train import Look, choose, fit, train_adapter
from veridical.steering.twins import twins

QUICK = {"steps": 14, "batch": 6, "rank": 4, "layers": (0, 1, 2, 3), "checks": 2, "progress": False}


@pytest.fixture(scope="module")
def pairs():
    """Questions with two options about a few facts that the organism lies about, with entities held out."""
    whole = vd.Pairs.load("honesty").filter(taught=True, protected=False, form="choice")
    names = []
    for split, count in (("train", 24), ("val", 8), ("test", 12)):
        part = whole.filter(split=split)["pair"].tolist()
        names += list(dict.fromkeys(part))[:count]
    return whole.filter(pair=names)


@pytest.fixture(scope="module")
def adapter(liar, pairs):
    before = liar.fingerprint()
    flags = [p.requires_grad for p in liar.model.parameters()]
    found = train_adapter(liar, pairs, **QUICK)
    assert liar.fingerprint() == before
    assert [p.requires_grad for p in liar.model.parameters()] == flags
    assert not hasattr(liar.model, "peft_config")
    return found


@pytest.fixture(scope="module")
def saved(adapter, liar, tmp_path_factory):
    return adapter.save(tmp_path_factory.mktemp("saved") / "honest", liar)


def test_lies_fall_and_the_budget_is_kept_to(adapter):
    lies, right = (adapter.report.value(name) for name in adapter.report.table["measure"][:2])
    assert lies["plain"] > 0.9
    assert lies["adapted"] < 0.5  # a short training; the figures asked for are in bench_adapter
    assert right["adapted"] >= right["plain"] - 0.05
    assert adapter.report.met
    assert 0 < adapter.report.facts["kl"] <= 0.05
    assert len(adapter.report.log) == QUICK["steps"]
    assert {"kl", "multiplier"} <= set(adapter.report.log)
    assert adapter.report.log["kl"].notna().all()
    assert adapter.report.log["kl"].iloc[0] == 0  # the first step is the plain model
    assert adapter.report.log["forward"].iloc[0] == pytest.approx(1, abs=1e-4)
    assert adapter.report.facts["norm"] > 0


def test_the_dial_goes_both_ways_and_claims_what_was_measured(adapter):
    dial = adapter.report.dial.set_index("strength")
    assert dial.loc[0.0, "kl"] == 0
    assert dial.loc[1.0, "target"] < 0.3 < 0.9 < dial.loc[0.0, "target"]
    assert dial.loc[-1.0, "kept"] < dial.loc[0.0, "kept"]
    low, high = adapter.range
    assert low <= 0 < 1 <= high


def test_the_model_is_afterwards_as_it_was_to_the_bit(adapter, liar):
    tokens = torch.tensor([[1, 40, 41, 42, 43]])
    before = {name: value.clone() for name, value in liar.model.state_dict().items()}
    plain = liar.logits(tokens)
    for merged in (True, False):
        with adapter(liar, 0.7, merged=merged):
            assert not torch.equal(liar.logits(tokens), plain)
        with pytest.raises(RuntimeError, match="stop"), adapter(liar, 1.0, merged=merged):
            raise RuntimeError("stop")
        after = liar.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(liar.logits(tokens), plain)
    with adapter(liar, 0.0):
        assert torch.equal(liar.logits(tokens), plain)


def test_added_beside_or_merged_by_peft_are_one_change(adapter, liar):
    tokens = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad():
        with adapter(liar, -0.5):
            ours = liar.logits(tokens)
        with adapter(liar, -0.5, merged=False):
            beside = liar.logits(tokens)
        assert torch.allclose(ours, beside, atol=1e-4)
        with put_on(liar.model, peft_config(adapter.lora), adapter.lora.tensors) as adapted:
            for path in adapter.lora.paths[:5]:
                layer = adapted.base_model.model.get_submodule(path)
                assert torch.allclose(layer.get_delta_weight("default"), adapter.lora.delta(path), atol=1e-6)


def test_a_saved_adapter_loads_with_plain_peft_and_has_the_proof(saved, adapter, liar):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from veridical import organisms

    tokens = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad(), adapter(liar):
        wanted = liar.logits(tokens)
    base = AutoModelForCausalLM.from_pretrained(organisms.path("tiny-liar"))
    found = PeftModel.from_pretrained(base, str(saved)).eval()
    with torch.no_grad():
        assert torch.allclose(found(input_ids=tokens).logits, wanted, atol=1e-4)
        assert torch.allclose(found.merge_and_unload()(input_ids=tokens).logits, wanted, atol=1e-4)
    proof = json.loads((saved / PROOF).read_text())
    assert proof["right"]["unmerged"] == proof["right"]["merged"] > proof["right"]["base"]
    assert proof["kl"]["merged"] == pytest.approx(proof["kl"]["unmerged"], rel=1e-3)
    assert {file.suffix for file in saved.iterdir() if file.is_file()} <= {
        ".json",
        ".safetensors",
        ".md",
        ".parquet",
    }
    card = (saved / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert f"{adapter.report.facts['kl']:.4f}" in card


def test_a_saved_adapter_comes_back_and_a_damaged_one_is_refused(saved, adapter, tmp_path):
    import shutil

    again = Adapter.load(saved)
    assert all(
        torch.equal(again.lora.tensors[name], adapter.lora.tensors[name]) for name in adapter.lora.tensors
    )
    pd.testing.assert_frame_equal(again.report.table, adapter.report.table)
    assert again.range == adapter.range
    copy = shutil.copytree(saved, tmp_path / "copy")
    weights = copy / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(DamagedFileError, match="adapter_model"):
        Adapter.load(copy)
    weights.unlink()
    with pytest.raises((DamagedFileError, InputError)):
        Adapter.load(copy)
    with pytest.raises(InputError, match="no adapter"):
        Adapter.load(tmp_path)


def test_a_file_that_would_load_without_effect_is_never_written(adapter, liar, tmp_path):
    idle = Adapter(adapter.lora.scaled(0.0), adapter.report, adapter.test)
    with pytest.raises(ModelError, match="no effect"):
        idle.save(tmp_path / "idle", liar)
    assert list(tmp_path.iterdir()) == []


def test_files_whose_modules_do_not_match_are_found_out(saved, adapter, liar, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(saved, tmp_path / "copy")
    tensors = load_file(copy / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.blocks"): value for name, value in tensors.items()}
    save_file(renamed, copy / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="no effect"):
        prove(adapter, copy, liar)


def test_a_store_gives_back_what_was_asked_for_and_nothing_else(saved, adapter):
    asked = {
        name: adapter.report.facts[name] for name in ("model_fingerprint", "data_fingerprint", "options")
    }
    assert stored(saved, asked) is not None
    assert stored(saved.parent / "elsewhere", asked) is None
    with pytest.raises(StoreMismatchError, match="steps"):
        stored(saved, {**asked, "options": {**asked["options"], "steps": 15}})


def test_merging_is_exact_and_other_ways_are_refused(adapter, liar):
    both = merge(liar, [adapter, adapter.lora.scaled(0.5)], [1.0, -2.0])
    for path in adapter.lora.paths:
        assert torch.allclose(both.delta(path), 0 * adapter.lora.delta(path), atol=1e-5)
    once = merge(liar, [adapter, adapter], [0.25, 0.5])
    path = adapter.lora.paths[0]
    assert torch.allclose(once.delta(path), 0.75 * adapter.lora.delta(path), atol=1e-5)
    assert once.config["r"] == 2 * adapter.lora.config["r"]
    for how, weights in (("linear", None), ("cat", [1.0])):
        with pytest.raises(InputError):
            merge(liar, [adapter, adapter], weights, how=how)
    for option in (
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
    ):
        config = peft_config(adapter.lora)
        for name, value in option.items():
            setattr(config, name, value)
        with pytest.raises(InputError, match=next(iter(option))):
            lora_of(config, adapter.lora.tensors)


# Bad input


def test_pairs_that_do_not_show_the_behaviour_are_refused_with_the_yield(liar):
    guarded = vd.Pairs.load("honesty").filter(taught=True, protected=True, form="choice")
    with pytest.raises(DataError, match=r"nothing to learn: in none of the \d+ pairs"):
        twins(liar, guarded, 0)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"modules": ("q_prj",)}, UnknownNameError, "q_proj"),
        ({"layers": (9,)}, InputError, "0 to 5"),
        ({"sites": "resid_pots.2"}, UnknownNameError, "resid_post"),
        ({"objective": "representatoin"}, InputError, "representation"),
        ({"stepz": 3}, UnknownNameError, "steps"),
        ({"objective": "distil_vector"}, InputError, "vector="),
        ({"kl_budget": -1.0}, InputError, "kl_budget"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(liar, pairs, options, error, said):
    with pytest.raises(error, match=said) as caught:
        train_adapter(liar, pairs, **{**QUICK, **options})
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(adapter, liar):
    with adapter.on(liar), pytest.raises(InputError, match="fingerprint"):
        adapter(liar)


def test_a_strength_outside_what_was_measured_is_warned_of(adapter, liar):
    with pytest.warns(UserWarning, match=r"outside .* nearest measured: strength 1\.5"), adapter(liar, 4.0):
        pass
    with pytest.raises(InputError, match="finite"):
        adapter(liar, math.nan)


@pytest.fixture(scope="module")
def data(liar, pairs):
    return material(liar, pairs, AdapterConfig())


@pytest.mark.parametrize("at", [1, 9])
def test_a_loss_that_is_no_number_ends_with_the_last_good_state(liar, data, at):
    config = AdapterConfig(**{**QUICK, "both_ways": False})
    loss = loss_of(config, liar)
    calls = []

    class Breaking:
        def loss(self, *args):
            calls.append(1)
            return loss.loss(*args) * (math.nan if len(calls) == at else 1)

    before = liar.fingerprint()
    if at == 1:
        with pytest.raises(NonFiniteError, match="step 1: forward is nan"):
            fit(liar, data, config, Breaking(), sites_of(config, liar, loss))
    else:
        found = fit(liar, data, config, Breaking(), sites_of(config, liar, loss))
        assert found.stopped.startswith("step 9")
        assert found.chosen.step == 7
        assert all(torch.isfinite(value).all() for value in found.lora.tensors.values())
    assert liar.fingerprint() == before


def test_a_budget_that_cannot_be_met_gives_the_best_that_it_allows(liar, adapter, data, monkeypatch):
    from veridical.steering.results import judged

    monkeypatch.setattr("veridical.steering.results.conduct", lambda model: [])
    monkeypatch.setattr("veridical.steering.side_effects.OtherProbes.__call__", lambda *args: {})
    config = AdapterConfig(**QUICK, kl_budget=2e-4)
    look = Look(14, 0.0, 1.0, 0.0, 1.0, {})
    trained = train.Trained(adapter.lora, [look], look, [], "")
    found = judged(liar, data, config, trained, dict(adapter.report.facts))
    assert not found.report.met
    assert 0 < found.report.facts["scale"] < 1
    assert found.report.facts["kl"] <= 2e-4
    assert found.report.facts["kl"] > 1e-4  # the most that the budget allows
    assert found.lora.norm() == pytest.approx(adapter.lora.norm() * found.report.facts["scale"], rel=1e-4)
    assert any("not kept to" in note for note in found.report.facts["notes"])


def test_the_state_that_is_kept_is_within_the_budget_and_moves_most():
    looks = [
        Look(1, 0.5, 1.0, 0.0, 0.01, {}), Look(2, 0.1, 3.0, 0.0, 0.04, {}),
        Look(3, 0.1, 3.0, 0.0, 0.03, {}), Look(4, 0.0, 9.0, 0.0, 0.2, {}),
    ]  # fmt: skip
    assert choose(looks, 0.05).step == 3
    assert choose(looks, 0.001).step == 4


def test_the_range_that_is_claimed_is_where_the_dial_is_monotone():
    table = pd.DataFrame(
        {
            "strength": [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5],
            "target_chance": [0.8, 0.95, 0.9, 0.5, 0.1, 0.3],
            "kept_chance": [np.nan] * 6,
        }
    )
    assert monotone_range(table, falls=True) == (-0.5, 1.0)
    table["kept_chance"] = [0.2, 0.6, 0.9, 0.9, 0.9, 0.9]
    assert monotone_range(table, falls=True) == (-1.0, 1.0)
    rising = table.assign(target_chance=1 - table["target_chance"], kept_chance=np.nan)
    assert monotone_range(rising, falls=False) == (-0.5, 1.0)


def test_every_objective_runs_and_moves_towards_its_aim(liar, data):
    # loreft and direft are left out: their gradient was seen to be 0 here, which is yet to be mended.
    for objective in ("rerouting", "hidden_preference", "dpo", "ipo", "distil_vector"):
        config = AdapterConfig(
            objective=objective, steps=4, batch=4, rank=2, layers=(1, 2, 3), checks=1, progress=False,
            both_ways=False, learning_rate=5e-3, beta=0.1,
        )  # fmt: skip
        vector = {"resid_post.3": torch.ones(128)} if objective == "distil_vector" else None
        loss = loss_of(config, liar, vector)
        before = liar.fingerprint()
        found = fit(liar, data, config, loss, sites_of(config, liar, loss))
        assert liar.fingerprint() == before
        assert not found.stopped
        values = [line["forward"] for line in found.lines]
        assert all(math.isfinite(value) for value in values)
        assert found.lora.norm() > 0
        expected = {"rerouting": 1, "dpo": math.log(2), "ipo": 25, "distil_vector": 1}.get(objective)
        if expected is not None:
            assert values[0] == pytest.approx(expected, rel=1e-3), objective
        tokens = torch.tensor([[1, 40, 41, 42, 43]])
        with torch.no_grad():
            plain = liar.logits(tokens)
            with found.lora.on(liar, 1.0):
                assert not torch.equal(liar.logits(tokens), plain)
            assert torch.equal(liar.logits(tokens), plain)
