"""Soaks: a cache of 100,000 blocks and a walk of 2,000 frames; memory flat, positions right at the end.

pytest -m nightly -n 0 -s tests/reliability/test_soak.py
"""

import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.pocket_world import walk as pocket_walk
from models.pocket_world.entry import WalkOptions
from qvg_jax.app.play.walk import Walk
from qvg_jax.attention.api import attend
from qvg_jax.cache.health import raise_if_bad
from qvg_jax.cache.operations import KVCache, append, compress, evict
from qvg_jax.codecs import presets
from tests.support.tiny_world import as_in_its_own_process, random_weights

pytestmark = pytest.mark.nightly

BLOCKS, EVERY = 100_000, 10_000
TOKENS, HEADS, DIM, LAYERS = 4, 2, 8, 2
WALK_FRAMES, SWITCH_EVERY = 2_000, 100
CODECS = ("midrise-k1v3", "bf16", "rtn", "trellis-tiny", "qvg")


def resident():
    """MiB of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def place(number):
    """Positions of a block's tokens: its number, and the token's own; exact in float32."""
    return np.stack([np.full(TOKENS, number), np.arange(TOKENS)], -1)[None].astype(np.float32)


def values(number):
    """K and V of a block: its number modulo 16, with a token's own digit."""
    x = (number % 16) + np.arange(TOKENS)[None, None, :, None, None] / 8
    return np.broadcast_to(x, (LAYERS, 1, TOKENS, HEADS, DIM)).astype(np.float32)


def make(overflow):
    codec = presets.parse("residual_quantize(bits=4, group=8)")
    return KVCache.create(
        layers=LAYERS, heads=HEADS, head_dim=DIM, block_tokens=TOKENS, sink_blocks=1,
        span_blocks=3, max_spans=4, keep_recent=2, pos_dims=2, key_codec=codec, value_codec=codec,
        overflow=overflow,
    )  # fmt: skip


def stored_positions(cache):
    """Numbers of the blocks in the cache, oldest first: sink, spans, window."""
    lay = cache.layout
    dense = np.asarray(cache.dense_pos)[0].reshape(-1, TOKENS, 2)[: int(cache.dense_blocks)]
    slots = (int(cache.first_span) + np.arange(int(cache.num_spans))) % lay.max_spans
    spans = np.asarray(cache.span_pos)[slots, 0].reshape(-1, TOKENS, 2)
    whole = np.concatenate([dense[: lay.sink_blocks], spans, dense[lay.sink_blocks :]])
    assert (whole[..., 1] == np.arange(TOKENS)).all()
    assert (whole[..., 0] == whole[:, :1, 0]).all()
    return whole[:, 0, 0].astype(int)


@pytest.mark.parametrize("overflow", ["drop", "error"])
def test_a_hundred_thousand_blocks(overflow):
    programs = []

    @jax.jit
    def step(cache, kv, pos):
        programs.append("traced")
        out = attend(kv[1], cache, kv[1], kv[1], layer=1)
        cache = compress(append(cache, kv, kv, pos))
        if overflow == "error":  # a bounded context by hand: room for the next span
            full = cache.num_spans == cache.layout.max_spans
            cache = evict(cache, full.astype(jnp.int32))
        return cache, out

    cache, sizes = make(overflow), []
    for number in range(BLOCKS):
        cache, out = step(cache, values(number), place(number))
        if number % EVERY == EVERY - 1:
            raise_if_bad(cache)
            sizes.append(resident())
            numbers = stored_positions(cache)
            kept = cache.tokens // TOKENS
            assert numbers[0] == 0 and len(numbers) == kept  # the sink is the first block
            np.testing.assert_array_equal(numbers[1:], np.arange(number - kept + 2, number + 1))
            assert np.isfinite(np.asarray(out)).all()
            assert int(cache.seen_blocks) == number + 1
            assert int(cache.dropped_blocks) == number + 1 - kept
    print(f"{overflow}: MiB every {EVERY} blocks: {[round(size) for size in sizes]}")
    assert programs == ["traced"] and step._cache_size() == 1
    assert sizes[-1] - sizes[1] < 4


def test_a_walk_of_two_thousand_frames_with_a_switch_every_hundred(tmp_path):
    with as_in_its_own_process(tmp_path):
        options = WalkOptions(weights=str(random_weights(tmp_path)), tour=48, memory=64)
        walk, sizes = Walk(pocket_walk.walk(options), seed=3, codec=CODECS[0]), []
        for _ in walk.tour():
            pass
        frames, n = 48, walk.world.block_frames
        while frames < WALK_FRAMES:
            if frames % SWITCH_EVERY < n and frames > 48:
                number = frames // SWITCH_EVERY
                walk.switch(CODECS[number % len(CODECS)])
                sizes.append(resident())
            seen = walk.step("wdsa"[frames // 12 % 4])
            frames += n
            meter = seen.meter
            assert meter.frames + meter.forgotten == frames and meter.frames <= meter.capacity
            assert seen.number == frames // n - 1 and np.isfinite(seen.place).all()
        print(f"MiB at every switch: {[round(size) for size in sizes]}")
        assert walk.broken is None and len(sizes) == WALK_FRAMES // SWITCH_EVERY - 1
        # Once every codec has been there, its programs are, too.
        assert sizes[-1] - sizes[2 * len(CODECS)] < 16
