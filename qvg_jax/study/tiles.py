"""What attention loses when it reads a few tiles of the history: shares of key tiles on captured K, V and Q.

Queries and the history are cut into tiles, boxes of tokens or runs of them. Each tile of queries, in each head,
reads a share of the key tiles, chosen in one of four ways, and always the block's own keys where they were
captured. Nothing is trained for it. What is measured:
- mass: the part of the softmax of dense attention that lies on the keys that are read, a mean over queries;
- error: ||o' - o|| / ||o||, relative L2 of the attention output.
Mass says what a choice finds, the error what that is worth. The choice by exact mass finds the most, and need not
have the least error: where attention is spread over everything, the tiles with most of the mass have values unlike
the mean, and tiles that are chosen without looking are the better sample.

A small error here does not say that a model can spare the rest. In models of few steps even the best tiles may not
suffice, as the authors of MonarchRT (arXiv 2602.12271) report, and errors add up over layers, steps and blocks.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qvg_jax.attention.tiles import Box, tile_means, to_tiles
from qvg_jax.codecs import presets
from qvg_jax.errors import UserError, told_to_user
from qvg_jax.study.capture import Captured, rotated
from qvg_jax.study.tune import restored

__all__ = ["CHOICES", "TileGrids", "TileLoss", "measure_tiles"]

CHOICES = ("means", "exact mass", "newest", "even")
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileGrids:
    """How tokens of a capture lie in frames, and their tiles; each is frames, rows and columns.

    Attributes:
        queries, keys: the tokens of the block that asks and of the history.
        query_tile, key_tile: divide them.
    """

    queries: Box
    keys: Box
    query_tile: Box
    key_tile: Box

    @classmethod
    def runs(cls, captured: Captured, query_tokens: int, key_tokens: int) -> "TileGrids":
        """Tiles of tokens that follow each other, where nothing is known of frames."""
        queries, keys = captured.q_LBHQD.shape[3], captured.k_LBHTD.shape[3]
        return cls(
            queries=(1, 1, queries),
            keys=(1, 1, keys),
            query_tile=(1, 1, query_tokens),
            key_tile=(1, 1, key_tokens),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileLoss:
    """What one choice of tiles loses.

    Attributes:
        choice: one of `CHOICES`: the highest products of means, as LongCat chooses, the tiles with most of the
            softmax, the last ones, or tiles spread evenly without looking at them.
        share: of the key tiles that was asked for.
        tiles: how many each tile of queries reads.
        mass: of dense attention on what is read.
        error: relative L2 of the output over all layers.
        worst_layer: the largest of the layers' errors.
    """

    choice: str
    share: float
    tiles: int
    mass: float
    error: float
    worst_layer: float


def measure_tiles(
    captured: Captured,
    grids: TileGrids,
    shares: Sequence[float] = SHARES,
    *,
    recipe: str | None = None,
    span_tokens: int | None = None,
) -> list[TileLoss]:
    """The loss of every choice and share; errors are over dense attention to the captured K and V.

    Args:
        captured: from `load_captured`.
        grids: where tiles are.
        shares: of the key tiles, above 0 up to 1; rounded up to whole tiles.
        recipe: codecs of the history, NAME or NAME:SETTING=VALUE; None leaves it as captured. With share 1 the
            error is that of the codec alone.
        span_tokens: tokens that are compressed together; None is the whole history.

    Raises:
        UserError: a share outside of 0 to 1, tiles that do not divide the grids, or an unknown recipe.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise UserError(f"share={share} is not accepted: give above 0, up to 1")
    k, v = captured.k_LBHTD, captured.v_LBHTD
    with told_to_user():
        if recipe is not None:
            span = span_tokens or k.shape[3]
            k, v = (
                np.asarray(restored(codec, x, span))
                for codec, x in zip(presets.parse_pair(recipe), (k, v), strict=True)
            )
        layers = [_of_layer(captured, k[l], v[l], l, grids) for l in range(len(k))]
    return [
        _loss(layers, choice, share) for choice in CHOICES for share in sorted(shares, reverse=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Dense attention of a layer, and what chooses tiles; tokens tile by tile, U to a key tile."""

    exact_BHNSD: Array
    logit_BHNSMU: Array
    own_logit_BHNSQ: Array
    v_BHMUD: Array
    own_v_BHQD: Array
    scores: dict[str, Array]  # (B, H, N, M) by choice: the highest are read


def _of_layer(captured: Captured, k, v, l: int, grids: TileGrids) -> _Layer:
    """The layer with a history of these K and V, its exact output with the captured ones."""
    f32, pairing = jnp.float32, captured.pairing
    heads, query_heads = captured.k_LBHTD.shape[2], captured.q_LBHQD.shape[2]

    def of_heads(x: Array) -> Array:
        return jnp.repeat(x, query_heads // heads, 1)

    def turned(x, turn) -> Array:
        return rotated(jnp.asarray(x, f32), jnp.asarray(turn), pairing)

    def tiled(x_BHTD: Array, grid: Box, tile: Box, name: str) -> Array:
        return to_tiles(jnp.swapaxes(x_BHTD, 1, 2), grid, tile, name)

    q_BHNSD = tiled(
        turned(captured.q_LBHQD[l], captured.turn_q), grids.queries, grids.query_tile, "query_tile"
    )
    own = jnp.zeros((*q_BHNSD.shape[:2], 0, q_BHNSD.shape[-1]), f32)
    own_k_BHQD, own_v_BHQD = own, own
    if captured.own_k_LBHQD is not None and captured.own_v_LBHQD is not None:
        own_k_BHQD = of_heads(turned(captured.own_k_LBHQD[l], captured.turn_q))
        own_v_BHQD = of_heads(jnp.asarray(captured.own_v_LBHQD[l], f32))
    own_logit = _logits("bhnsd,bhqd->bhnsq", q_BHNSD, own_k_BHQD)

    def of_keys(k, v):
        k, v = (of_heads(x) for x in (turned(k, captured.turn_k), jnp.asarray(v, f32)))
        k, v = (tiled(x, grids.keys, grids.key_tile, "key_tile") for x in (k, v))
        return k, v, _logits("bhnsd,bhmud->bhnsmu", q_BHNSD, k)

    _, exact_v, exact_logit = of_keys(captured.k_LBHTD[l], captured.v_LBHTD[l])
    exact, mass_BHNM = _attend(exact_logit, own_logit, exact_v, own_v_BHQD, None)
    k_BHMUD, v_BHMUD, logit = of_keys(k, v)
    _, mass_BHNM = _attend(logit, own_logit, v_BHMUD, own_v_BHQD, None)
    means = jnp.einsum("bhnd,bhmd->bhnm", tile_means(q_BHNSD), tile_means(k_BHMUD))
    at_M = np.arange(means.shape[-1], dtype=np.float32)
    # The largest fractional parts of multiples of the golden ratio are spread evenly, however many are taken.
    newest, even = (
        jnp.broadcast_to(x, means.shape) for x in (at_M, at_M * np.float32(0.618034) % 1)
    )
    scores = dict(zip(CHOICES, (means, mass_BHNM, newest, even), strict=True))
    return _Layer(exact, logit, own_logit, v_BHMUD, own_v_BHQD, scores)


def _logits(pairs: str, q: Array, k: Array) -> Array:
    return jnp.einsum(pairs, q, k) / math.sqrt(q.shape[-1])


@jax.jit
def _attend(
    logit_BHNSMU: Array,
    own_BHNSQ: Array,
    v_BHMUD: Array,
    own_v_BHQD: Array,
    read_BHNM: Array | None,
) -> tuple[Array, Array]:
    """The output over the key tiles that are read (None: all), and the mass of dense attention on each tile."""
    shape = logit_BHNSMU.shape
    flat = jnp.concatenate([logit_BHNSMU.reshape(*shape[:4], -1), own_BHNSQ], -1)
    dense = jax.nn.softmax(flat, -1)[..., : shape[4] * shape[5]].reshape(shape)
    if read_BHNM is not None:
        shown = jnp.where(read_BHNM[:, :, :, None, :, None], logit_BHNSMU, -jnp.inf)
        flat = jnp.concatenate([shown.reshape(*shape[:4], -1), own_BHNSQ], -1)
    p = jax.nn.softmax(flat, -1)
    past, own = p[..., : shape[4] * shape[5]].reshape(shape), p[..., shape[4] * shape[5] :]
    out = jnp.einsum("bhnsmu,bhmud->bhnsd", past, v_BHMUD)
    out = out + jnp.einsum("bhnsq,bhqd->bhnsd", own, own_v_BHQD)
    return out, dense.sum(-1).mean(3)


@jax.jit
def _highest(score_BHNM: Array, best_BHNJ: Array) -> Array:
    """True for the tiles with these numbers."""
    return jax.nn.one_hot(best_BHNJ, score_BHNM.shape[-1], dtype=bool).any(3)


def _loss(layers: list[_Layer], choice: str, share: float) -> TileLoss:
    """One choice and share, over all layers."""
    change, size, mass, tiles = [], [], [], 0
    for x in layers:
        score_BHNM = x.scores[choice]
        tiles = math.ceil(share * score_BHNM.shape[-1])
        read_BHNM = _highest(score_BHNM, jax.lax.top_k(score_BHNM, tiles)[1])
        out, mass_BHNM = _attend(
            x.logit_BHNSMU, x.own_logit_BHNSQ, x.v_BHMUD, x.own_v_BHQD, read_BHNM
        )
        on_history = jnp.sum(mass_BHNM, -1)
        mass.append(jnp.mean(1 - on_history + jnp.sum(jnp.where(read_BHNM, mass_BHNM, 0), -1)))
        change.append(jnp.sum((out - x.exact_BHNSD) ** 2))
        size.append(jnp.sum(x.exact_BHNSD**2))
    change, size = (np.asarray(x, np.float64) for x in (change, size))
    return TileLoss(
        choice=choice,
        share=share,
        tiles=tiles,
        mass=float(np.mean(mass)),
        error=float(np.sqrt(change.sum() / max(size.sum(), 1e-30))),
        worst_layer=float(np.sqrt(np.max(change / np.maximum(size, 1e-30)))),
    )
