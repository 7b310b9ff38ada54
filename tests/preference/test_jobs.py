"""The jobs of `veridical prefer`: a run, its report, and options that do not fit."""

import json

import pytest

from veridical.errors import ConfigError
from veridical.preference import jobs
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
