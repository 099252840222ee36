"""Fixtures of the tests against golden vectors: a test module names its folder in `SUBJECT`.

Another folder may have other sizes, seeds and layer counts, and may store fewer arrays, for example
those of the first and the last layer only. Tests therefore read sizes and names from the files.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from tests.support.golden import Golden, golden_folder


@pytest.fixture(autouse=True)
def _true_float32() -> Iterator[None]:
    """Float32 products are not rounded to fewer bits, as in the references."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Golden:
    """The folder of vectors that the test module names in `SUBJECT`."""
    return golden_folder(request.module.SUBJECT)


@pytest.fixture(scope="module")
def vectors(folder: Golden) -> Callable[[str], dict[str, np.ndarray]]:
    """`vectors("dit_tiny_io")` are the arrays of that file, read once."""
    return functools.cache(folder.arrays)
