"""Where the tokens of latent frames are: ordered frame slowest, then row, then column."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def token_positions(
    frames_F: Int[Array | np.ndarray, "F"], rows: int, columns: int
) -> Int[Array, "T 3"]:
    """(frame, row, column) of all tokens of the given latent frames."""
    frames_F = jnp.asarray(frames_F, jnp.int32)
    axes = jnp.meshgrid(frames_F, jnp.arange(rows), jnp.arange(columns), indexing="ij")
    return jnp.stack([a.reshape(-1) for a in axes], axis=-1)
