"""Block-sparse attention over tiles of a video: each tile of queries reads the few key tiles that fit it best.

A tile is a box of tokens, (frames, rows, columns). The rule is LongCat-Video's: queries and keys, after RoPE, are
averaged over their tiles, the score of a pair of tiles is the dot product of the averages, and of the key tiles
of every query tile and head the ones with the highest scores are kept. How many is `sparsity` or `mass`:
- sparsity s keeps int((1 - s) n) of n tiles;
- mass p keeps tiles as long as the softmax of the scores over sqrt(D), summed from the largest on, is at most p;
- both keep the larger number.
Softmax attention over the kept tiles is exact. No array has an entry for every pair of tokens.

Letters beside those of the package: N query tiles, M key tiles, S and U their tokens, J kept key tiles.

Source: LongCat-Video (arXiv 2510.22200) and its published code. Differs from it: `mass` always keeps the best
tile, where the original keeps none if that tile alone has more; scores are float32, where the original rounds
them to the dtype of the queries.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = [
    "TileChoice",
    "TileRule",
    "attend_to_tiles",
    "choose_tiles",
    "from_tiles",
    "tile_attention",
    "tile_means",
    "to_tiles",
]

type Box = tuple[int, int, int]
"""Frames, rows and columns, in tokens."""

_KEYS_AT_ONCE = 256  # of each query tile; their K and V are copied
_STEP_BYTES = 2**29  # of the copies and logits that exist at once, where one head needs no more


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileRule:
    """Which key tiles a tile of queries keeps.

    Attributes:
        query_tile, key_tile: frames, rows and columns of a tile, in tokens; they divide the grids of tokens.
        sparsity: share of the key tiles that is left out, 0 to below 1; None leaves it to `mass`.
        mass: share of the softmax over tiles that is kept, between 0 and 1; None leaves it to `sparsity`.

    Raises:
        ValueError: neither or a wrong share, or a tile without tokens.
    """

    query_tile: Box = (4, 4, 4)
    key_tile: Box = (4, 4, 4)
    sparsity: float | None = 0.9375
    mass: float | None = None

    def __post_init__(self):
        for name in ("query_tile", "key_tile"):
            tile = getattr(self, name)
            if len(tile) != 3 or min(tile) < 1:
                raise ValueError(f"{name}={tile} is not accepted: give frames, rows and columns")
        if self.sparsity is None and self.mass is None:
            raise ValueError("sparsity=None and mass=None; accepted: one of them, or both")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} is not accepted: give 0 to below 1")
        if self.mass is not None and not 0 < self.mass < 1:
            raise ValueError(f"mass={self.mass} is not accepted: give a share between 0 and 1")

    def least(self, key_tiles: int) -> int:
        """The number of key tiles that every query tile keeps at least.

        Raises:
            ValueError: none, because the sparsity is too high for so few tiles.
        """
        if self.sparsity is None:
            return 1
        kept = int((1 - self.sparsity) * key_tiles)
        if not kept and self.mass is None:
            raise ValueError(
                f"sparsity={self.sparsity} keeps none of {key_tiles} key tiles; accepted: at most "
                f"{1 - 1 / key_tiles:g}, or more tiles"
            )
        return max(1, kept)


class TileChoice(NamedTuple):
    """The kept key tiles of each query tile, best first; entries from `count` on are not kept."""

    tile_BHNJ: Int[Array, "B H N J"]
    count_BHN: Int[Array, "B H N"]


def to_tiles(
    x_BTHD: Float[Array, "B T H D"], grid: Box, tile: Box, name: str = "tile"
) -> Float[Array, "B H N S D"]:
    """Tokens in the order (frame, row, column), tile by tile; inside of a tile in the same order.

    Args:
        x_BTHD: tokens of a whole grid.
        grid: its frames, rows and columns.
        tile: those of a tile.
        name: what the tile is called in an error.

    Raises:
        ValueError: a grid of another number of tokens, or one that the tile does not divide.
    """
    B, T, H, D = x_BTHD.shape
    if math.prod(grid) != T:
        raise ValueError(f"grid={grid} has {math.prod(grid)} tokens; accepted: one of {T}")
    if any(g % t for g, t in zip(grid, tile, strict=True)):
        raise ValueError(
            f"{name}={tile} does not divide grid={grid} of frames, rows and columns; accepted: a multiple "
            "of the tile on each axis"
        )
    counts = [g // t for g, t in zip(grid, tile, strict=True)]
    axes = [n for pair in zip(counts, tile, strict=True) for n in pair]
    x = x_BTHD.reshape(B, *axes, H, D).transpose(0, 7, 1, 3, 5, 2, 4, 6, 8)
    return x.reshape(B, H, math.prod(counts), math.prod(tile), D)


def from_tiles(x_BHNSD: Float[Array, "B H N S D"], grid: Box, tile: Box) -> Array:
    """What `to_tiles` took: (B, T, H, D), tokens in the order (frame, row, column)."""
    B, H, _, _, D = x_BHNSD.shape
    counts = [g // t for g, t in zip(grid, tile, strict=True)]
    x = x_BHNSD.reshape(B, H, *counts, *tile, D).transpose(0, 2, 5, 3, 6, 4, 7, 1, 8)
    return x.reshape(B, math.prod(grid), H, D)


def tile_means(x_BHNSD: Float[Array, "B H N S D"]) -> Float[Array, "B H N D"]:
    """The mean of each tile's tokens, summed in float32 and rounded to their dtype."""
    return jnp.mean(x_BHNSD, 3, dtype=jnp.float32).astype(x_BHNSD.dtype)


def choose_tiles(
    q_BHND: Float[Array, "B H N D"], k_BHMD: Float[Array, "B H M D"], rule: TileRule
) -> TileChoice:
    """The key tiles with the highest scores, as many as the rule keeps; of equal ones the first.

    Args:
        q_BHND, k_BHMD: means of the tiles of queries and keys, after RoPE.
        rule: sparsity, mass, or both.

    Raises:
        ValueError: the rule keeps no tile of so few.
    """
    M = k_BHMD.shape[2]
    least = rule.least(M)
    score_BHNM = jnp.einsum("bhnd,bhmd->bhnm", q_BHND, k_BHMD, preferred_element_type=jnp.float32)
    if rule.mass is None:
        tile_BHNJ = jax.lax.top_k(score_BHNM, least)[1]
        return TileChoice(tile_BHNJ, jnp.full(tile_BHNJ.shape[:3], least, jnp.int32))
    share_BHNM = jax.nn.softmax(score_BHNM / math.sqrt(q_BHND.shape[-1]), -1)
    share_BHNJ, tile_BHNJ = jax.lax.top_k(share_BHNM, M)
    within_BHN = jnp.sum(jnp.cumsum(share_BHNJ, -1) <= rule.mass, -1, dtype=jnp.int32)
    return TileChoice(tile_BHNJ, jnp.maximum(within_BHN, least))


def attend_to_tiles(
    q_BHNSD: Float[Array, "B H N S D"],
    k_BHMUD: Float[Array, "B H M U D"],
    v_BHMUD: Float[Array, "B H M U D"],
    choice: TileChoice,
) -> Float[Array, "B H N S D"]:
    """softmax(q k / sqrt(D)) v over the kept tiles; a few of them at a time, the softmax in float32.

    Args:
        q_BHNSD, k_BHMUD, v_BHMUD: tiles of queries, keys and values, from `to_tiles`.
        choice: which key tiles each query tile reads.
    """
    B, H, N, S, D = q_BHNSD.shape
    U, J = k_BHMUD.shape[3], choice.tile_BHNJ.shape[3]
    at_once = min(J, max(1, _KEYS_AT_ONCE // U))
    pad = -J % at_once
    tile_BHNJ = jnp.pad(choice.tile_BHNJ, ((0, 0), (0, 0), (0, 0), (0, pad)))
    each = N * at_once * U * (4 * S + 2 * k_BHMUD.dtype.itemsize * D)
    parts = (q_BHNSD, k_BHMUD, v_BHMUD, tile_BHNJ, choice.count_BHN)
    out = jax.lax.map(
        lambda head: _one_head(*head, at_once),
        tuple(x.reshape(B * H, *x.shape[2:]) for x in parts),
        batch_size=min(B * H, max(1, _STEP_BYTES // each)),
    )
    return out.reshape(q_BHNSD.shape)


def _one_head(q_NSD, k_MUD, v_MUD, tile_NJ, count_N, at_once: int) -> Array:
    """Attention of one head, a few kept tiles of every query tile in each step of an online softmax."""
    N, S, D = q_NSD.shape
    f32, scale = jnp.float32, 1 / math.sqrt(D)

    def step(i, carry):
        m_NS, l_NS, acc_NSD = carry
        at_NR = jax.lax.dynamic_slice_in_dim(tile_NJ, i * at_once, at_once, 1)
        k_NRUD, v_NRUD = k_MUD[at_NR], v_MUD[at_NR]
        s_NSRU = jnp.einsum("nsd,nrud->nsru", q_NSD, k_NRUD, preferred_element_type=f32) * scale
        kept_NR = i * at_once + jnp.arange(at_once)[None] < count_N[:, None]
        s_NSRU = jnp.where(kept_NR[:, None, :, None], s_NSRU, -jnp.inf)
        # Every query tile keeps its best tile, which is in the first step: m is finite from then on.
        new_NS = jnp.maximum(m_NS, s_NSRU.max((2, 3)))
        p_NSRU = jnp.exp(s_NSRU - new_NS[..., None, None])
        alpha_NS = jnp.exp(m_NS - new_NS)
        pv_NSD = jnp.einsum(
            "nsru,nrud->nsd", p_NSRU.astype(v_NRUD.dtype), v_NRUD, preferred_element_type=f32
        )
        l_NS = l_NS * alpha_NS + p_NSRU.sum((2, 3))
        return new_NS, l_NS, acc_NSD * alpha_NS[..., None] + pv_NSD

    start = jnp.full((N, S), -jnp.inf, f32), jnp.zeros((N, S), f32), jnp.zeros((N, S, D), f32)
    steps = -(-count_N.max() // at_once)
    _, l_NS, acc_NSD = jax.lax.fori_loop(0, steps, step, start)
    return (acc_NSD / l_NS[..., None]).astype(q_NSD.dtype)


def tile_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BUHD: Float[Array, "B U H D"],
    v_BUHD: Float[Array, "B U H D"],
    rule: TileRule,
    *,
    query_grid: Box,
    key_grid: Box,
) -> Float[Array, "B T H D"]:
    """softmax(q k / sqrt(D)) v, where each tile of queries reads the key tiles that the rule keeps.

    Args:
        q_BTHD, k_BUHD, v_BUHD: after RoPE, tokens in the order (frame, row, column).
        rule: size of the tiles, and how many are kept.
        query_grid, key_grid: frames, rows and columns of the tokens.

    Raises:
        ValueError: grids that do not have these tokens, tiles that do not divide them, or a rule that keeps nothing.
    """
    q_BHNSD = to_tiles(q_BTHD, query_grid, rule.query_tile, "query_tile")
    k_BHMUD, v_BHMUD = (to_tiles(x, key_grid, rule.key_tile, "key_tile") for x in (k_BUHD, v_BUHD))
    choice = choose_tiles(tile_means(q_BHNSD), tile_means(k_BHMUD), rule)
    out_BHNSD = attend_to_tiles(q_BHNSD, k_BHMUD, v_BHMUD, choice)
    return from_tiles(out_BHNSD, query_grid, rule.query_tile)
