"""The notebooks run from top to bottom, and what they show is what is shown in the files."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def kinds(notebook):
    """What each code cell shows: the MIME types of its outputs, a stream as its name."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted({kind for out in cell.outputs for kind in out.get("data", [out.get("name")])}) for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_its_file_shows(path):
    written = nbformat.read(path, as_version=4)
    notebook = nbformat.from_dict(written)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert kinds(notebook) == kinds(nbformat.read(path, as_version=4))
    assert "stderr" not in sum(kinds(notebook), [])


def test_there_are_three_and_each_is_small():
    assert [path.stem for path in NOTEBOOKS] == ["choosing_a_budget", "tour", "why_rounds_help"]
    assert max(path.stat().st_size for path in NOTEBOOKS) < 300_000
