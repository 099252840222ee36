"""What a computing warpgroup does with the tiles of a task: logits, softmax, weighted values.

The warpgroups take turns at the matrix units: one computes its softmax while the other multiplies. Left
alone they fall into step and wait for the same unit.

In e4m3 the second product starts from zero at every tile and is added in float32. The 8-bit tensor
cores of Hopper keep about 14 bits of their accumulator: accumulating 18,720 values of mean 0.5 in
it came out 12 % short on an H100, this way 0.1 %. The probabilities are scaled by 2 ** 8, into the
middle of e4m3's range.

At 256 channels the weighted values of a query are 128 registers of a thread. In bf16 a tile has 64 keys
then, and its product is added where they are. In e4m3 each tile's product needs registers of its own,
so it comes in two halves of the channels; the compiler still moves about a quarter of the registers
through local memory in every step.

Source of the accumulation in float32: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dequant_attention.memory import Arrays, Shared
from pallas_kernels.dequant_attention.reference import FAR
from pallas_kernels.dequant_attention.sizes import ROWS, Form
from pallas_kernels.dequant_attention.tasks import Task
from pallas_kernels.gpu.registers import (
    as_words,
    constant,
    fold,
    left_operand,
    over_columns,
    product,
    row_of,
)

__all__ = ["Computing"]


@dataclasses.dataclass(frozen=True)
class Computing:
    """A warpgroup of a block, number `wg`."""

    wg: Any
    form: Form
    there: Arrays
    here: Shared

    def attend(self, mine: Task, done: Any, valid: Any) -> tuple[list[Array], Array, Array]:
        """Weighted values of all keys of a task, in accumulators, their maximum and sum.

        Tiles come from the last to the first: only the last can be partial. `done` tiles belonged
        to tasks before, and slots and phases of barriers go on from there.
        """
        form, here = self.form, self.here
        rows = pl.ds(mine.query + self.wg * ROWS, ROWS)
        factor = row_of(self.there.factor.at[mine.head, rows]) * self.there.k_unit[mine.head]

        @pl.when((self.wg == 1) & (done == 0))
        def _():
            self._your_turn()

        s = self._first_logits(done)
        s = jnp.where(self._columns() + (mine.last - 1) * form.tile < valid, s, FAR)
        p, total, top = self._weights(s, constant((ROWS,), FAR), factor)
        accs = tuple(constant((ROWS, form.held), 0.0) for _ in range(form.accumulators))
        fade = constant((ROWS,), 1.0)

        def step(i, carry):
            """Weighted values of tile i - 1, then logits of tile i."""
            accs, p, total, top, fade = carry
            slot = lax.rem(done + i, form.stages)
            before = self._slot_of_values(i - 1, done)
            plgpu.barrier_wait(here.k_full.at[slot])
            self._my_turn()
            accs = tuple(
                self._added(acc, fade, p, self._values(before, c)) for c, acc in enumerate(accs)
            )
            plgpu.barrier_arrive(here.v_empty.at[before])
            s = product(here.q.at[self.wg], here.k.at[slot].T, (ROWS, form.tile))
            self._your_turn()
            plgpu.barrier_arrive(here.k_empty.at[slot])
            p, part_total, new_top = self._weights(s, top, factor)
            fade = jnp.exp2(top - new_top)
            total = total * over_columns(fade, total.shape) + part_total
            return accs, p, total, new_top, fade

        carry = lax.fori_loop(1, mine.count, step, (accs, p, total, top, fade))
        accs, p, total, top, fade = carry
        if not form.alone:
            plgpu.barrier_arrive(here.q_empty.at[self.wg])
        parts = []
        for c, acc in enumerate(accs):
            acc = self._with_last_tile(acc, fade, p, c, mine.count, done)
            parts.append(acc * self.there.v_unit[mine.head])
        return parts, top, total.sum(axis=1)

    def _my_turn(self) -> None:
        plgpu.barrier_wait(self.here.turn.at[self.wg])

    def _your_turn(self) -> None:
        plgpu.barrier_arrive(self.here.turn.at[1 - self.wg])

    def _first_logits(self, done: Any) -> Array:
        form, here = self.form, self.here

        def logits(acc_s):
            slot = 0 if form.alone else lax.rem(done, form.stages)
            plgpu.barrier_wait(here.k_full.at[slot])
            self._my_turn()
            plgpu.wgmma(acc_s, here.q.at[self.wg], here.k.at[slot].T)
            self._your_turn()
            s = acc_s[...]
            plgpu.barrier_arrive(here.k_empty.at[slot])
            return s

        return pl.run_scoped(logits, plgpu.ACC((ROWS, form.tile), jnp.float32))

    def _columns(self) -> Array:
        """Which token of a tile is in each column of the logits."""
        column = plgpu.broadcasted_iota(
            jnp.int32, (ROWS, self.form.tile), 1, layout=plgpu.Layout.WGMMA
        )
        if self.form.narrow:  # the inverse of key_row_of_token
            inside = ((column & 6) << 1) | ((column >> 2) & 2) | (column & 1)
            column = (column & -16) | inside
        return column

    def _weights(self, s: Array, top: Array, factor: Array) -> tuple[Array, Array, Array]:
        """Probabilities of a tile for the product, their sums by eighths, and the new maximum."""
        largest = fold(s, jnp.maximum, 8).max(axis=1)
        new_top = jnp.maximum(top, largest * factor - self.form.shift)
        p = jnp.exp2(s * over_columns(factor, s.shape) - over_columns(new_top, s.shape))
        total, p = fold(p, jnp.add, 8), p.astype(self.form.dtype)
        return as_words(p) if self.form.narrow else p, total, new_top

    def _slot_of_values(self, i: Any, done: Any) -> Any:
        """That of tile i of a task, when its values are there."""
        slot = lax.rem(done + i, self.form.stages)
        plgpu.barrier_wait(self.here.v_full.at[slot])
        return slot

    def _values(self, slot: Any, c: int) -> Any:
        """Those of the channels that accumulator c holds."""
        held = self.form.held
        if not self.form.narrow:
            return self.here.v.at[slot]
        if self.form.accumulators == 1:
            return self.here.v.at[slot].T
        return self.here.v.at[slot, pl.ds(c * held, held)].T

    def _left(self, p: Array) -> Array:
        return left_operand(p, self.form.dtype) if self.form.narrow else p

    def _added(self, acc: Array, fade: Array, p: Array, right: Any) -> Array:
        """acc fade + p right"""
        faded = acc * over_columns(fade, acc.shape)
        if self.form.narrow:
            return faded + product(self._left(p), right, acc.shape)
        multiply = pl.run_state(lambda acc_o: plgpu.wgmma(acc_o, self._left(p), right))
        return multiply(plgpu.ACC.init(faded))

    def _with_last_tile(
        self, acc: Array, fade: Array, p: Array, c: int, count: Any, done: Any
    ) -> Array:
        """The same for accumulator c and the last tile of a task; then its values are free."""
        form, v_empty = self.form, self.here.v_empty
        if not form.last_apart:
            slot = self._slot_of_values(count - 1, done)
            acc = self._added(acc, fade, p, self._values(slot, c))
            plgpu.barrier_arrive(v_empty.at[slot])
            return acc

        def values(acc_o):
            slot = lax.rem(done + count - 1, form.stages)
            if c == 0:
                plgpu.barrier_wait(self.here.v_full.at[slot])
            plgpu.wgmma(acc_o, self._left(p), self._values(slot, c))
            new = acc_o[...]
            if c == form.accumulators - 1:
                plgpu.barrier_arrive(v_empty.at[slot])
            return new

        new = pl.run_scoped(values, plgpu.ACC(acc.shape, jnp.float32))
        return acc * over_columns(fade, acc.shape) + new
