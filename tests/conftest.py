"""Strict and quick settings of JAX for every test."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Eight fake devices, so that sharding is tested without hardware. Before JAX is imported.
# Programs run once, so a search for the fastest matrix products on a GPU costs more than it saves.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_gpu_autotune_level=0"
).strip()
# Most programs run a few times on tiny sizes, so that a CPU spends its time on compiling them.
# `JAX_DISABLE_MOST_OPTIMIZATIONS=0` compiles as users do; the checks of a push say so.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

from qvg_jax.backends import KERNELS_JAX

# Broadcasting between different ranks is how a [T, D] meets a [D, T] unnoticed.
jax.config.update("jax_numpy_rank_promotion", "raise")

if jax.default_backend() != "cpu":  # programs for a GPU are tested as users compile them
    jax.config.update("jax_disable_most_optimizations", False)

# The kernels are for one release of JAX, and so are the parts of JAX that interpret them.
OTHER_JAX = not jax.__version__.startswith(f"{KERNELS_JAX}.")
collect_ignore_glob = ["kernels/*", "attention/test_kernels_*"] if OTHER_JAX else []


def pytest_report_header() -> list[str]:
    """Says which tests are left out on another JAX than the kernels'."""
    return [f"jax {jax.__version__}: no tests of kernels, which are for {KERNELS_JAX}"] * OTHER_JAX


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first, so that none of them is alone on a worker at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# A shell starts background jobs with Ctrl-C ignored, and a command that ignores it stays so.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Tracing makes millions of short-lived tuples, and the modules imported so far never die.
gc.freeze()
gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """Mixing dtypes without saying so is an error inside the test."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module", autouse=True)
def no_run_in_the_repository() -> Iterator[None]:
    """A test that runs a job in the current folder would meet the unfinished runs of others there."""
    before = OUT.exists()
    yield
    assert before or not OUT.exists(), f"a test of this file wrote {OUT}: give it an `out`"


OUT = Path(__file__).resolve().parents[1] / "out"
MAPPED_REGIONS = Path("/proc/self/maps")  # Linux only
MOST_MAPPED_REGIONS = 15_000


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Drop compiled programs between files once a process holds very many of them.

    A compiled program maps three regions of memory. Linux ends a process with a segmentation
    fault, inside the compiler, when it asks for more than 65,530 (`vm.max_map_count`).
    """
    yield
    if not MAPPED_REGIONS.exists():
        return
    with MAPPED_REGIONS.open("rb") as regions:
        count = sum(1 for _ in regions)
    if count > MOST_MAPPED_REGIONS:
        jax.clear_caches()
        gc.collect()
