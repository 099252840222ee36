"""From a prompt, a picture and a walk to latent video: the host side of the roll-out.

pipeline = WorldPlay(model, history=History.qvg(codec))
path = CameraPath.from_string("w-8,right-4,w-3")
request = Walk(
    text_BUE=text, path=path, latent_height=44, latent_width=80, noise=jax.random.key(0)
)
latents_BFZYX = pipeline.generate(request)
for latents_BFZYX in pipeline.stream(request): ...              # the same, block by block
for latents_BFZYX in pipeline.stream(request, pieces=hands()): ...   # a walk that is not known yet
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float

from models.runs.devices import on_all_devices
from models.worldplay.block import Frames, State, generate_block
from models.worldplay.cameras import CameraPath
from models.worldplay.config import SamplerConfig
from models.worldplay.history import History, make_cache
from models.worldplay.modeling import WorldPlayDiT
from models.worldplay.recalling import Recaller
from models.worldplay.request import (
    Walk,
    block_inputs,
    frames_of_room,
    frames_wanted,
    points_of,
)
from qvg_jax.loop import rollout, stream

type Progress = Callable[[int, int | None, State], None]  # progress(blocks_done, blocks, state)


class WorldPlay:
    """The transformer with its sampler and its memory.

    Args:
        model: the transformer.
        sampler: the few-step schedule; None is the released one.
        history: what of the past is kept, and how; None is all of it, uncompressed.
        share_weights: whether each device of the history's plan keeps a part of every layer's weights
            only, and gathers a layer when it runs.
    """

    def __init__(
        self,
        model: WorldPlayDiT,
        *,
        sampler: SamplerConfig | None = None,
        history: History | None = None,
        share_weights: bool = False,
    ):
        self.sampler = SamplerConfig() if sampler is None else sampler
        self.history = History() if history is None else history
        self.model = on_all_devices(model, self.history.plan, share=share_weights)

    def generate(
        self, request: Walk, *, chunk: int = 8, progress: Progress | None = None
    ) -> Float[np.ndarray, "B F Z Y X"]:
        """Generates a whole video, many blocks in each device call; with spans in sight, one.

        Args:
            request: what to generate.
            chunk: blocks in one device call.
            progress: called as `progress(blocks_done, blocks, state)` after each call; it must not
                keep the state.

        Returns:
            The latents on the host, in the model's dtype.

        Raises:
            ValueError: a path that is too short, or longer than the RoPE table; frames that blocks
                cannot make up; a picture, noise or contexts that do not fit.
            NonFiniteError: see `qvg_jax.loop`.
        """
        config = self.model.config
        if self.history.sight is not None:  # spans are brought into sight between the blocks
            frames_wanted(config, self.history, request)
            return np.concatenate(list(self.stream(request, progress=progress)), axis=1)
        xs = jax.tree.map(lambda *x: np.stack(x), *block_inputs(config, self.history, request))
        state = self.start(request)
        _, y_NBFZYX = rollout(self._step(), state, xs, chunk=chunk, progress=progress)
        return np.concatenate(list(y_NBFZYX), axis=1)

    def stream(
        self,
        request: Walk,
        *,
        pieces: Iterable[CameraPath] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Float[np.ndarray, "B F Z Y X"]]:
        """The same blocks one by one, as they are done.

        Args:
            request: what to generate.
            pieces: the path of each block, asked for when that block is next: for a walk that is
                still being walked. `request.path` is then not read and `frames` is the most.
            progress: as for `generate`.

        Returns:
            An iterator of blocks, whose `state` is the state after the last of them.
        """
        config, history = self.model.config, self.history
        frames = frames_wanted(config, history, request, known=pieces is None)  # raises at once
        xs, state = block_inputs(config, history, request, pieces), self.start(request)
        before = None
        if history.sight is not None:
            before = Recaller(config, history, state, frames=frames, points_N3=points_of(request))
        return stream(self._step(), state, xs, progress=progress, before=before)

    def _step(self) -> Partial:
        return Partial(generating_step(self.sampler, self.history), self.model)

    def start(self, request: Walk) -> State:
        """An empty cache and empty buffers, and the prompt's K and V for cross-attention."""
        config, text_BUE = self.model.config, jnp.asarray(request.text_BUE)
        B, Y, X = text_BUE.shape[0], request.latent_height, request.latent_width
        capacity = self.history.room_frames(config, frames_of_room(config, request))
        cache = make_cache(
            config, self.history, frames=capacity, latent_height=Y, latent_width=X, batch=B
        )
        return State(
            cache=cache,
            text_kv=_text_kv(self.model, text_BUE),
            latents_BFZYX=jnp.zeros((B, capacity, config.latent_channels, Y, X), config.dtype),
            frames=Frames(
                jnp.zeros((B, capacity, 4, 4), jnp.float32),
                jnp.zeros((B, capacity, 3, 3), jnp.float32),
                jnp.zeros((B, capacity), jnp.float32),
            ),
            blocks=jnp.zeros((), jnp.int32),
        )


# Cached, because jit recognises a step by the identity of its function.
@functools.cache
def generating_step(sampler: SamplerConfig, history: History) -> Callable:
    """The step that makes a block, `step(model, state, x) -> (state, latents)`."""

    def step(model, state, x):
        return generate_block(model, state, x, sampler, history)[:2]

    return step


@jax.jit
def _text_kv(model, text_BUE):
    return model.text_kv(text_BUE)
