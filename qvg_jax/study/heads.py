"""Which heads look back: where the softmax of each head lies, and what its output loses without the history.

Measured on captured K, V and Q (`Captured`), one or several blocks that ask. The keys of a head are in four
regions: the block's own, the newest blocks before it, the sink, and the history between them. For every
head, as means over queries and captures:
- the share of softmax mass in each region;
- the error without a history, ||o' - o|| / ||o||, relative L2 of its output o;
- the same error over the norm of all heads of the layer, sqrt(mean_h ||o_h||^2): a head whose output is
  small beside its neighbours' can lose it all, and nobody notices.
Shares say where a head looks, errors say what that is worth: mass on keys whose values are alike is worth
nothing. `classes` makes the heads with the smallest errors local.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qvg_jax.errors import UserError
from qvg_jax.study.capture import Captured, rotated

__all__ = ["REGIONS", "HeadRegions", "HeadScores", "classes", "measure_heads"]

REGIONS = ("own", "newest", "sink", "history")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadRegions:
    """The regions of a history, in tokens.

    Attributes:
        block_tokens: tokens of a block.
        sink_blocks: first blocks of the history.
        local_blocks: newest blocks of it.
    """

    block_tokens: int
    sink_blocks: int = 1
    local_blocks: int = 2

    def of_tokens(self, tokens: int, own: int) -> np.ndarray:
        """The number of the region of each key, an index of `REGIONS`: the history first, then the own block.

        Raises:
            UserError: a history that is no longer than sink and newest blocks.
        """
        sink, newest = (n * self.block_tokens for n in (self.sink_blocks, self.local_blocks))
        if tokens <= sink + newest:
            raise UserError(
                f"{tokens} tokens of history are not more than those of {self.sink_blocks} blocks of sink "
                f"and {self.local_blocks} newest ones, {self.block_tokens} tokens each; accepted: longer "
                "captures"
            )
        at = np.arange(tokens)
        region = np.where(at < sink, 2, np.where(at >= tokens - newest, 1, 3))
        return np.concatenate([region, np.zeros(own, region.dtype)])


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """Measurements of heads, each (layers, heads) with the captured layers in their order.

    Attributes:
        shares: (4, layers, heads), softmax mass in each of `REGIONS`.
        error: of the output without the history, over the head's own norm.
        layer_error: the same over the norm of the layer's heads.
    """

    shares: Float[np.ndarray, "4 L H"]
    error: Float[np.ndarray, "L H"]
    layer_error: Float[np.ndarray, "L H"]


@jax.jit
def _layer(
    q_BHQD: Array, k_BHTD: Array, v_BHTD: Array, region_RT: Array
) -> tuple[Array, Array, Array]:
    """Shares (R, H), and the squared norms (H,) of the output and of its change without the history."""
    b, h, _, d = k_BHTD.shape
    q_BHQD = q_BHQD.reshape(b, h, -1, d)
    s_BHQT = jnp.einsum("bhqd,bhtd->bhqt", q_BHQD, k_BHTD) / math.sqrt(d)
    p_BHQT = jax.nn.softmax(s_BHQT, -1)
    shares_RH = jnp.einsum("bhqt,rt->rh", p_BHQT, region_RT) / (b * q_BHQD.shape[2])
    out_BHQD = jnp.einsum("bhqt,bhtd->bhqd", p_BHQT, v_BHTD)
    near_T = (1 - region_RT[3])[None, None, None]
    near_BHQT = jax.nn.softmax(jnp.where(near_T > 0, s_BHQT, -jnp.inf), -1)
    change_BHQD = jnp.einsum("bhqt,bhtd->bhqd", near_BHQT, v_BHTD) - out_BHQD
    return shares_RH, jnp.sum(out_BHQD**2, (0, 2, 3)), jnp.sum(change_BHQD**2, (0, 2, 3))


def measure_heads(captures: Iterable[Captured], regions: HeadRegions) -> HeadScores:
    """The measurements of all heads, means over captures of the same layers of one model.

    Args:
        captures: one or more; without the block's own K and V its share is zero.
        regions: where sink and newest blocks are.

    Raises:
        UserError: no capture, captures of different layers or heads, or a history too short.
    """
    shares, norms, changes, form = [], [], [], None
    for captured in captures:
        layers, _, heads, tokens, _ = captured.k_LBHTD.shape
        if form is None:
            form = (captured.layers.tolist(), heads)
        if form != (captured.layers.tolist(), heads):
            raise UserError(
                f"captures of layers {captured.layers.tolist()} with {heads} heads beside layers {form[0]} "
                f"with {form[1]}; accepted: the same layers of one model"
            )
        own = 0 if captured.own_k_LBHQD is None else captured.own_k_LBHQD.shape[3]
        region_T = regions.of_tokens(tokens, own)
        region_RT = jnp.asarray(region_T[None] == np.arange(4)[:, None], jnp.float32)
        found = [_layer(*_keys(captured, l), region_RT) for l in range(layers)]
        parts = (np.stack([np.asarray(x) for x in part]) for part in zip(*found, strict=True))
        for into, part in zip((shares, norms, changes), parts, strict=True):
            into.append(part)
    if form is None:
        raise UserError("no captures; accepted: one or more")
    norm, change = (np.mean(x, 0, dtype=np.float64) for x in (norms, changes))  # (L, H)
    layer = np.maximum(norm.mean(1, keepdims=True), 1e-30)
    return HeadScores(
        shares=np.mean(shares, 0).transpose(1, 0, 2),
        error=np.sqrt(change / np.maximum(norm, 1e-30)),
        layer_error=np.sqrt(change / layer),
    )


def _keys(captured: Captured, l: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values of one layer as attention multiplies them, the own block's behind the others."""

    def turned(x: np.ndarray, turn: np.ndarray) -> Array:
        return rotated(jnp.asarray(x, jnp.float32), jnp.asarray(turn), captured.pairing)

    q = turned(captured.q_LBHQD[l], captured.turn_q)
    k, v = turned(captured.k_LBHTD[l], captured.turn_k), jnp.asarray(captured.v_LBHTD[l])
    if captured.own_k_LBHQD is None or captured.own_v_LBHQD is None:
        return q, k, v
    own = turned(captured.own_k_LBHQD[l], captured.turn_q), jnp.asarray(captured.own_v_LBHQD[l])
    return q, jnp.concatenate([k, own[0]], 2), jnp.concatenate([v, own[1]], 2)


def classes(scores: HeadScores | Float[np.ndarray, "L H"], share: float) -> Bool[np.ndarray, "L H"]:
    """The table of a `HeadHistory`: True for heads with a history, False for the share of local ones.

    Args:
        scores: the heads with the least `layer_error` become local; or any such array.
        share: of all heads, rounded to whole heads. Of equal errors the earlier layer's goes first.

    Raises:
        ValueError: a share outside of 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not accepted: give 0 to 1")
    error = scores.layer_error if isinstance(scores, HeadScores) else np.asarray(scores)
    table = np.ones(error.size, bool)
    table[np.argsort(error, axis=None, kind="stable")[: round(share * error.size)]] = False
    return table.reshape(error.shape)
