"""The three warpgroups of an attention CTA, two that compute and one that loads, and the memory they share.

The compute warpgroups alternate at the tensor cores: one computes its softmax while the other
multiplies. Left alone they fall into step and wait for the same unit.

In e4m3 the second product starts from zero at every tile and is added in float32. The 8-bit tensor
cores of Hopper keep about 14 bits of their accumulator: accumulating 18,720 values of mean 0.5 in
it came out 12 % short on an H100, this way 0.1 %. The sums of the probabilities come from the tensor cores
too: below the values lie rows of ones. So they are sums of what the values are multiplied by.

At 256 channels the accumulators of a query take 128 registers of a thread. In bf16 a tile has 64 keys
then, and its product is added in place. In e4m3 each tile's product needs registers of its own,
so it comes in two halves of the channels.

Source of the accumulation in float32: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dequant_attention.probabilities import probabilities
from pallas_kernels.dequant_attention.reference import MASK_VALUE
from pallas_kernels.dequant_attention.schedule import Task
from pallas_kernels.dequant_attention.tuning import ROWS, Config
from pallas_kernels.gpu.registers import (
    WORDS_OF_LEFT_OPERAND,
    columns,
    constant,
    fold,
    left_operand,
    over_columns,
    product,
    row_of,
)

__all__ = ["Compute", "Gmem", "Smem", "load", "load_queries", "smem_types"]


class Gmem(NamedTuple):
    """The arrays in GPU memory."""

    q: Any
    logits_scale: Any  # of every query
    k: Any
    v: Any
    valid: Any  # number of valid keys, [1]
    k_scale: Any  # of every row
    v_scale: Any
    ones: Any  # of a tile's keys, the same for all
    acc: Any  # the state
    m: Any
    l: Any


class Smem(NamedTuple):
    """Shared memory, in the order in which it lies there: tiles in flight, queries, barriers."""

    k_empty: Any
    k_full: Any
    k: Any
    ones_full: Any
    q_empty: Any
    q_full: Any
    q: Any  # of two warpgroups
    schedule_barrier: Any  # on which the compute warpgroups alternate at the tensor cores
    v_empty: Any
    v_full: Any
    v: Any


def smem_types(config: Config) -> Smem:
    """Shapes and layouts of the shared memory.

    Values in e4m3 lie transposed, with tokens adjacent, above the rows of ones.
    """
    stages, tile, d = config.stages, config.tile, config.head_dim

    def array(*shape: int) -> Any:
        # Lines of 128 bytes, or of a row if it is shorter: 64 channels in e4m3.
        size = jnp.dtype(config.dtype).itemsize
        line = min(128, shape[-1] * size)
        transforms = plgpu.TilingTransform((8, line // size)), plgpu.SwizzleTransform(line)
        return plgpu.SMEM(shape, config.dtype, transforms=transforms)

    return Smem(
        q=array(2, ROWS, d),
        k=array(stages, tile, d),
        v=array(stages, *((d + config.ones, tile) if config.fp8 else (tile, d))),
        ones_full=plgpu.Barrier(num_arrivals=stages) if config.ones else None,
        q_full=plgpu.Barrier(num_barriers=2),
        q_empty=plgpu.Barrier(num_barriers=2),
        k_full=plgpu.Barrier(num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        k_empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        schedule_barrier=plgpu.Barrier(num_barriers=2),
    )


def _where(condition: Any, f: Any, x: Any) -> Any:
    """f(x) where the condition holds, otherwise x."""
    return f(x) if condition is True else lax.cond(condition, f, lambda x: x, x)


def load_queries(task: Task, wg: Any, gmem: Gmem, smem: Smem) -> None:
    """Starts the copy of a compute warpgroup's queries into shared memory."""
    rows = pl.ds(task.query + wg * ROWS, ROWS)
    plgpu.copy_gmem_to_smem(gmem.q.at[task.head, rows], smem.q.at[wg], smem.q_full.at[wg])


def load(task: Task, tiles_done: Any, config: Config, gmem: Gmem, smem: Smem) -> None:
    """Copies the tiles of a task into slots of shared memory as they become free, the last tile first.

    A persistent kernel loads the queries here, after the first keys; in another one the compute
    warpgroups do it. `tiles_done` tiles were loaded for earlier tasks; the slots and the phases of the
    barriers go on from there.
    """
    stages, tile, d = config.stages, config.tile, config.head_dim

    def queries_when_free():
        for w in range(2):

            @pl.when(tiles_done > 0)
            def _(w=w):
                plgpu.barrier_wait(smem.q_empty.at[w])

            load_queries(task, w, gmem, smem)

    if config.ones:

        @pl.when(task.num_tiles > 0)
        def _():
            for slot in range(stages):
                rows = smem.v.at[slot, pl.ds(d, config.ones)]
                plgpu.copy_gmem_to_smem(gmem.ones, rows, smem.ones_full)

    @pl.loop(0, task.num_tiles)
    def _(i):
        slot = lax.rem(tiles_done + i, stages)
        keys = pl.ds((task.end - 1 - i) * tile, tile)

        @pl.when(tiles_done + i >= stages)
        def _():
            plgpu.barrier_wait(smem.k_empty.at[slot])

        plgpu.copy_gmem_to_smem(gmem.k.at[task.head, keys], smem.k.at[slot], smem.k_full.at[slot])

        if config.persistent:

            @pl.when(i == 0)
            def _():
                queries_when_free()

        @pl.when(tiles_done + i >= stages)
        def _():
            plgpu.barrier_wait(smem.v_empty.at[slot])

        v_tile, to = gmem.v.at[task.head, keys], smem.v.at[slot]
        if config.fp8:
            v_tile, to = gmem.v.at[task.head, :, keys], smem.v.at[slot, pl.ds(0, d)]
        plgpu.copy_gmem_to_smem(v_tile, to, smem.v_full.at[slot])


@dataclasses.dataclass(frozen=True)
class Compute:
    """A compute warpgroup of a CTA, number `wg`."""

    wg: Any
    config: Config
    gmem: Gmem
    smem: Smem

    def attend(self, task: Task, tiles_done: Any, valid: Any) -> tuple[list[Array], Array, Array]:
        """The accumulators, m and l over all keys of a task.

        Tiles come from the last to the first: only the last can be partial. `tiles_done` tiles belonged
        to earlier tasks; the slots and the phases of the barriers go on from there.
        """
        config, smem = self.config, self.smem
        rows = pl.ds(task.query + self.wg * ROWS, ROWS)
        scale = row_of(self.gmem.logits_scale.at[task.head, rows]) * self.gmem.k_scale[task.head]

        @pl.when((self.wg == 1) & (tiles_done == 0))
        def _():
            self._release_tensor_cores()

        in_last = valid - (task.end - 1) * config.tile  # keys that count of the first tile here
        accs = tuple(constant((ROWS, config.columns(c)), 0.0) for c in range(config.num_accs))
        m, alpha = constant((ROWS,), MASK_VALUE), constant((ROWS,), 1.0)
        p, l = self._nothing()
        if config.ones:
            plgpu.barrier_wait(smem.ones_full)
        if config.tuning.first_apart:
            s = self._masked(self._first_logits(tiles_done), in_last)
            p, l, m = self._probabilities(s, m, scale)

        def step(i, carry):
            """P V of tile i - 1, if there is one, then logits of tile i."""
            accs, p, l, m, alpha = carry
            slot, v_slot = (lax.rem(tiles_done + j, config.stages) for j in (i, i - 1))
            later = True if config.tuning.first_apart else i > 0

            def multiplied(accs):
                return tuple(
                    self._accumulated(acc, alpha, p, self._values(v_slot, c))
                    for c, acc in enumerate(accs)
                )

            pl.when(later)(lambda: plgpu.barrier_wait(smem.v_full.at[v_slot]))
            plgpu.barrier_wait(smem.k_full.at[slot])
            self._wait_for_tensor_cores()
            accs = _where(later, multiplied, accs)
            pl.when(later)(lambda: plgpu.barrier_arrive(smem.v_empty.at[v_slot]))
            s = product(smem.q.at[self.wg], smem.k.at[slot].T, (ROWS, config.tile))
            self._release_tensor_cores()
            plgpu.barrier_arrive(smem.k_empty.at[slot])
            if later is not True:
                s = _where(i == 0, lambda s: self._masked(s, in_last), s)
            p, l_tile, m_new = self._probabilities(s, m, scale)
            alpha = jnp.exp2(m - m_new)
            l = None if l is None else l * over_columns(alpha, l.shape) + l_tile
            return accs, p, l, m_new, alpha

        first = 1 if config.tuning.first_apart else 0
        accs, p, l, m, alpha = lax.fori_loop(first, task.num_tiles, step, (accs, p, l, m, alpha))
        if config.persistent:
            plgpu.barrier_arrive(smem.q_empty.at[self.wg])
        out = []
        for c, acc in enumerate(accs):
            acc = self._with_last_tile(acc, alpha, p, c, task.num_tiles, tiles_done)
            if acc.shape[1] > config.acc_channels:
                l = columns(acc, config.acc_channels, acc.shape[1])  # eight times the same
                acc = columns(acc, 0, config.acc_channels)
            out.append(acc * self.gmem.v_scale[task.head])
        return out, m, l.max(axis=1) if config.ones else l.sum(axis=1)

    def _wait_for_tensor_cores(self) -> None:
        plgpu.barrier_wait(self.smem.schedule_barrier.at[self.wg])

    def _release_tensor_cores(self) -> None:
        """Lets the other compute warpgroup use the tensor cores."""
        plgpu.barrier_arrive(self.smem.schedule_barrier.at[1 - self.wg])

    def _first_logits(self, tiles_done: Any) -> Array:
        config, smem = self.config, self.smem

        def logits(acc):
            slot = lax.rem(tiles_done, config.stages) if config.persistent else 0
            plgpu.barrier_wait(smem.k_full.at[slot])
            self._wait_for_tensor_cores()
            plgpu.wgmma(acc, smem.q.at[self.wg], smem.k.at[slot].T)
            self._release_tensor_cores()
            s = acc[...]
            plgpu.barrier_arrive(smem.k_empty.at[slot])
            return s

        return pl.run_scoped(logits, plgpu.ACC((ROWS, config.tile), jnp.float32))

    def _masked(self, s: Array, keys: Any) -> Array:
        """The logits of a tile of which the first keys count."""
        return jnp.where(self._columns() < keys, s, MASK_VALUE)

    def _columns(self) -> Array:
        """The token of a tile that each column of the logits belongs to."""
        column = plgpu.broadcasted_iota(
            jnp.int32, (ROWS, self.config.tile), 1, layout=plgpu.Layout.WGMMA
        )
        if self.config.fp8:  # the inverse of key_row_of_token
            inside = ((column & 6) << 1) | ((column >> 2) & 2) | (column & 1)
            column = (column & -16) | inside
        return column

    def _nothing(self) -> tuple[Array, Array | None]:
        """P and its sums before the first tile."""
        tile = self.config.tile
        if self.config.fp8:
            words = jnp.zeros((ROWS, tile // 4), jnp.int32)
            return plgpu.layout_cast(words, WORDS_OF_LEFT_OPERAND), None
        return constant((ROWS, tile), 0.0).astype(jnp.bfloat16), constant((ROWS, 8), 0.0)

    def _probabilities(self, s: Array, m: Array, scale: Array) -> tuple[Array, Array | None, Array]:
        """The left operand of P V for a tile, in bf16 partial sums of P in eight columns, and the new m."""
        if self.config.fp8:
            p, m_new = probabilities(s, m, scale)
            return p, None, m_new
        largest = fold(s, jnp.maximum, 8).max(axis=1)
        m_new = jnp.maximum(m, largest * scale)
        p = jnp.exp2(s * over_columns(scale, s.shape) - over_columns(m_new, s.shape))
        return p.astype(jnp.bfloat16), fold(p, jnp.add, 8), m_new

    def _slot_of_values(self, i: Any, tiles_done: Any) -> Any:
        """The slot of tile i of a task, once its values have arrived."""
        slot = lax.rem(tiles_done + i, self.config.stages)
        plgpu.barrier_wait(self.smem.v_full.at[slot])
        return slot

    def _values(self, slot: Any, c: int) -> Any:
        """The values in a slot for the columns of accumulator c."""
        config = self.config
        if not config.fp8:
            return self.smem.v.at[slot]
        if config.num_accs == 1:
            return self.smem.v.at[slot].T
        return self.smem.v.at[slot, pl.ds(config.channels(c).start, config.columns(c))].T

    def _left(self, p: Array) -> Array:
        return left_operand(p, self.config.dtype) if self.config.fp8 else p

    def _accumulated(self, acc: Array, alpha: Array, p: Array, v: Any) -> Array:
        """The accumulator after one more tile: acc alpha + p v."""
        rescaled = acc * over_columns(alpha, acc.shape)
        if self.config.fp8:
            return rescaled + product(self._left(p), v, acc.shape)
        multiply = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, self._left(p), v))
        return multiply(plgpu.ACC.init(rescaled))

    def _with_last_tile(
        self, acc: Array, alpha: Array, p: Array, c: int, num_tiles: Any, tiles_done: Any
    ) -> Array:
        """acc alpha + p v for accumulator c and the last tile of a task, whose slot becomes free."""
        config, v_empty = self.config, self.smem.v_empty
        if not config.adds_last_product:
            slot = self._slot_of_values(num_tiles - 1, tiles_done)
            acc = self._accumulated(acc, alpha, p, self._values(slot, c))
            plgpu.barrier_arrive(v_empty.at[slot])
            return acc

        def values(acc_ref):
            slot = lax.rem(tiles_done + num_tiles - 1, config.stages)
            if c == 0:
                plgpu.barrier_wait(self.smem.v_full.at[slot])
            plgpu.wgmma(acc_ref, self._left(p), self._values(slot, c))
            new = acc_ref[...]
            if c == config.num_accs - 1:
                plgpu.barrier_arrive(v_empty.at[slot])
            return new

        new = pl.run_scoped(values, plgpu.ACC(acc.shape, jnp.float32))
        return acc * over_columns(alpha, acc.shape) + new
