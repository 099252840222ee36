"""Memory of compiled programs: caches are updated in place, and history is decoded span by span."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from qvg_jax.attention.api import attend
from qvg_jax.cache.operations import KVCache, append, compress, evict
from qvg_jax.cache.rope import axial_rope, frequency_ladder
from qvg_jax.codecs import presets
from qvg_jax.codecs.base import identity
from qvg_jax.rollout import run_chunk
from tests.support.cache_model import coarse

# Aliases are the same on every JAX. Compilers for CPUs before 0.11 convert more of the history at once.
lean = pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11),
    reason="XLA for CPUs keeps more temporaries before jax 0.11",
)

COARSE, IDENTITY = coarse(), identity()
ROPE = axial_rope([frequency_ladder(128)])
LAYERS, HEADS, HEAD_DIM, TOKENS = 4, 2, 128, 32
SPAN_BLOCKS = 16
DECODED_SPAN = 2 * HEADS * SPAN_BLOCKS * TOKENS * HEAD_DIM * 4  # K and V of a layer in float32


def make(max_spans, codec=COARSE, **sizes):
    defaults = dict(span_blocks=SPAN_BLOCKS, keep_recent=2, sink_blocks=1, pos_dims=1)
    return KVCache.create(
        layers=LAYERS,
        heads=HEADS,
        head_dim=HEAD_DIM,
        block_tokens=TOKENS,
        max_spans=max_spans,
        key_codec=codec,
        value_codec=codec,
        **(defaults | sizes),
    )


def memory(f, *args, **jit):
    return jax.jit(f, **jit).lower(*args).compile().memory_analysis()


def nbytes(tree):
    return sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(tree))


def new_block(layers=None):
    shape = (1, TOKENS, HEADS, HEAD_DIM)
    x = jnp.ones(shape if layers is None else (layers, *shape), jnp.float32)
    return x, x, jnp.zeros((1, TOKENS, 1), jnp.float32)


def forward(cache, k, v, pos, precompute=False):
    view = cache.view(pos, ROPE, precompute=precompute)

    def layer(h, i):
        return h + attend(h, view, k, v, layer=i), (k, v)

    return lax.scan(layer, k, jnp.arange(LAYERS))


def full_step(cache, x):
    h, (k, v) = forward(cache, *x)
    return compress(append(cache, k, v, x[2])), h


@lean
@pytest.mark.parametrize("codec", [COARSE, IDENTITY], ids=["lossy", "bf16"])
def test_attention_over_a_long_history_holds_one_span_decoded(codec):
    short, long = (
        memory(forward, make(n, codec), *new_block()).temp_size_in_bytes for n in (4, 16)
    )
    assert long == short
    # K as decoded, K rotated, V, and logits twice; the history of a layer would be 16 spans.
    assert DECODED_SPAN < long < 2 * DECODED_SPAN


def test_tables_of_a_view_grow_with_the_slots_and_nothing_else_does():
    temps = [
        memory(lambda c, *x: forward(c, *x, precompute=True), make(n), *new_block())
        for n in (4, 16)
    ]
    table = SPAN_BLOCKS * TOKENS * HEAD_DIM * 4  # cos and sin, D / 2 channels each, float32
    grown = temps[1].temp_size_in_bytes - temps[0].temp_size_in_bytes
    assert abs(grown - 12 * table) < table


def test_updates_happen_in_place():
    cache = make(16)
    size = nbytes(cache)
    for f, args in (
        (append, new_block(LAYERS)),
        (compress, ()),
        (evict, ()),
        (lambda c, *x: compress(append(c, *x)), new_block(LAYERS)),
    ):
        m = memory(f, cache, *args, donate_argnums=0)
        assert m.alias_size_in_bytes == size
        assert m.output_size_in_bytes - size < 1024


@lean
def test_compression_holds_one_layers_span():
    """No second window, let alone a float32 one of all layers."""
    cache = make(16)
    window = nbytes((cache.dense_k, cache.dense_v))
    temp = memory(compress, cache, donate_argnums=0).temp_size_in_bytes
    assert temp < 1.5 * DECODED_SPAN < window


@lean
def test_a_whole_step_is_in_place_and_small():
    cache = make(16)
    m = memory(full_step, cache, new_block(), donate_argnums=0)
    assert m.alias_size_in_bytes == nbytes(cache)
    assert m.temp_size_in_bytes < 2.5 * DECODED_SPAN


@lean
def test_a_rollout_holds_the_cache_once():
    cache, xs = make(16), jax.tree.map(lambda x: jnp.stack([x] * 8), new_block())
    step = jax.tree_util.Partial(full_step)
    m = run_chunk.lower(step, cache, xs, jnp.int32(3)).compile().memory_analysis()
    assert m.alias_size_in_bytes == nbytes(cache)
    assert m.temp_size_in_bytes < 2.5 * DECODED_SPAN


@lean
def test_a_layer_of_real_size_reads_any_history_with_the_same_temporaries():
    """Self-Forcing: 12 heads, spans of 37,440 tokens, 4,680 queries. Compiled only; -s prints."""
    frame, rope = 4_680, axial_rope([frequency_ladder(128)])
    block = jax.ShapeDtypeStruct((1, frame, 12, 128), jnp.bfloat16)
    place = jax.ShapeDtypeStruct((1, frame, 1), jnp.float32)
    codec, temporaries = presets.get("qvg"), {}
    for spans in (3, 6):
        cache = jax.eval_shape(
            lambda spans=spans: KVCache.create(
                heads=12, head_dim=128, block_tokens=frame, span_blocks=8, max_spans=spans,
                keep_recent=1, pos_dims=1, key_codec=codec, value_codec=codec,
            )
        )  # fmt: skip
        program = jax.jit(functools.partial(attend, rope=rope))
        compiled = program.lower(block, cache, block, block, positions=place).compile()
        temporaries[spans] = compiled.memory_analysis().temp_size_in_bytes
        print(f"{spans} spans: {temporaries[spans] / 2**20:.0f} MiB of temporaries")
    assert temporaries[3] == temporaries[6]
