"""The notebooks are stored without outputs, tell where they run, and run top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def read(name):
    return nbformat.read(REPO / "notebooks" / f"{name}.ipynb", as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(name, folder, monkeypatch):
    """The executed notebook, and what it printed."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("QVG_SMALL", "1")
    monkeypatch.setenv("XLA_FLAGS", "")  # one CPU device, as a reader has
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own, which shows pictures
    notebook = read(name)
    folder = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=400, kernel_name="python3", resources=folder).execute()
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return pictures, "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_stripped(name):
    code = code_of(read(name))
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_knows_where_it_runs_and_how_to_install(name):
    first, install = read(name).cells[:2]
    assert f"/blob/main/notebooks/{name}.ipynb)" in first.source  # the badge
    assert "**Runtime:**" in first.source
    assert "git+https://" in install.source and "-c keep.txt" in install.source  # keeps jaxlib


def test_notebooks_agree_on_the_address_of_the_repository():
    text = "".join(path.read_text() for path in NOTEBOOKS)
    addresses = set(re.findall(r"github(?:\.com)?/(?!blob)([\w-]+/qvg_jax)", text))
    assert len(addresses) == 1


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart(tmp_path, monkeypatch):
    pictures, printed = run("quickstart", tmp_path, monkeypatch)
    assert pictures == 1
    assert "LongCat       (29640, 128): 6.88x" in printed
    bf16, qvg = numbers(r"(?:bf16|qvg): ([\d.]+) dB to the truth", printed)
    assert bf16 > qvg > 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_your_own_model(tmp_path, monkeypatch):
    pictures, printed = run("your-own-model", tmp_path, monkeypatch)
    assert pictures == 1
    table = r"^(plain arrays|bf16|qvg\S*) +([\d.]+) +([\d.]+) +([\d,]+)"
    plain, bf16, qvg = re.findall(table, printed, re.MULTILINE)
    assert float(bf16[2]) < 0.005 and float(bf16[2]) < float(qvg[2]) < 0.05  # error of the logits
    assert abs(float(qvg[1]) - float(plain[1])) < 0.05  # the loss
    size = [int(row[3].replace(",", "")) for row in (plain, qvg)]
    assert size[1] < 0.8 * size[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_choose_a_codec(tmp_path, monkeypatch):
    pictures, printed = run("choose-a-codec", tmp_path, monkeypatch)
    assert pictures == 2 and (tmp_path / "kv.npz").stat().st_size > 0
    (uneven,) = numbers(r"midrise-k1v3.* attention ([\d.]+)", printed)
    (qvg,) = numbers(r"qvg\S+ +[\d.]+ +[\d.]+ +[\d.]+ +([\d.]+)", printed)
    (mine,) = numbers(r"attention ([\d.]+) +kmeans_smoothing", printed)
    assert uneven < mine < qvg  # what its text says of the three


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_large_models(tmp_path, monkeypatch):
    pictures, printed = run("large-models", tmp_path, monkeypatch)
    assert pictures == 2
    rows = re.findall(r"^(\S.+?) +21: .*180: ([\d.]+) GB", printed, re.MULTILINE)
    sizes = {name: float(gb) for name, gb in rows}
    assert sizes["bf16"] == 51.8 and sizes["qvg, spans of 24 frames"] == 14.5
    assert numbers(r"two bits differ by ([\d.]+)", printed)[0] < 0.05


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_two_bits_look_like(tmp_path, monkeypatch):
    pictures, printed = run("what-two-bits-look-like", tmp_path, monkeypatch)
    assert pictures == 7
    assert numbers(r"([\d.]+) dB between", printed)[0] > 30
