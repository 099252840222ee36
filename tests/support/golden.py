"""Folders of test vectors of the PyTorch references, and distances from them."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(
    os.environ.get("QVG_GOLDEN_DIR") or Path(__file__).parents[3].resolve() / "shared" / "golden"
)


class Golden(NamedTuple):
    """One folder of test vectors and the sizes that its config.json gives."""

    path: Path
    config: dict[str, Any]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """All arrays of the folder's `<name>.npz`: which there are depends on the folder."""
        with np.load(self.path / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}


def golden_folder(subject: str) -> Golden:
    """The folder of a subject in $QVG_GOLDEN_DIR (default ../shared/golden), or a skipped test."""
    path = ROOT / subject
    if not (path / "config.json").is_file():
        pytest.skip(f"no golden vectors at {path}: set QVG_GOLDEN_DIR to their folder")
    return Golden(path, json.loads((path / "config.json").read_text()))


def frames_first(x_BZFYX):
    """[..., Z, F, Y, X] of the references as [..., F, Z, Y, X] of this project, and back."""
    return jnp.asarray(np.swapaxes(x_BZFYX, -4, -3))


def close(actual, expected, atol=1e-4):
    """Asserts equal shapes and a largest difference of at most `atol`."""
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol)


def distance(actual, expected):
    """The L2 norm of the difference of arrays of one shape, relative to the expected one's."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def stored_layers(arrays, name, layers):
    """The layers i of a network whose array `name.format(i)` is stored: the first and last at least."""
    stored = [i for i in range(layers) if name.format(i) in arrays]
    assert {0, layers - 1} <= set(stored), f"{name}: only layers {stored} of {layers} are stored"
    return stored
