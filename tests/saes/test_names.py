"""Every public name is there, also where a module was imported first, and the light ones stay light."""

import subprocess
import sys

import veridical.saes as saes


def test_every_name_resolves():
    for name in saes.__all__:
        assert getattr(saes, name) is not None
    assert sorted(saes.__all__) == sorted(saes._HOME)


def test_a_function_is_not_hidden_by_its_module():
    """A module of the package that bears a function's name would take its place once it is imported."""

    for name in ("measure_absorption", "evaluate_sae", "feature_table", "spliced"):
        assert callable(getattr(saes, name))
    assert not set(saes.__all__) & {"absorption", "evaluate", "features", "splice", "separate", "mcc"}


def test_sae_lens_is_not_imported():
    every = "import sys, veridical.saes as saes; [getattr(saes, name) for name in saes.__all__]"
    code = f"{every}; print('sae_lens' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
