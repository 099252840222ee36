"""What pocket world is trained on: flow matching with x-prediction over remembered and noisy blocks.

noisy = (1 - s) * clean + s * normal, loss = weight(s) * |model - clean|^2. One sequence is
[clean blocks | noisy copies of the last blocks]; a clean block sees itself and earlier clean blocks, a noisy
block sees earlier clean blocks and itself, as in generation. Clean blocks carry a little noise of their own
(told to the model), and in a share of the steps the newest of them are not the world's but the model's own
predictions: what it invents is blander than the world, and a model that has only ever remembered the world
lets a long walk fade, each block a little blander than those it continues.
"""

import jax
import jax.numpy as jnp

from models.pocket_world.data import SequenceShape
from models.pocket_world.modeling import to_tokens
from models.pocket_world.sampling import OWN_FRAME_NOISE


def sequence_mask(blocks: int, first: int, block_tokens: int):
    """Who sees whom, [1, 1, T, T] bool, for [clean blocks 0 .. | noisy copies of blocks first ..]."""
    clean, noisy = jnp.arange(blocks), jnp.arange(first, blocks)
    order, is_noisy = jnp.r_[clean, noisy], jnp.r_[jnp.zeros_like(clean), jnp.ones_like(noisy)] == 1
    order, is_noisy = jnp.repeat(order, block_tokens), jnp.repeat(is_noisy, block_tokens)
    q, k = order[:, None], order[None, :]
    sees_clean = ~is_noisy[None, :] & jnp.where(is_noisy[:, None], q > k, q >= k)
    return (sees_clean | (is_noisy[:, None] & is_noisy[None, :] & (q == k)))[None, None]


def _per_token(cfg, level):
    return jnp.repeat(level, cfg.block_tokens, axis=1)[..., None]


def denoise(model, key, batch, context, context_level, level, *, attention=None):
    """Predicts the last blocks from noisy copies of them and the clean blocks before each.

    Args:
        batch: (frames, features, positions) of `data.sample_sequence` with a leading batch axis.
        context: tokens [B, T, C] to stand in the clean blocks' places, their noise included.
        context_level: noise levels [B, blocks] told with them.
        level: noise levels [B, n] of the last n blocks.
        attention: `jax.nn.dot_product_attention` implementation; None lets XLA do it.

    Returns:
        The predicted tokens of the last n blocks, [B, n * block_tokens, C].
    """
    cfg, (frames, features, positions) = model.cfg, batch
    blocks, last = context_level.shape[1], level.shape[1]
    n_frames, n_tokens = last * cfg.block_frames, last * cfg.block_tokens
    target, s = to_tokens(frames, cfg.patch)[:, -n_tokens:], _per_token(cfg, level)
    noisy = (1 - s) * target + s * jax.random.normal(key, target.shape)
    features = jnp.concatenate([features, features[:, -n_frames:]], 1)
    positions = jnp.concatenate([positions, positions[:, -n_tokens:]], 1)
    levels = jnp.repeat(jnp.concatenate([context_level, level], 1), cfg.block_frames, axis=1)
    mask = sequence_mask(blocks, blocks - last, cfg.block_tokens)
    rope = cfg.rope()
    table = rope.table(positions)

    def attend(_, q, k, v):
        q, k = (rope.rotate(x.swapaxes(1, 2), table).swapaxes(1, 2) for x in (q, k))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=attention)

    out, _ = model(jnp.concatenate([context, noisy], 1), levels, features, attend)
    return out[:, -n_tokens:]


def own_context(model, key, batch, blocks: int, *, attention=None):
    """Replaces each sequence's newest blocks, from a random one on, by the model's predictions of them.

    One evaluation from a random noise level between half and nearly all noise: between a blurred
    guess and a good rendering, as the few steps of a sampler would leave it.

    Returns:
        Tokens [B, T, C] and which blocks are the model's own, [B, blocks].
    """
    cfg, frames = model.cfg, batch[0]
    k_level, k_noise, k_first = jax.random.split(key, 3)
    tokens = to_tokens(frames, cfg.patch)
    b = tokens.shape[0]
    level = jax.random.uniform(k_level, (b, blocks), minval=0.4, maxval=0.97)
    exact = jnp.zeros((b, blocks))
    out = denoise(model, k_noise, batch, tokens, exact, level, attention=attention)
    first = jax.random.randint(k_first, (b, 1), 0, blocks)
    own = jnp.arange(blocks)[None] >= first
    out = jnp.where(_per_token(cfg, own), jnp.clip(out, -1, 1), tokens)
    return jax.lax.stop_gradient(out), own


def loss_fn(model, key, batch, shape: SequenceShape, own_share: float = 0.0, attention=None):
    """Mean weighted squared error; the weight 1 / max(s, 0.3) leans towards fine detail.

    Args:
        key: randomness of noise levels and noise.
        batch: output of `data.sample_sequence` with a leading batch axis.
        own_share: share of steps with the model's own frames in the context.
    """
    cfg = model.cfg
    b = batch[0].shape[0]
    k_level, k_clean, k_augment, k_one, k_eps, k_none, k_own, k_which = jax.random.split(key, 8)
    tokens = to_tokens(batch[0], cfg.patch)
    target = tokens[:, shape.memory * cfg.block_tokens :]
    level = jax.nn.sigmoid(0.4 + 1.2 * jax.random.normal(k_level, (b, 2 * shape.run)))
    level = jnp.where(jax.random.bernoulli(k_one, 0.15, level.shape), 1.0, level)
    augment = 0.25 * jax.random.uniform(k_augment, (b, shape.blocks)) ** 2
    augment = jnp.where(jax.random.bernoulli(k_none, 0.4, (b, 1)), 0.0, augment)
    noisy = tokens + _per_token(cfg, augment) * jax.random.normal(k_clean, tokens.shape)

    def with_own():
        out, own = own_context(model, k_own, batch, shape.blocks, attention=attention)
        told = jnp.where(own, OWN_FRAME_NOISE, augment)
        return jnp.where(_per_token(cfg, own), out, noisy), told

    context, told = noisy, augment
    if own_share > 0:
        use = jax.random.bernoulli(k_which, own_share)
        context, told = jax.lax.cond(use, with_own, lambda: (noisy, augment))
    out = denoise(model, k_eps, batch, context, told, level, attention=attention)
    weight = 1 / jnp.maximum(_per_token(cfg, level), 0.3)
    return jnp.mean(weight * (out - target) ** 2)


def one_step_psnr(model, batch, shape: SequenceShape, attention=None):
    """PSNR (dB) of the run blocks predicted from pure noise in one step, the memory exact."""
    tokens = to_tokens(batch[0], model.cfg.patch)
    exact = jnp.zeros((tokens.shape[0], shape.blocks))
    noise = jnp.ones((tokens.shape[0], 2 * shape.run))
    key = jax.random.key(5)
    out = denoise(model, key, batch, tokens, exact, noise, attention=attention)
    target = tokens[:, -out.shape[1] :]
    return jnp.mean(-10 * jnp.log10(jnp.mean((jnp.clip(out, -1, 1) - target) ** 2, (1, 2)) / 4))
