"""From the embedding of a prompt to latent video: text, an image or a clip to go on from.

    pipeline = LongCat(model, key_codec=codec, value_codec=codec)
    prompt = Prompt(text_BUE=text, mask_BU=mask, negative_BUE=..., negative_mask_BU=...)
    latents_BFZYX = pipeline.text_to_video(prompt, noise)
    latents_BFZYX = pipeline.continue_video(prompt, given, noise)

All take their noise as an argument and draw nothing themselves, so two pipelines with different
codecs start from the same noise. `segments.py` strings clips together.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models.common.attention import cudnn_works
from models.longcat.condition import build_condition
from models.longcat.modeling import LongCatDiT, TextKV
from models.longcat.sampler import Progress, cached_step, clip_step, denoise
from models.longcat.schedule import Schedule, continuation, standard
from models.longcat.text import kept_rows, read_text
from qvg_jax.cache.health import raise_if_bad
from qvg_jax.cache.operations import KVCache
from qvg_jax.codecs.base import Codec

GUIDANCE = 4.0  # of the released pipelines


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """Embedded prompts of a batch of videos; one row, N = 1 or B = 1, may serve them all.

    Attributes:
        text_BUE: the text encoder's output, padded.
        mask_BU: nonzero for real tokens.
        negative_BUE, negative_mask_BU: the negative prompts (the embedding of the empty string if
            there is none); needed for guidance only.
    """

    text_BUE: Float[Array | np.ndarray, "B U E"]
    mask_BU: Int[Array | np.ndarray, "B U"]
    negative_BUE: Float[Array | np.ndarray, "N U E"] | None = None
    negative_mask_BU: Int[Array | np.ndarray, "N U"] | None = None


class LongCat:
    """The transformer with its sampler and the codecs of its condition cache.

    Args:
        model: the transformer.
        key_codec, value_codec: compressors of the given frames' K and V; None keeps them in the
            model's dtype.
        mesh: the devices that the model's parameters are on, if there are several: see
            `sharding.py`.

    Raises:
        ValueError: only one of the codecs is given.
    """

    def __init__(
        self,
        model: LongCatDiT,
        *,
        key_codec: Codec | None = None,
        value_codec: Codec | None = None,
        mesh: Mesh | None = None,
    ):
        if (key_codec is None) != (value_codec is None):
            raise ValueError("give both key_codec and value_codec, or neither")
        self.model = model
        self.key_codec, self.value_codec = key_codec, value_codec
        self._mesh = mesh
        cudnn_works(
            jnp.dtype(model.config.dtype).name, model.config.head_dim
        )  # tried outside of it

    def text_to_video(
        self,
        prompt: Prompt,
        noise_BFZYX: Float[Array | np.ndarray, "B F Z Y X"],
        *,
        schedule: Schedule | None = None,
        guidance: float | Float[np.ndarray, "B"] = GUIDANCE,
        chunk: int = 8,
        progress: Progress | None = None,
    ) -> Float[Array, "B F Z Y X"]:
        """Latents of a whole clip from a prompt.

        Args:
            prompt: what to show.
            noise_BFZYX: standard normal noise of all frames; its shape is the clip's.
            schedule: noise levels; None is `standard()`, 50 steps.
            guidance: strength of guidance, one number or one for each video; at most 1 is none.
            chunk: steps in one device call.
            progress: see `denoise`.

        Returns:
            Normalised latents, float32.

        Raises:
            ValueError: shapes that do not fit together, guidance without a negative prompt or
                with a distilled schedule.
        """
        nothing_given = noise_BFZYX[:, :0]
        return self.continue_video(
            prompt,
            nothing_given,
            noise_BFZYX,
            cached=False,
            schedule=standard() if schedule is None else schedule,
            guidance=guidance,
            chunk=chunk,
            progress=progress,
        )

    def image_to_video(
        self,
        prompt: Prompt,
        image_B1ZYX: Float[Array | np.ndarray, "B 1 Z Y X"],
        noise_BFZYX: Float[Array | np.ndarray, "B F Z Y X"],
        *,
        schedule: Schedule | None = None,
        **options,
    ) -> Float[Array, "B F+1 Z Y X"]:
        """Latents of a clip that starts with an image: a joint run with one given frame.

        Args:
            prompt: what to show.
            image_B1ZYX: normalised latent of the image.
            noise_BFZYX: noise of the frames after it.
            schedule: noise levels; None is `standard()`.
            **options: as for `text_to_video`.

        Raises:
            ValueError: more than one given frame, or as for `text_to_video`.
        """
        if image_B1ZYX.shape[1] != 1:
            raise ValueError(f"image_B1ZYX has {image_B1ZYX.shape[1]} frames; accepted: 1")
        schedule = standard() if schedule is None else schedule
        options |= dict(schedule=schedule, cached=False)
        return self.continue_video(prompt, image_B1ZYX, noise_BFZYX, **options)

    def continue_video(
        self,
        prompt: Prompt,
        given_BGZYX: Float[Array | np.ndarray, "B G Z Y X"],
        noise_BFZYX: Float[Array | np.ndarray, "B F Z Y X"],
        *,
        cached: bool = True,
        schedule: Schedule | None = None,
        guidance: float | Float[np.ndarray, "B"] = GUIDANCE,
        key: PRNGKeyArray | None = None,
        chunk: int = 8,
        progress: Progress | None = None,
    ) -> Float[Array, "B G+F Z Y X"]:
        """Latents of a clip whose first frames are given.

        Args:
            prompt: what to show.
            given_BGZYX: normalised latents of the first frames.
            noise_BFZYX: standard normal noise of the frames after them.
            cached: read the given frames from a cache that is built once (and compressed, with
                codecs), or run them along in every step. With guidance the two differ on purpose:
                see `clip_step`.
            schedule: noise levels; None is `continuation()`, 56 steps.
            guidance, chunk, progress: as for `text_to_video`.
            key: the codecs' own randomness, see `build_condition`.

        Returns:
            The given latents and then the new ones, float32.

        Raises:
            ValueError: as for `text_to_video`, or nothing is given in a cached run.
            NonFiniteError: the given latents lead to K or V that are not finite.
        """
        schedule = continuation() if schedule is None else schedule
        with self.on_devices():
            return self._continued(
                prompt, given_BGZYX, noise_BFZYX, cached, schedule, guidance, key, chunk, progress
            )

    def _continued(
        self, prompt, given_BGZYX, noise_BFZYX, cached, schedule, guidance, key, chunk, progress
    ):
        text_kv, guidance_B = self._start(prompt, given_BGZYX, noise_BFZYX, schedule, guidance)
        given_BGZYX = jnp.asarray(given_BGZYX, jnp.float32)
        if cached:
            step, memory = cached_step, self.remember(given_BGZYX, key=key)
        else:
            step, memory = clip_step, given_BGZYX
        step = Partial(step, self.model, text_kv, guidance_B, memory)
        x_BFZYX, _ = denoise(step, noise_BFZYX, schedule, chunk=chunk, progress=progress)
        return jnp.concatenate([given_BGZYX, x_BFZYX], axis=1)

    def remember(
        self, given_BGZYX: Float[Array, "B G Z Y X"], *, key: PRNGKeyArray | None = None
    ) -> KVCache:
        """The condition cache of given frames.

        Raises:
            ValueError: no frames, or a codec that refuses their number of tokens.
            NonFiniteError: K or V are not finite.
        """
        if not given_BGZYX.shape[1]:
            raise ValueError("given_BGZYX has no frames; a cached run needs at least 1")
        codecs = dict(key_codec=self.key_codec, value_codec=self.value_codec)
        with self.on_devices():
            cache = build_condition(self.model, given_BGZYX, **codecs, key=key)
        raise_if_bad(cache)
        return cache

    def on_devices(self) -> contextlib.AbstractContextManager:
        """The mesh, to run a program of one's own with the model."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _start(
        self, prompt: Prompt, given, noise, schedule: Schedule, guidance
    ) -> tuple[TextKV, Array | None]:
        """Checks a request; keys and values of its prompts, and guidance of each video."""
        videos = noise.shape[0]
        want = (videos, given.shape[1], *noise.shape[2:])
        if given.shape != want:
            raise ValueError(f"given latents have shape {given.shape}; accepted: {want}")
        if not noise.shape[1]:
            raise ValueError(f"noise has shape {noise.shape}, no frames; accepted: at least 1")
        scale_B = np.asarray(guidance, np.float32)
        if scale_B.shape not in ((), (1,), (videos,)):
            raise ValueError(
                f"guidance has shape {scale_B.shape}; accepted: one number, or {videos}, one for "
                "each video"
            )
        scale_B = np.broadcast_to(scale_B, (videos,))
        guided = bool((scale_B > 1).any())
        if guided and not schedule.guided:
            raise ValueError(
                f"guidance={guidance} is not accepted with a distilled schedule: give 1"
            )
        if guided and (prompt.negative_BUE is None or prompt.negative_mask_BU is None):
            raise ValueError(
                f"guidance={guidance} needs negative_BUE and negative_mask_BU, for instance of "
                "the empty prompt"
            )
        texts = [(prompt.text_BUE, prompt.mask_BU, "text_BUE")]
        if guided:
            texts.insert(0, (prompt.negative_BUE, prompt.negative_mask_BU, "negative_BUE"))
        for text, mask, name in texts:
            if text.shape[0] not in (1, videos) or mask.shape != text.shape[:2]:
                raise ValueError(
                    f"{name} has shape {text.shape} and its mask {mask.shape}; accepted: "
                    f"(1 or {videos}, U, E) and (1 or {videos}, U)"
                )
            if text.shape[1:] != texts[0][0].shape[1:]:
                raise ValueError(
                    f"{name} has shape {text.shape}; accepted: padded like the negative prompt, "
                    f"{texts[0][0].shape}"
                )
        text, mask = (
            np.concatenate([np.repeat(np.asarray(t[i]), videos // len(t[i]), 0) for t in texts])
            for i in (0, 1)
        )
        rows = kept_rows(mask) if self.model.config.zero_pad else None
        text_kv = _read_text(self.model, jnp.asarray(text), jnp.asarray(mask), rows=rows)
        return text_kv, jnp.asarray(scale_B) if guided else None


@functools.partial(jax.jit, static_argnames="rows")
def _read_text(model, text_BUE, mask_BU, *, rows):
    return read_text(model, text_BUE, mask_BU, rows=rows)
