"""The README's example of interventions runs as it is printed."""

import re
from pathlib import Path

import pytest

import veridical as vd

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_example_of_patching_runs():
    text = README.read_text(encoding="utf-8").split("**Where does it decide?**")[1]
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"vd": vd, "m": vd.load("tiny-liar")}
    exec(found[1], names)
    assert names["heat"].to_frame()["recovered"].max() > 0.8
