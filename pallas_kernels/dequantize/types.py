"""What the kernels are told about packed spans.

Axes: R rows (any leading axes of the cache, heads last, flattened), T tokens, D head dim, C code
bytes of a token, G groups, S stages, K centroids.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8

__all__ = ["HEAD_DIMS", "PAD", "Encoded", "Scheme", "padded", "picked", "width_of"]

HEAD_DIMS = (64, 128, 256)  # that kernels read

# Workspaces hold a multiple of this many tokens, zeros behind the valid ones: a tile of attention.
PAD = 256


def padded(tokens: int) -> int:
    """Tokens of a workspace that holds `tokens`."""
    return -(-tokens // PAD) * PAD


def picked(x: Array, first_row: Array, rows: int) -> Array:
    """`rows` rows of x from `first_row` on, or from each of several first rows."""
    if first_row.ndim == 0:
        return lax.dynamic_slice_in_dim(x, first_row, rows, 0)
    row = (first_row[:, None] + jnp.arange(rows)[None]).reshape(-1)
    return x.at[row].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How codes become numbers: x = (code - offset) scale 2^exponent + sum of the centroids.

    Attributes:
        bits: 1, 2, 3, 4 or 8, packed with consecutive channels together, the first one highest.
        group: channels that share a scale.
        offset: code of zero; half integers are the grids without a zero (mid-rise).
        stages: centroids per token; 0 for none.
    """

    bits: int
    group: int
    offset: float
    stages: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Packed keys or values. Numbers in e4m3 come as bytes.

    Scales may have a power of two for each row. Centroids are bf16 or float32 numbers, int8 with a
    step per channel, or e4m3 with a power of two per row and stage.
    """

    codes_RTC: UInt8[Array, "R T C"]
    scales_RTG: UInt8[Array, "R T G"]
    ids_RST: UInt8[Array, "R S T"] | None
    centroids_RSKD: (
        Float[Array, "R S K D"] | Int8[Array, "R S K D"] | UInt8[Array, "R S K D"] | None
    )
    exponents_R: Int8[Array, "R"] | None = None
    steps_RS: Float[Array, "R S D"] | Int8[Array, "R S"] | None = None

    def tables(self, first_row: Array, rows: int) -> Float[Array, "n S K D"]:
        """Centroids of some rows as float32 numbers; of several groups of rows if there are."""
        pick = lambda x: picked(x, jnp.asarray(first_row), rows)  # noqa: E731
        x = pick(self.centroids_RSKD)
        if x.dtype == jnp.uint8:
            x = lax.bitcast_convert_type(x, jnp.float8_e4m3fn)
        x = x.astype(jnp.float32)
        if self.steps_RS is None:
            return x
        steps = pick(self.steps_RS)
        if steps.ndim == 3:
            return x * steps.astype(jnp.float32)[:, :, None]
        return x * jnp.exp2(steps.astype(jnp.float32))[:, :, None, None]


def width_of(source: Encoded | Array, scheme: Scheme | None) -> int:
    """Channels of a packed or plain row."""
    if isinstance(source, Encoded):
        return source.codes_RTC.shape[2] * 8 // scheme.bits
    return source.shape[-1]
