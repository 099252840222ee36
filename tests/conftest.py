"""Strict defaults for every test, and the golden vectors."""

import os

# Eight fake devices, so that sharding is tested without hardware. Before JAX is imported.
# Programs run once, so a search for the fastest matrix products on a GPU costs more than it saves.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_gpu_autotune_level=0"
).strip()

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

# Broadcasting between different ranks is how a [T, D] meets a [D, T] unnoticed.
jax.config.update("jax_numpy_rank_promotion", "raise")

REPO = Path(__file__).resolve().parents[1]


class Golden(NamedTuple):
    """One folder of test vectors and its sizes."""

    path: Path
    config: dict[str, Any]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Everything in one .npz file of the folder."""
        with np.load(self.path / name) as file:
            return {key: file[key] for key in file.files}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden("qvg")` is that folder of $QVG_GOLDEN_DIR (default ../shared/golden)."""
    root = Path(os.environ.get("QVG_GOLDEN_DIR") or REPO.parent / "shared" / "golden")

    def folder(subject: str) -> Golden:
        path = root / subject
        if not (path / "config.json").is_file():
            pytest.skip(f"no golden vectors at {path}: set QVG_GOLDEN_DIR to their folder")
        return Golden(path, json.loads((path / "config.json").read_text()))

    return folder


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """Mixing dtypes without saying so is an error inside the test."""
    with jax.numpy_dtype_promotion("strict"):
        yield
