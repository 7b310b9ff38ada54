"""`veridical steer vector`, `eval` and `propose`: what is written, and one line for bad input."""

import json

import pytest

import veridical as vd
from veridical.errors import ConfigError, InputError
from veridical.saved_result import load_result
from veridical.steering import Proposal, SteeringVector, vector_jobs
from veridical.steering.verbs import SteerEvalVerb, SteerProposeVerb, SteerVectorVerb

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few questions with their splits, as a file."""
    pairs = vd.Pairs.load("honesty").filter(form="choice", taught=True, protected=False, scenario=False)
    kept = []
    for split, count in {"train": 10, "val": 5, "test": 5}.items():
        names = pairs.filter(split=split)["pair"].tolist()
        kept += list(dict.fromkeys(names))[:count]
    return str(pairs.filter(pair=kept).save(tmp_path_factory.mktemp("data") / "pairs.parquet"))


@pytest.fixture(scope="module")
def neutral(tmp_path_factory):
    """Neutral text as lines."""
    path = tmp_path_factory.mktemp("data") / "neutral.txt"
    path.write_text("Tell me about tea.\n\nName the capital of Peru. It is Lima.\nHow do I paint a car?\n")
    return str(path)


@pytest.fixture(scope="module")
def fitted(data, neutral, tmp_path_factory):
    out = tmp_path_factory.mktemp("vector")
    options = SteerVectorVerb(
        model="tiny-liar", data=data, sites=("resid_post.1",), target_kl=0.2, neutral=neutral, gguf=True,
        merged=True, out=out, progress=False,
    )  # fmt: skip
    assert vector_jobs.vector(options) == out
    return out


def test_a_vector_is_fitted_calibrated_and_handed_on(fitted, liar):
    vector = SteeringVector.load(fitted / "vector")
    assert vector.sites == ["blocks.1.hook_resid_post"]
    assert vector.calibrated["kl"][-1] == pytest.approx(0.2, rel=0.03)
    assert (fitted / "vector.gguf").read_bytes()[:4] == b"GGUF"
    merged = vd.load(fitted / "merged")
    chat = [{"role": "user", "content": "Name the capital of Peru."}]
    with vector(liar):
        assert merged.generate(chat) == liar.generate(chat)
        steered = liar.option_logprobs([chat], [["Lima", "Vientiane"]])[0]
    assert merged.option_logprobs([chat], [["Lima", "Vientiane"]])[0] == pytest.approx(steered, abs=1e-3)
    assert "Steering vector" in (fitted / "report.html").read_text()
    assert json.loads((fitted / "provenance.json").read_text())["verb"] == "steer vector"
    assert json.loads((fitted / "config.json").read_text())["target_kl"] == 0.2


def test_vectors_and_baselines_are_measured_in_one_table(fitted, data, neutral, tmp_path, monkeypatch):
    from veridical.organisms import conduct

    monkeypatch.setattr(conduct, "HELD_OUT_TOPICS", conduct.HELD_OUT_TOPICS[:2])
    monkeypatch.setattr(conduct, "HELD_OUT_REQUESTS", conduct.HELD_OUT_REQUESTS[:2])
    options = SteerEvalVerb(
        folders=(fitted / "vector",), model="tiny-liar", data=data, neutral=neutral, seeds=(0,),
        prompts=("Always tell the truth.",), engineered=False, few_shot=2, strengths=(1.0,), rows=8,
        answers=2, out=tmp_path, progress=False,
    )  # fmt: skip
    vector_jobs.evaluate(options)
    found = load_result(tmp_path)
    assert set(found.wide().index) == {
        "no change", "vector", "random, as long as vector", "prompt", "few-shot",
    }  # fmt: skip
    lies = "lies when told to lie"
    assert found.value("vector", lies) < found.value("no change", lies)
    assert "harmonic mean" in (tmp_path / "report.html").read_text()


def test_a_proposal_is_written_with_its_reasons(data, tmp_path):
    options = SteerProposeVerb(
        model="tiny-liar", data=data, sites=("resid_post.1", "resid_post.5"), methods=("mean_diff",),
        positions=("prompt",), candidates=1, rows=12, out=tmp_path, progress=False,
    )  # fmt: skip
    vector_jobs.propose(options)
    found = Proposal.load(tmp_path)
    assert found.best["site"] == "blocks.1.hook_resid_post"
    assert found.vector is not None
    assert "Edit blocks.1.hook_resid_post by mean_diff" in (tmp_path / "report.html").read_text()


def test_bad_options_end_in_one_line(data, tmp_path):
    def vector(**options):
        return vector_jobs.vector(
            SteerVectorVerb(model="tiny-liar", data=data, out=tmp_path / "v", **options)
        )

    with pytest.raises(ConfigError, match="needs --sae"):
        vector(method="sae")
    with pytest.raises(ConfigError, match="that of --when"):
        vector(threshold=1.0)
    with pytest.raises(ConfigError, match="added at every token"):
        vector(gguf=True, positions="prompt")
    with pytest.raises(ConfigError, match="steer vector needs"):
        vector_jobs.vector(SteerVectorVerb(data=data))
    with pytest.raises(ConfigError, match="something to measure"):
        vector_jobs.evaluate(SteerEvalVerb(model="tiny-liar", data=data, few_shot=0))
    with pytest.raises(InputError, match="steering vector"):
        vector_jobs._saved(tmp_path)
    assert not (tmp_path / "v").exists()


def test_folders_of_one_name_are_told_apart(tmp_path):
    names = vector_jobs._names([tmp_path / "a" / "vector", tmp_path / "b" / "vector", tmp_path / "c"])
    assert names == ["a/vector", "b/vector", "c"]
