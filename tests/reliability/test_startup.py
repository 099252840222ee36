"""Help and wrong options are answered at once, without JAX; outputs that close are no traceback."""

import os
import subprocess
import sys

import pytest

from benchmarks import startup

QVG = [sys.executable, "-m", "qvg_jax"]
PROBE = """
import sys
from qvg_jax.app import cli
code = cli.main(sys.argv[1:])
found = {"jax", "numpy", "flax", "av", "PIL", "msgspec", "matplotlib"} & {*sys.modules}
print("imported:", *sorted(found), file=sys.stderr)
sys.exit(code)
"""


def run(*argv, **environment):
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.parametrize("argv", startup.COMMANDS.values(), ids=startup.COMMANDS)
def test_what_needs_no_model_imports_none_of_the_large_packages(argv):
    done = run(sys.executable, "-c", PROBE, *argv)
    assert done.returncode in (0, 2) and done.stderr.endswith("imported:\n"), done.stderr


def test_half_a_second_is_enough():
    # The processor's time: the clock's is that of whatever else the machine does. `python -m
    # benchmarks.startup` measures both, 20 times.
    for name in ("--help", "no number"):
        times = startup.measure(startup.COMMANDS[name], repeats=3)
        assert min(times.processor) < startup.TARGET, (name, times)


def test_a_reader_that_goes_away(tmp_path):
    shell = f"{' '.join(QVG)} --help | true; exit ${{PIPESTATUS[0]}}"
    done = run("bash", "-c", shell)
    # 0: all was written before; 1 is what the printer of help texts says.
    assert done.returncode in (0, 1, 141) and done.stderr == ""


def test_a_full_output():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*QVG, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300
        )
    assert done.returncode == 2
    assert done.stderr.startswith("qvg: error: standard output: No space left on device")
    assert done.stderr.count("\n") == 1


def test_closed_outputs():
    for closing in ("2>&-", ">&-", ">&- 2>&-"):
        done = run("bash", "-c", f"{' '.join(QVG)} generate --frames x {closing}")
        assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("platform", ["bogus", pytest.param("cuda", marks=pytest.mark.slow)])
def test_a_platform_that_is_not_there(platform):
    if platform == "cuda" and os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has such a platform")
    done = run(*QVG, "codecs", JAX_PLATFORMS=platform)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"JAX_PLATFORMS={platform!r} cannot be used here" in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_docstrings_and_wide_numbers_may_be_missing_or_asked_for(tmp_path):
    done = run(sys.executable, "-OO", "-m", "qvg_jax", "codecs", JAX_ENABLE_X64="1")
    assert done.returncode == 0 and done.stderr == "" and "midrise" in done.stdout
