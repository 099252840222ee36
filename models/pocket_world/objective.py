"""What pocket world is trained on: flow matching with x-prediction over remembered and noisy blocks.

noisy = (1 - s) * clean + s * normal, loss = weight(s) * |model - clean|^2. One sequence is
[clean blocks | noisy copies of the last blocks]; a clean block sees itself and earlier clean blocks, a noisy
block sees earlier clean blocks and itself, as in generation. Clean blocks carry a little noise of their own
(told to the model), and in a share of the steps the newest of them are not the world's but the model's own
frames: what it invents is blander than the world, and a model that has only ever remembered the world
lets a long walk fade, each block a little blander than those it continues.
"""

import dataclasses

import jax
import jax.numpy as jnp

from models.pocket_world.data import SequenceShape
from models.pocket_world.modeling import to_tokens
from models.pocket_world.sampling import OWN_FRAME_NOISE, second_order_step, shifted

OWN_STEPS = 2  # evaluations of a block in `own_context`


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        until: share of the whole run at which it ends.
        batch: sequences in a step.
        shape: of the sequences.
        forget: share of steps in which a random number of the oldest blocks is out of sight, so that
            histories of every length occur.
        own_share: share of steps with the model's own frames in the context.
        own_newest: how many blocks of a sequence those may be, of all by default.
        own_passes: how often they are made from one another, see `own_context`.
    """

    until: float
    batch: int
    shape: SequenceShape
    forget: float = 0.0
    own_share: float = 0.0
    own_newest: int | None = None
    own_passes: int = 1


def sequence_mask(blocks: int, first: int, block_tokens: int, oldest=0):
    """Who sees whom, [1, 1, T, T] bool, for [clean blocks 0 .. | noisy copies of blocks first ..].

    Blocks before `oldest` are seen by nobody but themselves.
    """
    clean, noisy = jnp.arange(blocks), jnp.arange(first, blocks)
    order, is_noisy = jnp.r_[clean, noisy], jnp.r_[jnp.zeros_like(clean), jnp.ones_like(noisy)] == 1
    order, is_noisy = jnp.repeat(order, block_tokens), jnp.repeat(is_noisy, block_tokens)
    q, k = order[:, None], order[None, :]
    same = (q == k) & (is_noisy[:, None] == is_noisy[None, :])
    return (same | ((q > k) & (k >= oldest) & ~is_noisy[None, :]))[None, None]


def _per_token(cfg, level):
    return jnp.repeat(level, cfg.block_tokens, axis=1)[..., None]


def add_noise(key, tokens, level):
    """(1 - level) tokens + level normal, a level for every token or [B, T, 1]."""
    return (1 - level) * tokens + level * jax.random.normal(key, tokens.shape)


def denoise(model, noisy, batch, context, context_level, level, *, oldest=0, attention=None):
    """Predicts the last blocks from noisy copies of them and the clean blocks before each.

    Args:
        noisy: tokens [B, n * block_tokens, C] of the last n blocks.
        batch: (frames, features, positions) of `data.sample_sequence` with a leading batch axis.
        context: tokens [B, T, C] to stand in the clean blocks' places, their noise included.
        context_level: noise levels [B, blocks] told with them.
        level: noise levels [B, n] of `noisy`.
        oldest: the first clean block that is in sight.
        attention: `jax.nn.dot_product_attention` implementation; None lets XLA do it.

    Returns:
        The predicted tokens of the last n blocks, [B, n * block_tokens, C].
    """
    cfg, (_, features, positions) = model.cfg, batch
    blocks, last = context_level.shape[1], level.shape[1]
    n_frames, n_tokens = last * cfg.block_frames, last * cfg.block_tokens
    features = jnp.concatenate([features, features[:, -n_frames:]], 1)
    positions = jnp.concatenate([positions, positions[:, -n_tokens:]], 1)
    levels = jnp.repeat(jnp.concatenate([context_level, level], 1), cfg.block_frames, axis=1)
    mask = sequence_mask(blocks, blocks - last, cfg.block_tokens, oldest)
    rope = cfg.rope()
    table = rope.table(positions)

    def attend(_, q, k, v):
        q, k = (rope.rotate(x.swapaxes(1, 2), table).swapaxes(1, 2) for x in (q, k))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=attention)

    out, _ = model(jnp.concatenate([context, noisy], 1), levels, features, attend)
    return out[:, -n_tokens:]


def own_context(model, key, batch, stage: Stage, *, oldest=0, attention=None):
    """Replaces each sequence's newest blocks, from a random one on, by what the model makes of them.

    The blocks are taken part of the way to noise and brought back in `OWN_STEPS` of the sampler's steps, so they
    stay what the world shows there, but for what the noise has hidden. All blocks are made at once,
    each from the blocks before it: the world's in the first pass, in every further one those of the
    pass before, so that errors of errors of errors are in the context as in a long walk.

    Returns:
        Tokens [B, T, C] and which blocks are the model's own, [B, blocks].
    """
    cfg, blocks = model.cfg, stage.shape.blocks
    newest = blocks if stage.own_newest is None else stage.own_newest
    tokens = to_tokens(batch[0], cfg.patch)
    b, old = tokens.shape[0], blocks - newest
    n_old = old * cfg.block_tokens
    k_first, k_passes = jax.random.split(key)
    own = jnp.arange(blocks)[None] >= jax.random.randint(k_first, (b, 1), old, blocks)
    told = jnp.where(own, OWN_FRAME_NOISE, 0.0)

    def one(context, i):
        k_start, k_noise = jax.random.split(jax.random.fold_in(k_passes, i))
        start = jax.random.uniform(k_start, (b, newest), minval=0.05, maxval=0.85)
        levels = [shifted(start * (1 - j / OWN_STEPS)) for j in range(OWN_STEPS + 1)]
        x = add_noise(k_noise, tokens[:, n_old:], _per_token(cfg, levels[0]))
        level = jnp.where(i > 0, told, 0.0)
        last = slope = 0.0
        for j, (now, then) in enumerate(zip(levels, levels[1:], strict=False)):
            clean = denoise(
                model, x, batch, context, level, now, oldest=oldest, attention=attention
            )
            now, then = _per_token(cfg, now), _per_token(cfg, then)
            if 0 < j < OWN_STEPS - 1:  # as in the sampler, whose last step ends at the prediction
                slope = (last - clean) / (_per_token(cfg, levels[j - 1]) - now)
            x, last, slope = second_order_step(x, clean, slope, now, then), clean, 0.0
        made = jnp.concatenate([tokens[:, :n_old], jnp.clip(x, -1, 1)], 1)
        return jnp.where(_per_token(cfg, own), made, tokens), None

    out, _ = jax.lax.scan(one, tokens, jnp.arange(stage.own_passes))
    return jax.lax.stop_gradient(out), own


def loss_fn(model, key, batch, stage: Stage, attention=None):
    """Mean weighted squared error; the weight 1 / max(s, 0.3) leans towards fine detail.

    Args:
        key: randomness of noise levels and noise.
        batch: output of `data.sample_sequence` with a leading batch axis.
        stage: what the context is like.
    """
    cfg, shape = model.cfg, stage.shape
    b = batch[0].shape[0]
    k_level, k_clean, k_augment, k_one, k_eps, k_none, k_own, k_which, k_old = jax.random.split(
        key, 9
    )
    tokens = to_tokens(batch[0], cfg.patch)
    target = tokens[:, shape.memory * cfg.block_tokens :]
    level = jax.nn.sigmoid(0.4 + 1.2 * jax.random.normal(k_level, (b, 2 * shape.run)))
    level = jnp.where(jax.random.bernoulli(k_one, 0.15, level.shape), 1.0, level)
    augment = 0.25 * jax.random.uniform(k_augment, (b, shape.blocks)) ** 2
    augment = jnp.where(jax.random.bernoulli(k_none, 0.4, (b, 1)), 0.0, augment)
    noisy = tokens + _per_token(cfg, augment) * jax.random.normal(k_clean, tokens.shape)
    k_whether, k_oldest = jax.random.split(k_old)
    oldest = jax.random.randint(k_oldest, (), 0, shape.memory - shape.recent + 1)
    oldest = jnp.where(jax.random.bernoulli(k_whether, stage.forget), oldest, 0)
    see = dict(oldest=oldest, attention=attention)

    def with_own():
        out, own = own_context(model, k_own, batch, stage, **see)
        told = jnp.where(own, OWN_FRAME_NOISE, augment)
        return jnp.where(_per_token(cfg, own), out, noisy), told

    context, told = noisy, augment
    if stage.own_share > 0:
        use = jax.random.bernoulli(k_which, stage.own_share)
        context, told = jax.lax.cond(use, with_own, lambda: (noisy, augment))
    x = add_noise(k_eps, target, _per_token(cfg, level))
    out = denoise(model, x, batch, context, told, level, **see)
    weight = 1 / jnp.maximum(_per_token(cfg, level), 0.3)
    return jnp.mean(weight * (out - target) ** 2)


def one_step_psnr(model, batch, shape: SequenceShape, attention=None):
    """PSNR (dB) of the run blocks predicted from pure noise in one step, the memory exact."""
    tokens = to_tokens(batch[0], model.cfg.patch)
    exact = jnp.zeros((tokens.shape[0], shape.blocks))
    level = jnp.ones((tokens.shape[0], 2 * shape.run))
    target = tokens[:, shape.memory * model.cfg.block_tokens :]
    noise = jax.random.normal(jax.random.key(5), target.shape)
    out = denoise(model, noise, batch, tokens, exact, level, attention=attention)
    return jnp.mean(-10 * jnp.log10(jnp.mean((jnp.clip(out, -1, 1) - target) ** 2, (1, 2)) / 4))
