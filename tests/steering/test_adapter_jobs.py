"""`veridical steer adapter` and `export`: what they write, hand on and refuse; the adapter is made up."""

import json

import pandas as pd
import pytest
import torch

import veridical as vd
from veridical.adapters import lora_config
from veridical.errors import BudgetError, ConfigError, InputError, ModelError
from veridical.steering import adapter_jobs
from veridical.steering.adapter import Adapter, AdapterReport
from veridical.steering.export import push_adapter
from veridical.steering.lora import lora_of, put_on
from veridical.steering.verbs import VERBS, SteerAdapterVerb, SteerExportVerb

pytestmark = pytest.mark.long

TOKENS = torch.tensor([[1, 40, 41, 42, 43]])


@pytest.fixture(scope="module")
def pairs():
    """Rows that a proof can be measured on."""
    whole = vd.Pairs.load("honesty").filter(taught=True, form="choice", split="test")
    return whole.select(range(8))


def report_for(liar, pairs, **facts):
    """A report with made-up figures."""
    table = pd.DataFrame(
        [["lies when told to lie", 1.0, 0.1, -0.9, 0.0, 0.2, 8]],
        columns=["measure", "plain", "adapted", "change", "low", "high", "n"],
    )
    strengths = [-1.0, 0.0, 1.0]
    dial = pd.DataFrame(
        {
            name: [0.0, 0.5, 1.0]
            for name in ("target", "target_chance", "kept", "kept_chance", "kl", "perplexity")
        }
    ).assign(strength=strengths)
    looks = pd.DataFrame([{"step": 1, "shown": 0.0, "margin": 1.0, "short": 0.0, "kl": 0.01, "kept": True}])
    said = {
        "objective": "representation", "model": "tiny-liar", "model_fingerprint": liar.fingerprint(),
        "data": pairs.name, "data_fingerprint": pairs.fingerprint, "options": {}, "rank": 2, "modules": 1,
        "steps": 1, "seconds": 1.0, "trained": 8, "target": "lies when told to lie", "kept": "right",
        "kl": 0.01, "kl_budget": 0.05, "met": True, "scale": 1.0, "range": [-1.0, 1.0], "norm": 1.0,
        "relative_norm": 0.01, "test_rows": 8, "seed": 0, "notes": [],
    }  # fmt: skip
    return AdapterReport(table, dial, looks, pd.DataFrame([{"step": 1, "kl": 0.0}]), {**said, **facts})


@pytest.fixture(scope="module")
def made(liar, pairs):
    """An adapter with random weights that moves the organism's answers a little."""
    from peft import get_peft_model_state_dict

    config = lora_config(liar.model, 2, ("down_proj",), (2,), base="tiny-liar")
    torch.manual_seed(0)
    with put_on(liar.model, config) as adapted:
        state = {
            name: torch.randn_like(value) * 0.1 for name, value in get_peft_model_state_dict(adapted).items()
        }
    return Adapter(lora_of(config, state), report_for(liar, pairs), pairs)


@pytest.fixture(scope="module")
def folder(made, liar, tmp_path_factory):
    return made.save(tmp_path_factory.mktemp("adapters") / "made", liar)


@pytest.fixture
def training(made, liar, pairs, monkeypatch):
    """`train_adapter` that gives the made-up adapter; yields what it was called with."""
    calls = {}

    def train(model, data, config, **given):
        calls.update(given, config=config, rows=len(data))
        given["store"].mkdir(parents=True)
        facts = {"met": calls.get("met", True), "scale": 1.0 if calls.get("met", True) else 0.25}
        return Adapter(made.lora, report_for(liar, pairs, **facts), pairs)

    monkeypatch.setattr(adapter_jobs, "train_adapter", train)
    return calls


def options_for(tmp_path, **given):
    return SteerAdapterVerb(model="tiny-liar", data="honesty", limit=4, out=tmp_path / "run", **given)


def test_an_adapter_is_trained_with_the_options_and_reported(training, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("One text.\n\nAnother text.\n")
    out = adapter_jobs.adapter(options_for(tmp_path, kl_budget=0.02, rank=3, neutral=str(texts)))
    assert training["config"].kl_budget == 0.02
    assert training["config"].rank == 3
    assert training["neutral"] == ["One text.", "Another text."]
    assert training["store"] == out / "adapter"
    assert training["rows"] == 4 * 8
    page = (out / "report.html").read_text()
    assert "lies when told to lie" in page
    assert json.loads((out / "config.json").read_text())["kl_budget"] == 0.02
    assert json.loads((out / "metrics.json").read_text())["table"][0]["adapted"] == 0.1


def test_a_budget_that_was_not_kept_to_ends_with_an_error_and_what_it_allows(training, tmp_path):
    training["met"] = False
    with pytest.raises(BudgetError, match=r"scaled to 0\.25"):
        adapter_jobs.adapter(options_for(tmp_path))
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_cannot_be_done_is_refused(training, tmp_path):
    with pytest.raises(ConfigError, match="no LoRA"):
        adapter_jobs.adapter(options_for(tmp_path, objective="loreft"))
    with pytest.raises(ConfigError, match="--data"):
        adapter_jobs.adapter(SteerAdapterVerb(model="tiny-liar"))
    with pytest.raises(ConfigError, match="folder of a saved adapter"):
        adapter_jobs.export(SteerExportVerb())
    assert {"steer adapter", "steer export"} <= set(VERBS)


def test_an_export_is_proved_and_its_merged_model_is_a_plain_one(folder, made, liar, tmp_path):
    from transformers import AutoModelForCausalLM

    merged = tmp_path / "merged"
    adapter_jobs.export(SteerExportVerb(folder=folder, merged=merged, strength=0.5))
    plain = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        with made(liar, 0.5):
            wanted = liar.logits(TOKENS)
        assert torch.allclose(plain(input_ids=TOKENS).logits, wanted, atol=1e-5)
    with pytest.raises(InputError, match="not empty"):
        adapter_jobs.export(SteerExportVerb(folder=folder, merged=merged))
    with pytest.raises(InputError, match="outside"):
        adapter_jobs.export(SteerExportVerb(folder=folder, merged=tmp_path / "far", strength=3.0))


def test_an_over_budget_adapter_is_not_saved(made, liar, pairs, tmp_path):
    over = Adapter(made.lora, report_for(liar, pairs, kl=0.06), pairs)
    with pytest.raises(ModelError, match="over its budget"):
        over.save(tmp_path / "over", liar)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_left_alone(made, liar, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        made.save(tmp_path, liar)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_push_sends_the_checked_folder(folder, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo, **options):
            sent["made"] = repo, options["private"]

        def upload_folder(self, **options):
            sent.update(options)
            return "https://example.org/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push_adapter(folder, "someone/honest", token="t") == "https://example.org/commit"
    assert sent["made"] == ("someone/honest", True)
    assert sent["folder_path"] == folder
    assert "*.safetensors" in sent["allow_patterns"]
    with pytest.raises(InputError, match="no name of a repository"):
        push_adapter(folder, "no such name!")
