"""Training sequences: remembered blocks, then runs that continue the walk or return to old places.

A sequence is what the cache would hold, thinned: blocks near one or two old places, blocks from anywhere,
the newest blocks, and then two *runs* of consecutive blocks, which are the targets. A run either retraces an
old place (same poses, at times shifted or reversed, at a later time) or walks on.
"""

import dataclasses

import jax
import jax.numpy as jnp

from models.pocket_world import camera, world
from models.pocket_world.config import PocketWorldConfig


@dataclasses.dataclass(frozen=True)
class SequenceShape:
    """How many blocks of each kind a training sequence holds, and how long the walk behind it is."""

    near: int = 4  # around each of the two old places
    distractors: int = 4
    recent: int = 4
    run: int = 4  # blocks in each of the two runs
    walk_frames: int = 1024

    @property
    def memory(self) -> int:
        return 2 * self.near + self.distractors + self.recent

    @property
    def blocks(self) -> int:
        return self.memory + 2 * self.run


def sample_sequence(key, cfg: PocketWorldConfig, shape: SequenceShape):
    """One sequence: (frames [F, 64, 96, 3] in [-1, 1], features [F, E], positions [T, 4])."""
    n, walk_blocks = cfg.block_frames, shape.walk_frames // cfg.block_frames
    keys = iter(jax.random.split(key, 16))
    half_width = jax.random.uniform(next(keys), (), minval=100.0, maxval=600.0)
    altitude = (
        jax.random.randint(next(keys), (), -2, camera.MAX_ALTITUDE + 1).clip(0).astype(jnp.float32)
    )
    start = jnp.stack([jnp.float32(0), jnp.float32(0), altitude])
    walk = camera.wander(next(keys), start, shape.walk_frames, half_width)
    before = jnp.concatenate([walk[:1], walk[:-1]])
    oldest = shape.near + shape.recent + 4
    now = jax.random.randint(next(keys), (), oldest + shape.recent, walk_blocks + 1)  # in blocks

    past = now - shape.recent - shape.near
    places = jax.random.randint(next(keys), (2,), 0, past)
    near = (places[:, None] + jnp.arange(shape.near)[None]).reshape(-1)
    distractors = jax.random.randint(next(keys), (shape.distractors,), 0, now - shape.recent)
    recent = now - 1 - jnp.arange(shape.recent)
    memory = jnp.sort(jnp.concatenate([near, distractors, recent]))
    t_memory = (memory[:, None] * n + jnp.arange(n)[None]).reshape(-1)
    pose_memory, before_memory = walk[t_memory], before[t_memory]

    def retrace(key, place):
        """Poses of the old place: as they were, or shifted on the lattice, or backwards."""
        k_shift, k_exact, k_back = jax.random.split(key, 3)
        poses = jax.lax.dynamic_slice_in_dim(walk, place * n, shape.run * n)
        shift = camera.SPEED * jax.random.randint(k_shift, (2,), -4, 5)
        shift = jnp.where(jax.random.bernoulli(k_exact, 0.5), 0.0, shift)
        poses = poses + jnp.concatenate([shift, jnp.zeros(1)])[None]
        return jnp.where(jax.random.bernoulli(k_back, 0.4), poses[::-1], poses)

    def run(key, last, place, p_retrace):
        k_kind, k_retrace, k_walk = jax.random.split(key, 3)
        onward = camera.wander(k_walk, last, shape.run * n, half_width)
        return jnp.where(jax.random.bernoulli(k_kind, p_retrace), retrace(k_retrace, place), onward)

    last = walk[now * n - 1]
    run1 = run(next(keys), last, places[0], 0.65)
    run2 = run(next(keys), run1[-1], places[1], 0.4)
    runs = jnp.concatenate([run1, run2])
    t_runs = now * n + jnp.arange(2 * shape.run * n)
    before_runs = jnp.concatenate([last[None], runs[:-1]])

    poses, times = jnp.concatenate([pose_memory, runs]), jnp.concatenate([t_memory, t_runs])
    seed = jax.random.randint(next(keys), (), 0, 2**30)
    frames = world.render(seed, poses, times)
    features = camera.frame_features(poses, jnp.concatenate([before_memory, before_runs]), times)
    return frames, features, camera.token_positions(poses, times, cfg.patch)
