"""One Lloyd iteration on Hopper: nearest centroid of every token, and sums of the tokens of each.

Two warpgroups compute and one loads tiles of 128 tokens. Each computing warpgroup finds the nearest
centroid of 64 tokens by a matrix product, then both exchange what they found, and each adds all
128 tokens to its half of the clusters by a second product, of one-hot rows with the tokens. Sums
stay in registers until the CTA's last tile, so x is read once and no atomics are needed: the
CTAs' sums are added in a fixed order afterwards, and the same input gives the same bytes.

The number of a centroid is written into the last 8 bits of its score's float32, so that one
maximum finds both: scores are compared to 16 bits, finer than the bf16 they are products of.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.gpu.registers import constant, fold, product
from pallas_kernels.kmeans.types import HEAD_DIM, TILE, Tuning

__all__ = [
    "ROWS",
    "load_tiles",
    "multiply_into",
    "nearest",
    "sums",
    "swizzled",
]

ROWS = TILE // 2  # tokens that a warpgroup assigns at once
_W = plgpu.Layout.WGMMA


def swizzled(*shape: int) -> Any:
    """The shared memory of bf16 operands of products."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def multiply_into(acc: Array, left: Array, right: Any) -> Array:
    """acc + left @ right, with the left operand in registers."""
    return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(acc))


def nearest(x_smem: Any, c_smem: Any, bias_smem: Any, columns: int, steps: Any = None) -> Any:
    """Nearest centroids of 64 tokens and their scores x . c - |c|^2 / 2.

    Args:
        x_smem: tokens (64, D) in shared memory.
        c_smem: centroids (K, D).
        bias_smem: -|c|^2 / 2.
        columns: centroids per product.
        steps: of the loop over products; None is all of them, 0 gives a result that nobody may read.

    Returns:
        ids (int32) and scores (float32).
    """

    def larger(n, best):
        chunk = pl.ds(n * columns, columns)
        dot = product(x_smem, c_smem.at[chunk].T, (ROWS, columns))
        bias = plgpu.load(bias_smem.at[chunk], layout=_W.reduce(0))
        score = dot + lax.broadcast_in_dim(bias, dot.shape, [1])
        bits = lax.bitcast_convert_type(score, jnp.int32) & -256
        column = plgpu.broadcasted_iota(jnp.int32, dot.shape, 1, layout=_W) + n * columns
        bits = bits | (248 - (column & -8))  # the number of the eight, a constant of every register
        return jnp.maximum(best, fold(lax.bitcast_convert_type(bits, jnp.float32), jnp.maximum, 8))

    # A loop in the program: the kernels are shorter by a third, compile faster, and run faster too.
    steps = c_smem.shape[0] // columns if steps is None else steps
    best = lax.fori_loop(0, steps, larger, constant((ROWS, 8), -jnp.inf))
    inside = plgpu.broadcasted_iota(jnp.int32, best.shape, 1, layout=_W)
    bits = lax.bitcast_convert_type(best, jnp.int32) | (7 - inside)
    key = lax.bitcast_convert_type(bits, jnp.float32).max(axis=1)
    bits = lax.bitcast_convert_type(key, jnp.int32)
    return 255 - (bits & 255), key


def load_tiles(
    x_gmem: Any, x_smem: Any, x_full: Any, x_empty: Any, first: Array, count: Array
) -> None:
    """Brings `count` tiles of a row into a ring of shared memory, from tile `first` on."""
    stages = x_smem.shape[0]

    @pl.loop(0, count)
    def _(i):
        slot = lax.rem(i, stages)

        @pl.when(i >= stages)
        def _():
            plgpu.barrier_wait(x_empty.at[slot])

        tile = pl.ds((first + i) * TILE, TILE)
        plgpu.copy_gmem_to_smem(x_gmem.at[tile], x_smem.at[slot], x_full.at[slot])

    # Every arrival is waited for, so that no barrier ends in the middle of a phase.
    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _(i):
        plgpu.barrier_wait(x_empty.at[lax.rem(i, stages)])


# Calls of equal shapes are one function of a program: K and V share a kernel, which takes seconds to compile.
@functools.partial(jax.jit, static_argnames=("tokens", "parts", "scores", "tuning"))
def sums(
    x_RTD: Array,
    c_RKD: Array,
    bias_RK: Array,
    *,
    tokens: int,
    parts: int,
    scores: bool,
    tuning: Tuning,
) -> tuple[Array, ...]:
    """Sums and numbers of the tokens nearest to each centroid, of `parts` parts of the tokens.

    Args:
        x_RTD: tokens, bf16; T a multiple of 8, as copies move eight rows.
        c_RKD: centroids, bf16; K is 128 or 256.
        bias_RK: -|c|^2 / 2, float32; very negative for a centroid that must not be chosen.
        tokens: how many of the T count.
        parts: P, CTAs per row; at most as many as tiles.
        scores: whether each token's centroid and score are returned too.
        tuning: sizes.

    Returns:
        (R, P, K, D) and (R, P, K), float32; with `scores` also ids (int32) and scores (float32),
        (R, tokens rounded up to tiles).
    """
    rows, clusters, _ = c_RKD.shape
    own = clusters // 2  # clusters of one warpgroup
    tiles = -(-tokens // TILE)
    rings = 4  # ids of how many tiles are in flight

    def body(
        x_gmem, c_gmem, bias_gmem, sums_gmem, counts_gmem, *more,
        x_smem, c_smem, bias_smem, ids_smem, x_full, x_empty, c_full, ids_full,
    ):  # fmt: skip
        row, part = lax.axis_index("row"), lax.axis_index("part")
        wg = lax.axis_index("wg")
        first, last = part * tiles // parts, (part + 1) * tiles // parts
        count = last - first

        def assign(i):
            slot, ring, on = lax.rem(i, tuning.stages), lax.rem(i, rings), i < count
            pl.when(on)(lambda: plgpu.barrier_wait(x_full.at[slot]))
            x_ref = x_smem.at[slot, pl.ds(wg * ROWS, ROWS)]
            steps = jnp.where(on, clusters // tuning.columns, 0)
            ids, score = nearest(x_ref, c_smem, bias_smem, tuning.columns, steps)
            start = (first + i) * TILE + wg * ROWS

            @pl.when(on)
            def _():
                if scores:
                    more[0].at[row, pl.ds(start, ROWS)][...] = ids
                    more[1].at[row, pl.ds(start, ROWS)][...] = score
                token = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_W.reduce(1)) + start
                ids_smem.at[ring, pl.ds(wg * ROWS, ROWS)][...] = jnp.where(
                    token < tokens, ids, clusters
                )
                plgpu.barrier_arrive(ids_full.at[ring])

        def add(i, carry):
            slot, ring, on = lax.rem(i, tuning.stages), lax.rem(i, rings), i >= 0
            pl.when(on)(lambda: plgpu.barrier_wait(ids_full.at[ring]))
            shape = (own, ROWS)

            def add_half(i_half, carry):
                total, number = carry
                half = pl.ds(i_half * ROWS, ROWS)
                cluster = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_W) + wg * own
                ids = plgpu.load(ids_smem.at[ring, half], layout=_W.reduce(0))
                hot = jnp.where(cluster == lax.broadcast_in_dim(ids, shape, [1]), 1.0, 0.0)
                number = number + fold(hot, jnp.add, 8)
                hot = hot.astype(jnp.bfloat16)
                return multiply_into(total, hot, x_smem.at[slot, half]), number

            carry = lax.fori_loop(0, jnp.where(on, 2, 0), add_half, carry)
            pl.when(on)(lambda: plgpu.barrier_arrive(x_empty.at[slot]))
            return carry

        # A tile is added one step after it is assigned, so that the two warpgroups may drift apart.
        # Nothing is assigned in the last step and nothing is added in the first, by loops of no
        # steps: with products under a condition a pass takes twice the time, and with these
        # steps outside of the loop the kernel is twice as long and 6 % slower.
        def step(i, carry):
            assign(i)
            return add(i - 1, carry)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(tuning.registers[0], action="increase")
            plgpu.barrier_wait(c_full)
            carry = constant((own, HEAD_DIM), 0.0), constant((own, 8), 0.0)
            total, number = lax.fori_loop(0, count + 1, step, carry)
            clusters_of_wg = pl.ds(wg * own, own)
            sums_gmem.at[row, part, clusters_of_wg][...] = total
            counts_gmem.at[row, part, clusters_of_wg][...] = number.sum(axis=1)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(tuning.registers[1], action="decrease")
            plgpu.copy_gmem_to_smem(c_gmem.at[row], c_smem, c_full)
            plgpu.copy_gmem_to_smem(bias_gmem.at[row], bias_smem, c_full)

            load_tiles(x_gmem.at[row], x_smem, x_full, x_empty, first, count)

    shapes = [
        ((rows, parts, clusters, HEAD_DIM), jnp.float32),
        ((rows, parts, clusters), jnp.float32),
    ]
    if scores:
        shapes += [((rows, tiles * TILE), jnp.int32), ((rows, tiles * TILE), jnp.float32)]
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*s) for s in shapes],
        grid=(rows, parts),
        grid_names=("row", "part"),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            x_smem=swizzled(tuning.stages, TILE, HEAD_DIM),
            c_smem=swizzled(clusters, HEAD_DIM),
            bias_smem=plgpu.SMEM((clusters,), jnp.float32),
            ids_smem=plgpu.SMEM((rings, TILE), jnp.int32),
            x_full=plgpu.Barrier(num_barriers=tuning.stages),
            x_empty=plgpu.Barrier(num_arrivals=2, num_barriers=tuning.stages),
            c_full=plgpu.Barrier(num_arrivals=2),
            ids_full=plgpu.Barrier(num_arrivals=2, num_barriers=rings),
        ),
        kernel_name="kmeans_sums",
    )
    return tuple(kernel(x_RTD, c_RKD, bias_RK))
