"""One pass of Self-Forcing's transformer over a block: attention to the cache, and to plain K and V."""

import dataclasses
import logging
import statistics
import time
from typing import Any

from benchmarks.common import seconds

log = logging.getLogger("benchmark")


def forward(setup: Any, result: dict[str, Any]) -> None:
    """Milliseconds of one pass with 6/7 of its keys in the cache, by kind of attention.

    Args:
        setup: networks and pipelines of `benchmarks.self_forcing`.
        result: where the numbers go, one by one.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks.noise import filled
    from models.common.attention import fused_attention
    from models.self_forcing.block import cached_forward
    from models.self_forcing.history import block_positions
    from models.self_forcing.rope import model_rope

    pipeline, request = setup.pipeline("bf16", 21)
    state = pipeline.start(request)
    dit = setup.sizes.dit
    shape = (1, 3, dit.latent_channels, request.latent_height, request.latent_width)
    x = jax.random.normal(jax.random.key(0), shape, dit.dtype)
    t = jnp.full((1, 1), 500.0)
    queries = 3 * state.cache.layout.block_tokens

    @jax.jit
    def attended(model, state, x):
        positions = block_positions(dit, state.cache, x.shape)
        view = state.cache.view(positions, model_rope(dit))
        return cached_forward(model, x, t, state.text_kv, view).flow_BFZYX

    @jax.jit
    def plain(model, text_kv, x, k, v):
        def attention(q, k_new, v_new, layer):
            keys = jnp.concatenate([k, k_new], 1)
            return fused_attention(q, keys, jnp.concatenate([v, v_new], 1))

        return model(x, t, text_kv, attention).flow_BFZYX

    state = dataclasses.replace(state, cache=filled(state.cache, 18))
    k = jax.random.normal(jax.random.key(1), (1, 6 * queries, dit.heads, dit.head_dim), dit.dtype)
    result["queries"], result["keys"] = queries, 7 * queries
    runs = {
        "attend": lambda: attended(setup.model, state, x),
        "dot_product_attention": lambda: plain(setup.model, state.text_kv, x, k, k),
    }
    for name, run in runs.items():
        begin = time.perf_counter()
        jax.block_until_ready(run())
        first = time.perf_counter() - begin
        times = [seconds(run) for _ in range(max(3, setup.args.repeats))]
        result[name] = {
            "first_call_seconds": round(first, 2),
            "milliseconds": round(1e3 * statistics.median(times), 2),
        }
        log.info("%s: %s", name, result[name])
