"""The jobs of `veridical prefer`: a run, its report, and options that do not fit."""

import json
import shutil

import pytest

from veridical import cli
from veridical.errors import ConfigError, DataError
from veridical.preference import jobs, load_preferences
from veridical.preference.verbs import PreferDPOVerb, PreferRLVerb

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"steps": 2, "checkpoints": 1, "batch": 4, "samples": 4, "max_new_tokens": 4, "lora_rank": 2}


def test_a_job_writes_a_run_and_its_report(tmp_path):
    options = PreferDPOVerb(model="tiny-liar", data="toxic", preferred=0, out=tmp_path, **SMALL)
    assert jobs.dpo(options) == tmp_path
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "config.json").read_text())["preferred"] == 0
    assert len(json.loads((tmp_path / "metrics.json").read_text())["checkpoints"]) == 2


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="prefer rl needs --reward"):
        jobs.rl(PreferRLVerb(model="tiny-liar", data="toxic"))
    with pytest.raises(ConfigError, match="prefer dpo needs --data"):
        jobs.dpo(PreferDPOVerb(model="tiny-liar"))


def test_an_option_that_a_method_does_not_read_is_refused_and_not_shown(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for job, key, said in (
        ("sft", "beta: 0.3", "beta = 0.3: sft does not read it"),
        ("dpo", "generations: 8", "generations = 8: dpo does not read it"),
        ("reward", "samples: 4", "samples = 4: prefer reward does not read it"),
        ("reward", "reward: x", "reward = x: prefer reward does not read it"),
    ):
        recipe.write_text(f"model: tiny-liar\ndata: toxic\npreferred: 0\n{key}\n")
        assert cli.main(["prefer", job, "--config", str(recipe)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
    assert cli.main(["prefer", "sft", "--beta", "0.3"]) == 2
    said = capsys.readouterr().err
    assert "unknown flag of veridical prefer sft: '--beta'" in said
    assert "nearest: --beta" not in said
    for job, hidden in (("sft", "--beta"), ("reward", "--samples"), ("distil", "--generations")):
        assert cli.main(["prefer", job, "--help"]) == 0
        shown = capsys.readouterr().out
        assert hidden not in shown
        assert "--learning-rate" in shown


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        tmp_path.mkdir(exist_ok=True)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 162304 vs 162192")

    words = [
        "prefer",
        "dpo",
        "--model",
        "tiny-liar",
        "--data",
        "toxic",
        "--preferred",
        "0",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(jobs, "prefer", full)
    with pytest.raises(RuntimeError, match="unexpected pos"):  # while there is space it is another error
        cli.main(words)
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(jobs.shutil, "disk_usage", lambda _: usage)
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no space left while writing" in line


def test_what_failed_before_training_binds_nobody(tmp_path, capsys):
    words = ["--model", "tiny-liar", "--data", "toxic", "--preferred", "0", "--out", str(tmp_path)]
    few = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert cli.main(["prefer", "dpo", *words, *few, "--lora-modules", "q_prj"]) == 2
    assert "nearest: q_proj" in capsys.readouterr().err
    assert cli.main(["prefer", "dpo", *words, *few, "--limit", "20"]) == 0
    assert cli.main(["prefer", "dpo", *words, *few, "--limit", "21"]) == 2
    assert "holds a run with data_fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"promt": "a", "chosen": "b", "rejected": "c"}', "'prompt'; nearest: promt"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen and rejected are the same: 'b'"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', "the rejected answer is empty"),
        (
            '{"prompt": "a", "completion": "b"}',
            "of rows: 'rejected'; there are: prompt, completion",
        ),
        ('{"chosen": [1], "rejected": "b", "prompt": "a"}', "chosen is [1]; expected"),
        ("", "has no rows"),
        ("nonsense", "line 1 is not JSON"),
    ],
)
def test_bad_tables_end_in_one_line(tmp_path, capsys, content, said):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    assert cli.main(["prefer", "dpo", "--model", "tiny-liar", "--data", str(file)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_whole_chats_and_dialogues_are_read(tmp_path):
    user, other = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    (row,) = load_preferences([{"chosen": [user, good], "rejected": [user, bad]}]).rows
    assert (row.prompt, row.chosen, row.rejected) == ([user], "good", "bad")
    with pytest.raises(DataError, match="part before their last message"):
        load_preferences([{"chosen": [user, good], "rejected": [other, bad]}])
    file = tmp_path / "hh.jsonl"
    dialogue = "\n\nHuman: Hi\n\nAssistant: {}"
    file.write_text(json.dumps({"chosen": dialogue.format("good"), "rejected": dialogue.format("bad")}))
    (row,) = load_preferences(file).rows
    assert (row.prompt, row.chosen, row.rejected) == ([user], "good", "bad")
