"""The quickstart notebook is stored without outputs and runs top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPO = Path(__file__).resolve().parents[1]
NOTEBOOK = REPO / "notebooks" / "quickstart.ipynb"


def test_outputs_are_stripped():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_top_to_bottom(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("XLA_FLAGS", "")  # one CPU device, as a reader has
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=400, kernel_name="python3").execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "LongCat       (29640, 128): 6.88x" in printed
    shown = {
        line.split(":")[0]: float(line.split()[1])
        for line in printed.splitlines()
        if "dB to the truth" in line
    }
    assert shown["bf16"] > shown["qvg"] > 20
