"""Notebooks run from top to bottom, and the executed copy is that of the percent file beside it.

`python tests/test_notebooks.py` (what `make notebooks` calls) writes the executed copies.
"""

import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run with `folder` as its working folder; progress bars are left out."""
    notebook = jupytext.read(path)
    # A kernel that is talked to in the clear warns that others on the machine may listen in.
    client = nbclient.NotebookClient(
        notebook,
        timeout=1800,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        config=Config({"KernelManager": {"transport_encryption": "auto"}}),
    )
    client.execute()
    return without_bars(notebook)


def without_bars(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    kinds = [output.output_type for output in outputs(execute(path, folder))]
    assert "error" not in kinds
    assert "execute_result" in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_executed_notebook_is_that_of_the_percent_file(path):
    executed = path.with_suffix(".ipynb")
    assert executed.is_file(), f"run: make notebooks ({executed.name} is missing)"
    written, ran = jupytext.read(path), nbformat.read(executed, as_version=4)
    assert [cell.source for cell in ran.cells] == [cell.source for cell in written.cells], (
        "run: make notebooks"
    )
    assert all(cell.execution_count for cell in ran.cells if cell.cell_type == "code"), "run: make notebooks"
    assert not any(output.output_type == "error" for output in outputs(ran))
    assert not any(output.get("name") == "stderr" for output in outputs(ran)), "run: make notebooks"
    assert str(ROOT) not in executed.read_text(), "a path of this machine is in the outputs"


def main() -> None:
    for path in NOTEBOOKS:
        sys.stdout.write(f"{path.name}\n")
        nbformat.write(execute(path, path.parent), path.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
