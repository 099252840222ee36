"""A pocket world of a few thousand random weights, and a command that runs it, for tests."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from flax import nnx

from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.modeling import PocketWorld
from models.pocket_world.params import save_weights

TOUR, FRAMES = 48, 18  # one compressed span of 8 blocks; 18 is not a whole number of blocks


def random_params(**sizes):
    """Configuration and parameters, the same on every call."""
    cfg = PocketWorldConfig(**(vars(PocketWorldConfig.smoke()) | sizes))
    return cfg, nnx.to_pure_dict(nnx.state(PocketWorld(cfg, rngs=nnx.Rngs(0))))


def random_weights(folder: Path) -> Path:
    """A weights file with them."""
    path = folder / "smoke.safetensors"
    save_weights(path, *random_params())
    return path


@contextlib.contextmanager
def as_in_its_own_process(session: Path) -> Iterator[None]:
    """The command's own settings of JAX inside, the tests' afterwards; nothing in the user's folder.

    The run of the tests names a folder of compiled programs, which the command then uses.
    """
    with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"):
        patch.setenv("XDG_CACHE_HOME", str(session / "user-cache"))
        yield
