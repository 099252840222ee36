"""From the embedding of a prompt to latent video: the host side of the roll-out.

pipeline = SelfForcing(model, history=History.qvg(codec))
request = Generation(
    text_BUE=text, frames=180, latent_height=60, latent_width=104, noise=jax.random.key(0)
)
latents_BFZYX = pipeline.generate(request)
for latents_BFZYX in pipeline.stream(request): ...   # the same, block by block
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from models.runs.devices import on_all_devices
from models.self_forcing.block import (
    BlockNoise,
    Known,
    State,
    draw_noise,
    generate_block,
    read_block,
)
from models.self_forcing.config import SamplerConfig
from models.self_forcing.history import History, make_cache
from models.self_forcing.modeling import SelfForcingDiT
from models.self_forcing.schedule import Block, plan_blocks
from qvg_jax.loop import rollout, stream

type Progress = Callable[[int, int, State], None]  # progress(frames_done, frames, state)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """One video, or a batch of videos of the same size.

    Attributes:
        text_BUE: embeddings of the prompts, at most `text_slots` rows, without padding rows.
        frames: latent frames of the video, given ones included.
        latent_height, latent_width: size of the latent frames, an eighth of the video's.
        noise: a key for the whole video, or the noise of each generated block.
        initial_BFZYX: latents to start from, the first frames of the result: one frame for an
            image, a multiple of the block for a video to go on from.
        done_BFZYX: latents of generated frames that an earlier run of the same request has made:
            the first ones after `initial_BFZYX`, whole blocks. They are read, not made again. Give
            an array (of no frames, for a new run) to be able to go on from it one day: then both
            runs use the same program, and the later one ends in the same bits.
        first_frame_alone: see `plan_blocks`.
        capacity: latent frames that the cache is made for; None is `frames`. Videos of any length
            up to it run the same compiled program.
    """

    text_BUE: Float[Array | np.ndarray, "B rows E"]
    frames: int
    latent_height: int
    latent_width: int
    noise: PRNGKeyArray | Sequence[BlockNoise]
    initial_BFZYX: Float[Array | np.ndarray, "B F Z Y X"] | None = None
    done_BFZYX: Float[Array | np.ndarray, "B F Z Y X"] | None = None
    first_frame_alone: bool | None = None
    capacity: int | None = None


class _Run(NamedTuple):
    """Consecutive blocks of one kind, size and schedule: a step, and its inputs stacked along axis 0."""

    step: Partial
    xs: Any
    blocks: tuple[Block, ...]


class SelfForcing:
    """The transformer with its sampler and its memory.

    Args:
        model: the transformer.
        sampler: the few-step schedule; None is the released one.
        history: what of the past is kept, and how; None keeps everything uncompressed.
        share_weights: whether each device of the history's plan keeps a part of every layer's weights
            only, and gathers a layer when it runs.
    """

    def __init__(
        self,
        model: SelfForcingDiT,
        *,
        sampler: SamplerConfig | None = None,
        history: History | None = None,
        share_weights: bool = False,
    ):
        self.sampler = SamplerConfig() if sampler is None else sampler
        self.history = History() if history is None else history
        self.model = on_all_devices(model, self.history.plan, share=share_weights)

    def generate(
        self, request: Generation, *, chunk: int = 8, progress: Progress | None = None
    ) -> Float[np.ndarray, "B F Z Y X"]:
        """Generates a whole video, many blocks in each device call.

        Args:
            request: what to generate.
            chunk: blocks in one device call.
            progress: called as `progress(frames_done, frames, state)` after each call; it must not
                keep the state.

        Returns:
            The latents on the host, in the model's dtype.

        Raises:
            ValueError: frames that blocks cannot make up, sizes the patch does not divide, a
                prompt that is too long, initial latents or noise that do not fit.
            NonFiniteError, CacheFullError: see `qvg_jax.loop`.
        """
        state, runs = self._prepare(request)
        parts = []
        for run in runs:
            tell = _told(progress, run, request)
            state, y_NBFZYX = rollout(run.step, state, run.xs, chunk=chunk, progress=tell)
            parts.extend(y_NBFZYX)
        return np.concatenate(parts, axis=1)

    def stream(
        self, request: Generation, *, progress: Progress | None = None
    ) -> Iterator[Float[np.ndarray, "B F Z Y X"]]:
        """The same blocks one by one, as they are done; given blocks come first."""
        state, runs = self._prepare(request)
        for run in runs:
            xs = [jax.tree.map(lambda x, i=i: x[i], run.xs) for i in range(len(run.blocks))]
            blocks = stream(run.step, state, xs, progress=_told(progress, run, request))
            yield from blocks
            state = blocks.state

    def start(self, request: Generation) -> State:
        """An empty cache, and the prompt's keys and values for cross-attention."""
        text_BUE = jnp.asarray(request.text_BUE)
        text_kv = _text_kv(self.model, text_BUE)
        cache = make_cache(
            self.model.config,
            self.history,
            frames=request.frames if request.capacity is None else request.capacity,
            latent_height=request.latent_height,
            latent_width=request.latent_width,
            batch=text_BUE.shape[0],
        )
        return State(cache=cache, text_kv=text_kv, sink_average=self.history.sink_average)

    def _prepare(self, request: Generation) -> tuple[State, list[_Run]]:
        """Checks the request and turns it into a first state and the runs that follow."""
        config, initial = self.model.config, request.initial_BFZYX
        size = (request.latent_height, request.latent_width)
        B = request.text_BUE.shape[0]
        if request.capacity is not None and request.frames > request.capacity:
            raise ValueError(f"frames={request.frames} is more than capacity={request.capacity}")
        blocks = plan_blocks(
            config,
            request.frames,
            initial_frames=0 if initial is None else initial.shape[1],
            first_frame_alone=request.first_frame_alone,
        )
        if initial is not None:
            want = (B, initial.shape[1], config.latent_channels, *size)
            if initial.shape != want:
                raise ValueError(f"initial_BFZYX has shape {initial.shape}; accepted: {want}")
        new = [b for b in blocks if not b.given]
        given_noise = not isinstance(request.noise, jax.Array)
        if given_noise and len(request.noise) != len(new):
            raise ValueError(f"noise is for {len(request.noise)} blocks; accepted: {len(new)}")
        noise_of = dict(zip(new, request.noise, strict=True)) if given_noise else {}
        known_of = _known_blocks(request, new, (config.latent_channels, *size))

        def run(group: tuple[Block, ...]) -> _Run:
            F = group[0].frames
            if group[0].given:
                rows = [initial[:, b.first_frame : b.end_frame] for b in group]
                return _Run(Partial(_reading_step, self.model), np.stack(rows), group)
            if given_noise:
                shape = None
                xs = jax.tree.map(lambda *x: np.stack(x), *(noise_of[b] for b in group))
                want = (len(group), B, F, config.latent_channels, *size)
                if xs.start_BFZYX.shape != want:
                    got = xs.start_BFZYX.shape
                    raise ValueError(f"noise of a block is {got[1:]}; accepted: {want[1:]}")
            else:
                shape = (B, F, *size)
                first_frames = jnp.asarray([b.first_frame for b in group])
                xs = jax.vmap(jax.random.fold_in, (None, 0))(request.noise, first_frames)
            if known_of:
                xs = xs, jax.tree.map(lambda *x: np.stack(x), *(known_of[b] for b in group))
            sampler = self.sampler.of_block(group[0].first_frame)
            step = generating_step(sampler, shape, bool(known_of))
            return _Run(Partial(step, self.model), xs, group)

        kinds = itertools.groupby(
            blocks, key=lambda b: (b.given, b.frames, self.sampler.of_block(b.first_frame))
        )
        runs = [run(tuple(group)) for _, group in kinds]
        return self.start(request), runs


def _known_blocks(
    request: Generation, blocks: Sequence[Block], frame: tuple[int, int, int]
) -> dict[Block, Known]:
    """What is known of each block that is generated; empty if the request does not say."""
    if request.done_BFZYX is None:
        return {}
    done, at, known = np.asarray(request.done_BFZYX), 0, {}
    for block in blocks:
        part = done[:, at : at + block.frames]
        at += part.shape[1]
        if 0 < part.shape[1] < block.frames:
            break
        empty = np.zeros((done.shape[0], block.frames, *frame), done.dtype)
        known[block] = Known(np.bool_(part.shape[1] > 0), part if part.shape[1] else empty)
    if at != done.shape[1] or len(known) < len(blocks) or done.shape[2:] != frame:
        raise ValueError(
            f"done_BFZYX has shape {done.shape}; accepted: whole blocks of the "
            f"{sum(b.frames for b in blocks)} generated frames, each {frame}"
        )
    return known


# Cached, because jit recognises a step by the identity of its function.
@functools.cache
def generating_step(
    sampler: SamplerConfig, shape: tuple[int, ...] | None, resumable: bool = False
) -> Callable:
    """The step that makes a block, `step(model, state, x)`.

    x is the block's key, or its noise if `shape` is None; with `resumable` it is a pair of this and
    what is known of the block.
    """

    def step(model, state, x):
        x, known = x if resumable else (x, None)
        noise = x if shape is None else draw_noise(x, model.config, sampler, shape)
        return generate_block(model, state, noise, sampler, known)

    return step


def _reading_step(model, state, x0_BFZYX):
    return read_block(model, state, x0_BFZYX), x0_BFZYX.astype(model.config.dtype)


@jax.jit
def _text_kv(model, text_BUE):
    return model.text_kv(text_BUE)


def _told(progress: Progress | None, run: _Run, request: Generation) -> Callable | None:
    """Progress of one run in blocks as progress of the video in frames."""
    if progress is None:
        return None
    return lambda done, _, state: progress(run.blocks[done - 1].end_frame, request.frames, state)
