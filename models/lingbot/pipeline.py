"""From an image and a walk to latent video: Self-Forcing's roll-out over a steered network."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from models.lingbot.modeling import LingBotDiT, Steered
from models.self_forcing.block import State, draw_noise, generate_block
from models.self_forcing.config import SamplerConfig
from models.self_forcing.history import History, make_cache
from models.self_forcing.schedule import plan_blocks
from qvg_jax.rollout import rollout

MASK_CHANNELS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SteeredWalk:
    """One walk.

    Attributes:
        text_BUE: embedding of the prompt, without padding rows.
        condition_BFZYX: from `image_condition`, a frame for each latent frame.
        camera_BFCYX: from `camera_map`, likewise.
        noise: a key for the whole video.
    """

    text_BUE: Float[Array | np.ndarray, "B rows E"]
    condition_BFZYX: Float[np.ndarray, "B F Z Y X"]
    camera_BFCYX: Float[np.ndarray, "B F C Y X"]
    noise: PRNGKeyArray


class _BlockInput(NamedTuple):
    key: PRNGKeyArray
    condition_BFZYX: Float[Array, "B F Z Y X"]
    camera_BFCYX: Float[Array, "B F C Y X"]


def image_condition(
    latents_BFZYX: Float[np.ndarray, "B F Z Y X"],
) -> Float[np.ndarray, "B F Z Y X"]:
    """Mask, then latents: the mask is 1 in the first latent frame, which holds the image.

    Args:
        latents_BFZYX: the VAE's, of a video of the image and black frames after it.
    """
    B, F, _, Y, X = latents_BFZYX.shape
    mask = np.zeros((B, F, MASK_CHANNELS, Y, X), np.float32)
    mask[:, 0] = 1
    return np.concatenate([mask, np.asarray(latents_BFZYX, np.float32)], 2)


def generate(
    model: LingBotDiT,
    sampler: SamplerConfig,
    history: History,
    request: SteeredWalk,
    *,
    chunk: int = 8,
    progress: Callable[[int, int | None, State], None] | None = None,
) -> Float[np.ndarray, "B F Z Y X"]:
    """Generates a whole video.

    Args:
        model: the transformer.
        sampler, history: from `config.py`, or others.
        request: what to generate; its maps decide the number of frames.
        chunk: blocks in one device call.
        progress: called as `progress(blocks_done, blocks, state)` after each call.

    Returns:
        The latents on the host, in the model's dtype.

    Raises:
        ValueError: frames that blocks cannot make up, or maps that do not fit each other.
        NonFiniteError, CacheFullError: see `qvg_jax.rollout`.
    """
    config, camera = model.config, request.camera_BFCYX
    B, F, Z, Y, X = request.condition_BFZYX.shape
    want = (B, F, config.camera_channels * config.fold**2, Y, X)
    if camera.shape != want or config.condition_channels != Z:
        raise ValueError(
            f"camera_BFCYX has shape {camera.shape} and condition_BFZYX {Z} channels; accepted: "
            f"{want} and {config.condition_channels}"
        )
    n = config.frames_per_block
    firsts = [block.first_frame for block in plan_blocks(config, F)]
    cut = lambda x: np.stack([np.asarray(x[:, i : i + n], np.float32) for i in firsts])  # noqa: E731
    keys = jax.vmap(jax.random.fold_in, (None, 0))(request.noise, jnp.asarray(firsts))
    xs = _BlockInput(keys, cut(request.condition_BFZYX), cut(camera))
    size = dict(latent_height=Y, latent_width=X, batch=B)
    state = State(
        cache=make_cache(config, history, frames=F, **size),
        text_kv=jax.jit(lambda m, text: m.text_kv(text))(model, jnp.asarray(request.text_BUE)),
    )
    step = Partial(_step(sampler, (B, n, Y, X)), model)
    _, y_NBFZYX = rollout(step, state, xs, chunk=chunk, progress=progress)
    return np.concatenate(list(y_NBFZYX), axis=1)


# Cached, because jit recognises a step by the identity of its function.
@functools.cache
def _step(sampler: SamplerConfig, shape: tuple[int, int, int, int]) -> Callable:
    def step(model, state, x):
        camera_BTM = model.embed_camera(x.camera_BFCYX)
        steered = Steered(model=model, condition_BFZYX=x.condition_BFZYX, camera_BTM=camera_BTM)
        return generate_block(
            steered, state, draw_noise(x.key, model.config, sampler, shape), sampler
        )

    return step
