"""From an image and a walk to latent video: Self-Forcing's roll-out over a steered network."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from models.lingbot.camera import CameraMaps
from models.lingbot.modeling import LingBotDiT, Steered
from models.lingbot.recalling import Recaller, world_to_camera
from models.self_forcing.block import Known, State, draw_noise, generate_block
from models.self_forcing.config import SamplerConfig
from models.self_forcing.history import History, make_cache
from models.self_forcing.schedule import plan_blocks
from qvg_jax.loop import rollout
from qvg_jax.loop import stream as stream_blocks

type Progress = Callable[[int, int, State], None]  # progress(blocks_done, blocks, state)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SteeredWalk:
    """One walk.

    Attributes:
        text_BUE: embedding of the prompt, without padding rows.
        condition_BFZYX: from `image_condition`, a frame for each latent frame.
        camera_BFCYX: from `camera_map`, likewise; or `CameraMaps`, computed block by block.
        noise: a key for the whole video.
        done_BFZYX: latents that an earlier run of the same request has made, whole blocks. They are
            read, not made again. Give an array (of no frames, for a new run) to be able to go on
            from it one day: then both runs use the same program, and the later one ends in the same
            bits.
    """

    text_BUE: Float[Array | np.ndarray, "B rows E"]
    condition_BFZYX: Float[np.ndarray, "B F Z Y X"]
    camera_BFCYX: Float[np.ndarray, "B F C Y X"] | CameraMaps
    noise: PRNGKeyArray
    done_BFZYX: Float[Array | np.ndarray, "B F Z Y X"] | None = None


class BlockInput(NamedTuple):
    """What the step is given of one block: its noise's key, its slices of the maps, its latents."""

    key: PRNGKeyArray
    condition_BFZYX: Float[Array, "B F Z Y X"]
    camera_BFCYX: Float[Array, "B F C Y X"]
    known: Known | None


def generate(
    model: LingBotDiT,
    sampler: SamplerConfig,
    history: History,
    request: SteeredWalk,
    *,
    chunk: int = 8,
    progress: Progress | None = None,
) -> Float[np.ndarray, "B F Z Y X"]:
    """Generates a whole video.

    Args:
        model: the transformer.
        sampler, history: from `config.py`, or others.
        request: what to generate; its maps decide the number of frames.
        chunk: blocks in one device call.
        progress: called as `progress(blocks_done, blocks, state)` after each call; it must not keep
            the state.

    Returns:
        The latents on the host, in the model's dtype.

    Raises:
        ValueError: frames that blocks cannot make up, maps that do not fit each other, or done
            latents that do not fit them.
        NonFiniteError, CacheFullError: see `qvg_jax.loop`.
    """
    inputs = _Inputs(model, request)
    state, step = _start(model, sampler, history, request)

    def stack(*x):
        return jnp.stack(x) if isinstance(x[0], jax.Array) else np.stack(x)

    xs = jax.tree.map(stack, *inputs)
    _, y_NBFZYX = rollout(step, state, xs, chunk=chunk, progress=progress)
    return np.concatenate(list(y_NBFZYX), axis=1)


def stream(
    model: LingBotDiT,
    sampler: SamplerConfig,
    history: History,
    request: SteeredWalk,
    *,
    recall: bool = False,
    progress: Progress | None = None,
) -> Iterator[Float[np.ndarray, "B F Z Y X"]]:
    """Yields the same blocks one by one, as they are done; arguments and errors as for `generate`.

    Args:
        model, sampler, history, request, progress: as for `generate`.
        recall: keep the spans that make room in host memory, and have those in sight that share most of
            each block's field of view. The request's camera must be `CameraMaps`. Where no compressed span
            ever makes room, it changes nothing.
    """
    inputs = _Inputs(model, request)
    state, step = _start(model, sampler, history, request)
    lay, before = state.cache.layout, None
    if recall:
        if not isinstance(request.camera_BFCYX, CameraMaps):
            raise ValueError(
                "recall needs the motions of the camera; accepted: CameraMaps, not maps"
            )
        if lay.max_spans and lay.overflow == "drop":
            w2c_F44 = world_to_camera(request.camera_BFCYX.motion_F44)
            before = Recaller(state.cache, w2c_F44, model.config.frames_per_block)
    yield from stream_blocks(step, state, inputs, progress=progress, before=before)


class _Inputs:
    """The inputs of all blocks, each made when it is wanted."""

    def __init__(self, model: LingBotDiT, request: SteeredWalk):
        config, camera, done = model.config, request.camera_BFCYX, request.done_BFZYX
        B, F, Z, Y, X = request.condition_BFZYX.shape
        want = (B, F, config.camera_channels * config.fold**2, Y, X)
        if camera.shape != want or config.condition_channels != Z:
            raise ValueError(
                f"camera_BFCYX has shape {camera.shape} and condition_BFZYX {Z} channels; accepted: "
                f"{want} and {config.condition_channels}"
            )
        self.request, self.frames = request, config.frames_per_block
        self.firsts = [block.first_frame for block in plan_blocks(config, F)]
        self.block = (B, self.frames, config.latent_channels, Y, X)
        if done is not None and (
            done.shape[1] % self.frames
            or done.shape[1] > F
            or done.shape != (B, done.shape[1], *self.block[2:])
        ):
            raise ValueError(
                f"done_BFZYX has shape {done.shape}; accepted: whole blocks {self.block} of the {F} "
                "frames"
            )

    def __len__(self) -> int:
        return len(self.firsts)

    def __iter__(self) -> Iterator[BlockInput]:
        for first in self.firsts:
            frames = slice(first, first + self.frames)
            yield BlockInput(
                jax.random.fold_in(self.request.noise, first),
                np.asarray(self.request.condition_BFZYX[:, frames], np.float32),
                np.asarray(self.request.camera_BFCYX[:, frames], np.float32),
                self._known(frames),
            )

    def _known(self, frames: slice) -> Known | None:
        if self.request.done_BFZYX is None:
            return None
        part = np.asarray(self.request.done_BFZYX[:, frames])
        done = part.shape[1] > 0
        return Known(np.bool_(done), part if done else np.zeros(self.block, part.dtype))


def _start(
    model: LingBotDiT, sampler: SamplerConfig, history: History, request: SteeredWalk
) -> tuple[State, Partial]:
    """An empty cache with the prompt's keys and values, and the step that makes a block."""
    B, F, _, Y, X = request.condition_BFZYX.shape
    size = dict(latent_height=Y, latent_width=X, batch=B)
    state = State(
        cache=make_cache(model.config, history, frames=F, **size),
        text_kv=_text_kv(model, jnp.asarray(request.text_BUE)),
    )
    shape = (B, model.config.frames_per_block, Y, X)
    return state, Partial(generating_step(sampler, shape), model)


@jax.jit
def _text_kv(model, text_BUE):
    return model.text_kv(text_BUE)


# Cached, because jit recognises a step by the identity of its function.
@functools.cache
def generating_step(sampler: SamplerConfig, shape: tuple[int, int, int, int]) -> Callable:
    """The step that makes a block, `step(model, state, x)` with a `BlockInput`.

    Args:
        sampler: the few-step schedule.
        shape: (B, F, Y, X) of the block's latents.
    """

    def step(model, state, x):
        camera_BTM = model.embed_camera(x.camera_BFCYX)
        steered = Steered(model=model, condition_BFZYX=x.condition_BFZYX, camera_BTM=camera_BTM)
        noise = draw_noise(x.key, model.config, sampler, shape)
        return generate_block(steered, state, noise, sampler, x.known)

    return step
