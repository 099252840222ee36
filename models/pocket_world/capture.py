"""K, V and Q of pocket world after a tour, for `qvg capture`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from models.pocket_world import camera, pipeline
from models.pocket_world.evaluate import tours
from models.pocket_world.modeling import PocketWorld, to_tokens
from models.pocket_world.pipeline import WorldState
from models.pocket_world.sampling import Sampler
from qvg_jax.attention.api import attend
from qvg_jax.cache.operations import KVCache
from qvg_jax.errors import UserError
from qvg_jax.loop import rollout
from qvg_jax.study.capture import Captured, Recorder

QUERY_NOISE = 0.8  # noise level of the block that asks: a middle step of the sampler


class Asking(NamedTuple):
    """A block that asks, half-way through denoising: its history, and what the network is given."""

    cache: KVCache  # a window with all of the history
    positions: Array
    features: Array
    tokens: Array  # noisy


def asked(
    model: PocketWorld,
    frames: int,
    *,
    seed: int,
    half_width: float = 240.0,
    noise: float = QUERY_NOISE,
    back: bool = False,
) -> Asking:
    """Walks `frames` frames through a world and prepares the block after them; arguments as of `capture`.

    Raises:
        UserError: frames that are no whole blocks.
    """
    cfg, n = model.cfg, model.cfg.block_frames
    if frames < n or frames % n:
        raise UserError(f"frames={frames}; accepted: a multiple of block_frames={n}")
    path = tours(jax.random.key(seed), 1, frames + n, half_width)
    if back:
        middle = frames // (2 * n) * n
        path = path.at[:, frames:].set(path[:, middle : middle + n])
    xs = pipeline.block_inputs(cfg, jnp.array([seed]), path, frames + n)
    past, ahead = (jax.tree.map(lambda x, s=s: x[s], xs) for s in (slice(-1), -1))
    state = WorldState(pipeline.make_window(cfg, frames), jax.random.key(seed))
    state, _ = rollout(pipeline.make_step(model, Sampler(steps=1)), state, past)
    features = jax.vmap(camera.frame_features, (0, 0, None))(ahead.pose, ahead.before, ahead.time)
    positions = jax.vmap(camera.token_positions, (0, None, None))(ahead.pose, ahead.time, cfg.patch)
    clean = to_tokens(ahead.frames, cfg.patch)
    normal = jax.random.normal(jax.random.key(seed), clean.shape)
    return Asking(state.cache, positions, features, (1 - noise) * clean + noise * normal)


def capture(
    model: PocketWorld,
    layers: tuple[int, ...],
    frames: int,
    *,
    seed: int,
    half_width: float = 240.0,
    noise: float = QUERY_NOISE,
    back: bool = False,
) -> Captured:
    """Walks `frames` frames through a world, then asks for the next block half-way through denoising.

    Args:
        layers: which layers to keep.
        frames: history; a multiple of the block.
        seed: world, tour and noise.
        noise: level of the block that asks.
        back: whether that block is one from the middle of the tour again, and not the next of the walk.

    Raises:
        UserError: a layer that the model does not have, or frames that are no whole blocks.
    """
    cfg = model.cfg
    if not layers or not all(0 <= i < cfg.layers for i in layers):
        raise UserError(f"layers={layers}; accepted: some of 0 to {cfg.layers - 1}")
    asking = asked(model, frames, seed=seed, half_width=half_width, noise=noise, back=back)
    cache, positions, recorder = asking.cache, asking.positions, Recorder()
    view = cache.view(positions, cfg.rope())
    listening = recorder.listening(lambda i, q, k, v: attend(q, view, k, v, layer=i))
    graph, params = nnx.split(model)

    @jax.jit
    def ask(params, tokens):
        level = jnp.full((1, cfg.block_frames), noise)
        return nnx.merge(graph, params)(
            tokens, level, asking.features, listening, jnp.arange(cfg.layers)
        )

    jax.block_until_ready(ask(params, asking.tokens))
    blocks = recorder.blocks()
    rope, which = cfg.rope(), np.array(layers)
    f32 = np.float32

    def of_block(part: int) -> np.ndarray:
        return np.stack([blocks[i][part].astype(f32).swapaxes(1, 2) for i in layers])

    return Captured(
        k_LBHTD=np.asarray(cache.dense_k.astype(jnp.float32))[which],
        v_LBHTD=np.asarray(cache.dense_v.astype(jnp.float32))[which],
        q_LBHQD=of_block(0),
        turn_k=np.stack(rope.table(cache.dense_pos)),
        turn_q=np.stack(rope.table(positions)),
        layers=which,
        own_k_LBHQD=of_block(1),
        own_v_LBHQD=of_block(2),
    )
