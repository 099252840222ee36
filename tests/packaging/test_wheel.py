"""The wheel: what is in it, that the usual checkers accept it, and that its command works anywhere."""

import ast
import os
import re
import subprocess
import sys
import zipfile

import pytest

from tests.support.pages import ROOT

pytestmark = pytest.mark.slow

KINDS = {
    "py",
    "typed",
    "md",
    "json",
    "safetensors",
    "METADATA",
    "WHEEL",
    "RECORD",
    "txt",
    "LICENSE",
    "NOTICE",
}
DOTTED = re.compile(r"(?<![\w.])\w+\.[a-z_]+(?:[.:]\w+)*")  # names of modules inside strings
WEIGHTS = "qvg_jax/models/pocket_world/pocket_world.safetensors"


def run(*words, **more):
    done = subprocess.run(words, capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (path,) = folder.glob("qvg_jax-*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the wheel's files, as in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_one_name_at_the_top_and_nothing_that_is_not_needed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qvg_jax"}
    assert {name.rpartition("/")[2].rpartition(".")[2] for name in names} == KINDS
    assert WEIGHTS in names and WEIGHTS.replace("pocket_world.safetensors", "README.md") in names
    assert WEIGHTS.replace("pocket_world.safetensors", "heads.json") in names
    for package in ("qvg_jax", "models", "pallas_kernels"):  # no module is left behind
        prefix = "" if package == "qvg_jax" else "qvg_jax/"
        wanted = {prefix + str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert wanted <= {*names}
    assert wheel.stat().st_size < 24e6


def test_no_module_imports_a_name_of_the_checkout(site):
    for path in (site / "qvg_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = DOTTED.findall(node.value)
            tops = {name.split(".")[0] for name in names if name}
            assert not tops & {"models", "pallas_kernels"}, (path, names)


def test_checkers_accept_it(wheel):
    tools = os.path.dirname(sys.executable)
    assert "OK" in run(f"{tools}/check-wheel-contents", str(wheel))
    run(sys.executable, "-m", "twine", "check", "--strict", str(wheel))


def test_the_command_makes_a_video_beside_a_folder_named_models(site, tmp_path):
    """Other people's folders of these names neither break the command nor are used by it."""
    for name in ("models", "pallas_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not this one')\n")
    words = [
        "-m",
        "qvg_jax",
        "generate",
        "--tour",
        "8",
        "--frames",
        "8",
        "--steps",
        "1",
        "--codec",
        "bf16",
    ]
    paths = os.pathsep.join([str(site), str(tmp_path)])
    env = os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path)}
    said = run(sys.executable, *words, cwd=tmp_path, env=env)
    assert "pocket-world: 8 real frames" in said
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made >= {"video.mp4", "report.json", "report.png", "report.html"}
