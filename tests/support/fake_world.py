"""A world whose model is one line, and its page in a process of its own, for tests of the server."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qvg_jax.app.play.walk import World
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.codecs import presets

REPO = Path(__file__).resolve().parents[2]
ACTIONS = ("w", "a", "s", "d")
TOKENS, HEADS, DIM, FRAMES, HEIGHT, WIDTH = 16, 2, 64, 4, 16, 24


def step(cache, x):
    """The block's frames are the action's shade; K and V are its number."""
    kv = jnp.full((1, TOKENS, HEADS, DIM), x[0], jnp.bfloat16)
    cache = compress(append(cache, kv, kv, jnp.full((1, TOKENS, 1), x[0])))
    return cache, jnp.full((1, FRAMES, HEIGHT, WIDTH, 3), x[1] / 2 - 1)


def fake_world(tour_blocks=2):
    """The world; its blocks take no time but that of the compiler."""

    def begin(seed, codecs):
        return KVCache.create(
            heads=HEADS, head_dim=DIM, block_tokens=TOKENS, sink_blocks=1, span_blocks=2,
            max_spans=4, keep_recent=1, pos_dims=1, key_codec=codecs[0], value_codec=codecs[1],
            overflow="drop",
        )  # fmt: skip

    def inputs(seed, actions):
        for i in range(tour_blocks):
            yield np.float32([i, 0])
        for i, action in enumerate(actions, tour_blocks):
            yield np.float32([i, ACTIONS.index(action)])

    return World(
        model="fake",
        step=step,
        actions=ACTIONS,
        keys=dict(zip(ACTIONS, ACTIONS, strict=True)),
        begin=begin,
        inputs=inputs,
        codec=presets.pair,
        cache=lambda state: state,
        with_cache=lambda state, cache: cache,
        tour_blocks=tour_blocks,
        block_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        fps=30,
        place=lambda x: (float(x[0]), float(x[1])),
    )


@contextlib.contextmanager
def fake_page(folder, host="127.0.0.1"):
    """The page of the fake world in a process of its own; yields (address, process)."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= dict(PYTHONPATH=str(REPO), TMPDIR=str(folder), PYTHONUNBUFFERED="1")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fake_world", host],
        cwd=REPO, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address, line + process.stdout.read()
        assert "ready after" in process.stdout.readline()
        yield address[0], process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    from qvg_jax.app.play import server
    from qvg_jax.app.play.walk import Walk

    sock = server.listen(sys.argv[1], 0)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve(Walk(fake_world()), sock, host=sys.argv[1], show=False)
