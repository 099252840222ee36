"""Kernels are found in a lowered program, and compiled in threads while it is."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from pallas_kernels.gpu import beside
from pallas_kernels.kmeans import kmeans_sums
from qvg_jax import loop
from tests.support.kernel_cases import clustered


@pytest.fixture(scope="module")
def program():
    """Two kernels, one of them called twice, inside of a loop."""
    x, c = clustered(1, 64, 8)

    def step(i, c):
        for scores in (True, False, False):
            c = c + kmeans_sums(x, c, scores=scores).total_RKD
        return c

    looped = jax.jit(lambda c: jax.lax.fori_loop(0, 2, step, c.astype(jnp.float32)))
    return looped.trace(c).lower(lowering_platforms=("cuda",))


@pytest.fixture
def compiled(monkeypatch):
    """Hashes of the kernels that would be compiled, in a process that has compiled none."""
    seen: list[bytes] = []

    class Program:
        def __init__(self, told):
            self.told = told

        def lower(self):
            return self

        def compile(self):
            seen.append(self.told["kernel_hash"])
            if len(seen) == 1:
                raise RuntimeError("the first one fails")

    monkeypatch.setattr(beside, "_alone", Program)
    monkeypatch.setattr(beside, "_compiled", set())
    return seen


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 5 s")


def test_a_program_tells_its_kernels(program):
    kernels = beside.kernels_of(program)
    assert len(kernels) == 2 and all(
        told["kernel_hash"] == key and len(told["module"]) > 1000 for key, told in kernels.items()
    )
    told = next(iter(kernels.values()))
    alone = beside._alone(told).trace().lower(lowering_platforms=("cuda",))
    assert beside.kernels_of(alone) == {told["kernel_hash"]: told}
    assert beside.kernels_of(jax.jit(jnp.sin).lower(1.0)) == {}


def test_kernels_compile_once_while_the_body_runs(program, compiled):
    kernels = beside.kernels_of(program)
    with beside.compiled_beside(program, wait=0):
        until(lambda: len(compiled) == 2)
    assert set(compiled) == set(kernels)
    with beside.compiled_beside(program, wait=0):  # the one that failed
        until(lambda: len(compiled) == 3)
    with beside.compiled_beside(program, wait=0):
        time.sleep(0.05)
    assert len(compiled) == 3 and compiled[2] == compiled[0]


def test_a_body_that_is_done_at_once_compiles_nothing(program, compiled):
    with beside.compiled_beside(program, wait=5):
        pass
    time.sleep(0.05)
    assert compiled == []
    with pytest.raises(ZeroDivisionError), beside.compiled_beside(program, wait=5):
        raise ZeroDivisionError


def test_the_loop_lowers_its_step_once(monkeypatch):
    """And the blocks are those of a device without kernels."""
    events = []

    def lowered(event, duration, **more):
        if event.endswith("jaxpr_to_mlir_module_duration"):
            events.append(more["fun_name"])

    step = Partial(lambda scale, state, x: (state + scale * x, state * x), 2.0)
    xs = np.arange(5.0, dtype=np.float32)
    want = loop.rollout(step, jnp.float32(1), xs, chunk=2)
    monkeypatch.setattr(loop, "no_hopper", lambda: None)
    jax.monitoring.register_event_duration_secs_listener(lowered)
    try:
        ours = loop.rollout(step, jnp.float32(1), xs, chunk=3)
        blocks = loop.stream(step, jnp.float32(1), xs)
        blocks.warm(xs[0])
        ys = np.stack(list(blocks))
    finally:
        jax.monitoring.unregister_event_duration_listener(lowered)
    jax.tree.map(np.testing.assert_array_equal, ours, want)
    np.testing.assert_array_equal(ys, want[1])
    assert sum("run_chunk" in name for name in events) == 2  # of 3 blocks, and of one
