"""The auto-regressive loop: one step function, two drivers.

    def step(params, state, x):            # x: what block number i needs: actions, noise, a key
        ...                                # denoise, then compress(append(state.cache, ...))
        return state, y

    state, ys = rollout(Partial(step, params), state, xs)      # many blocks in each device call
    for y in stream(Partial(step, params), state, xs): ...     # one block at a time

(`jax.tree_util.Partial`: parameters travel as arrays and are not baked into the program.)
Both run the same jitted function: a loop over a chunk of fixed length that ends early if fewer
blocks are wanted. So the number of blocks is data and a longer video does not recompile,
and the state is donated, so the cache is updated in place.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from qvg_jax.backends import no_hopper
from qvg_jax.cache.health import raise_if_bad

__all__ = ["Stream", "rollout", "run_chunk", "stream"]

type Step = Callable[[Any, Any], tuple[Any, Any]]  # step(state, x) -> (state, y)
type Before = Callable[[Any, Any], Any]  # before(state, x) -> state
type Progress = Callable[[int, int | None, Any], None]  # progress(done, total, state)


@functools.partial(jax.jit, donate_argnames="state")
def run_chunk(step: Partial, state: Any, xs: Any, count: jax.Array) -> tuple[Any, Any]:
    """Runs `step` over the first `count` of xs; ys of the others are zeros.

    A loop and not a scan over conditional steps: XLA copies large states that go through a branch.
    """
    row = lambda i: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), xs)  # noqa: E731
    length = jax.tree.leaves(xs)[0].shape[0]
    form = jax.eval_shape(lambda state: step(state, row(0))[1], state)

    def one(i, carry):
        state, ys = carry
        state, y = step(state, row(i))
        put = lambda ys, y: lax.dynamic_update_index_in_dim(ys, y, i, 0)  # noqa: E731
        return state, jax.tree.map(put, ys, y)

    ys = jax.tree.map(lambda y: jnp.zeros((length, *y.shape), y.dtype), form)
    return lax.fori_loop(0, count, one, (state, ys))


def _first_chunk(step: Partial, state: Any, xs: Any, count: Any) -> tuple[Any, Any]:
    """Runs a chunk, and compiles it where it is a program's first, kernels of a Hopper GPU beside the rest."""
    if no_hopper() is not None:
        return run_chunk(step, state, xs, count)
    from pallas_kernels.gpu.beside import compiled_beside

    # The call takes what `lower` has made from JAX's own cache.
    with compiled_beside(run_chunk.lower(step, state, xs, count)):
        return run_chunk(step, state, xs, count)


def rollout(
    step: Step,
    state: Any,
    xs: Any,
    *,
    chunk: int = 8,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Runs `step` over all blocks: (state, ys) with ys[i] from the i-th call step(state, xs[i]).

    The first call compiles; later ones with any number of blocks do not, as long as `step`, the
    shapes of one block and `chunk` stay the same.

    Args:
        step: `step(state, x) -> (state, y)`, state of the same shapes; a function or a `Partial`.
        state: any pytree with the caches in it. It is donated: use the returned one from here on.
        xs: pytree of arrays with the blocks along the leading axis.
        chunk: blocks in one device call.
        progress: called on the host after each chunk as `progress(blocks_done, blocks, state)`;
            an exception in it ends the rollout. It must not keep the state.

    Returns:
        The last state, and ys stacked along a new leading axis, as numpy arrays on the host.

    Raises:
        ValueError: `chunk` < 1, or xs without leaves, without blocks, or of unequal lengths.
        NonFiniteError, CacheFullError: after the chunk in which a cache went bad.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk={chunk!r} is not accepted: give an integer >= 1")
    lengths = {x.shape[0] if jnp.ndim(x) else None for x in jax.tree.leaves(xs)}
    if len(lengths) != 1 or not (total := lengths.pop()):
        raise ValueError(
            f"xs has leading axes {[jnp.shape(x)[:1] for x in jax.tree.leaves(xs)]}; "
            "accepted: at least one array, all with the same number of blocks >= 1"
        )
    step = step if isinstance(step, Partial) else Partial(step)
    state = _settled(state)
    leaves, tree = jax.tree.flatten(xs)
    leaves = [_host_rows(x) for x in leaves]
    chunks, run = [], _first_chunk
    for begin in range(0, total, chunk):
        count = min(chunk, total - begin)
        # Rows past the end repeat the last block; their steps are skipped.
        rows = np.minimum(np.arange(begin, begin + chunk), total - 1)
        x = jax.tree.unflatten(tree, [take(rows) for take in leaves])
        state, ys = run(step, state, x, np.int32(count))
        run = run_chunk
        chunks.append(jax.tree.map(lambda y, count=count: y[:count], jax.device_get(ys)))
        raise_if_bad(state)
        if progress is not None:
            progress(begin + count, total, state)
    return state, jax.tree.map(lambda *ys: np.concatenate(ys), *chunks)


def _settled(state: Any) -> Any:
    """Arrays of definite dtype: a Python number's weak type would change after one step."""

    def settle(x: Any) -> Any:
        if isinstance(x, jax.Array) and not getattr(x, "weak_type", False):  # keys have none
            return x
        return lax.convert_element_type(x, jnp.result_type(x))

    return jax.tree.map(settle, state)


def _host_rows(x: Any) -> Callable[[np.ndarray], Any]:
    """Picks rows on the host: slicing on the device would compile for each length."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data, impl = np.asarray(jax.random.key_data(x)), jax.random.key_impl(x)
        return lambda rows: jax.random.wrap_key_data(data[rows], impl=impl)
    x = np.asarray(x)
    return lambda rows: x[rows]


class Stream(Iterator):
    """Blocks one by one, and between them `state`, which the next block consumes."""

    def __init__(
        self,
        step: Step,
        state: Any,
        xs: Iterable,
        progress: Progress | None,
        before: Before | None = None,
    ):
        self.state = _settled(state)
        self.blocks_done = 0
        self._step = step if isinstance(step, Partial) else Partial(step)
        self._xs = iter(xs)
        self._total = len(xs) if hasattr(xs, "__len__") else None
        self._progress = progress
        self._before = before
        self._run = _first_chunk

    def warm(self, x: Any) -> None:
        """Compiles the step for blocks like `x` and runs it on none, so that the next one is fast."""
        x = jax.tree.map(lambda x: jnp.asarray(x)[None], x)
        self.state, _ = self._run(self._step, self.state, x, np.int32(0))
        self._run = run_chunk

    def __next__(self) -> Any:
        x = next(self._xs)
        if self._before is not None:
            self.state = self._before(self.state, x)
        x = jax.tree.map(lambda x: jnp.asarray(x)[None], x)
        self.state, ys = self._run(self._step, self.state, x, np.int32(1))
        self._run = run_chunk
        raise_if_bad(self.state)
        self.blocks_done += 1
        if self._progress is not None:
            self._progress(self.blocks_done, self._total, self.state)
        return jax.tree.map(lambda y: y[0], jax.device_get(ys))


def stream(
    step: Step,
    state: Any,
    xs: Iterable,
    *,
    progress: Progress | None = None,
    before: Before | None = None,
) -> Stream:
    """The same loop, one block at a time, for whoever wants to see or steer each block.

        blocks = stream(step, state, actions())
        for y in blocks: ...
        state = blocks.state

    Args:
        step: as for `rollout`.
        state: as for `rollout`; donated by the first block.
        xs: an iterable of single blocks (no leading axis); it is asked for a block only when that
            block is wanted, so it may depend on the blocks before.
        progress: called after each block as `progress(blocks_done, blocks, state)`; `blocks` is
            None if `xs` has no length.
        before: called on the host before each block as `before(state, x) -> state`, for what a program
            on the device cannot do, such as bringing spans back from host memory (`recall`).

    Returns:
        An iterator of y, as numpy arrays on the host. Its `state` is the state after the last
        block that was yielded; the next block consumes it.

    Raises:
        NonFiniteError, CacheFullError: in place of the block in which a cache went bad.
    """
    return Stream(step, state, xs, progress, before)
