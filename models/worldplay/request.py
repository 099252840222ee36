"""What to generate, and what each block of it needs: noise, cameras, a picture, a context."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from models.worldplay.block import BlockInput, Frames
from models.worldplay.cameras import CameraPath, joined
from models.worldplay.config import WorldPlayConfig
from models.worldplay.history import History
from models.worldplay.retrieval import ball_points, select_frames
from models.worldplay.schedule import count_blocks


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """One walk, or the same walk in several videos of one size.

    Attributes:
        text_BUE: embeddings of the prompts, at most `text_slots` rows, without padding rows.
        path: cameras and actions of the latent frames; None for a walk in pieces.
        latent_height, latent_width: size of the latent frames, a sixteenth of the video's.
        noise: a key, or standard normal noise of at least all frames.
        frames: latent frames of the video; None is as many whole blocks as the path has frames for.
        image_BZYX: normalised latent of a picture, which becomes the first frame.
        contexts: frames that each block looks back at, in order; None retrieves them by their
            fields of view, or takes all with "append"; with spans in sight only they are counted here
            and chosen by `recalling.Recaller`, and `contexts` must be None.
        done_BFZYX: latents that an earlier run of the same request has made, whole blocks from the
            first on: they are read, not made again, and the video goes on as that one would have.
        capacity: latent frames that the buffers are made for; None is `frames`. Videos of any
            length up to it run the same compiled program. With spans in sight they are made for those.
        points_N3: points for the retrieval; None draws them with a fixed seed.
    """

    text_BUE: Float[Array | np.ndarray, "B rows E"]
    path: CameraPath | None
    latent_height: int
    latent_width: int
    noise: PRNGKeyArray | Float[np.ndarray, "B F Z Y X"]
    frames: int | None = None
    image_BZYX: Float[Array | np.ndarray, "B Z Y X"] | None = None
    contexts: Sequence[Int[np.ndarray, "S"]] | None = None
    done_BFZYX: Float[Array | np.ndarray, "B F Z Y X"] | None = None
    capacity: int | None = None
    points_N3: Float[np.ndarray, "N 3"] | None = None


def frames_wanted(
    config: WorldPlayConfig, history: History, request: Walk, *, known: bool = True
) -> int:
    """Checks the numbers of frames of a request.

    Args:
        config, history: sizes of the model; what is remembered.
        request: the request.
        known: whether the path is; otherwise it comes in pieces.

    Returns:
        The frames to generate, or the most there may be.

    Raises:
        ValueError: a path too short, no whole blocks, or positions beyond the RoPE table.
    """
    n, frames = config.frames_per_block, request.frames
    if known:
        path = 0 if request.path is None else len(request.path)
        frames = max(path // n * n, n) if frames is None else frames
        if frames > path:
            raise ValueError(
                f"the camera path has {path} frames and the video {frames}: every latent "
                f"frame needs a camera, and blocks are {n} frames"
            )
    elif frames is None:
        raise ValueError("frames=None with pieces: give the most frames that may be asked for")
    count_blocks(config, frames)
    if history.sight is not None and request.contexts is not None:
        raise ValueError(
            f"contexts with sight={history.sight}: the spans of a block are chosen when it is due, by their "
            "fields of view; accepted: contexts=None"
        )
    capacity = frames_of_room(config, request)
    if frames > capacity:
        raise ValueError(f"frames={frames} is more than capacity={capacity}")
    count_blocks(config, capacity)
    history.context_frames(config, capacity)
    return frames


def frames_of_room(config: WorldPlayConfig, request: Walk) -> int:
    """Latent frames that buffers and cache are made for."""
    n = config.frames_per_block
    given = (request.capacity, request.frames)
    return next((x for x in given if x is not None), len(request.path or ()) // n * n)


def block_inputs(
    config: WorldPlayConfig,
    history: History,
    request: Walk,
    pieces: Iterable[CameraPath] | None = None,
) -> Iterator[BlockInput]:
    """What each block needs, made when it is asked for.

    Args:
        config, history: sizes of the model; what is remembered.
        request: the request.
        pieces: the path of each block; None cuts the request's own.

    Raises:
        ValueError: with the first block that does not fit.
    """
    n, B = config.frames_per_block, request.text_BUE.shape[0]
    frames = frames_wanted(config, history, request, known=pieces is None)
    shape = (B, n, config.latent_channels, request.latent_height, request.latent_width)
    slots = history.context_frames(config, frames_of_room(config, request))
    draw, walked = _noise_source(request.noise, shape), []
    for block, piece in enumerate(_pieces(n, request, frames) if pieces is None else pieces):
        first = block * n
        if first >= frames:
            raise ValueError(f"the path has another piece after the last of {frames} frames")
        if len(piece) != n:
            raise ValueError(f"a piece of the path has {len(piece)} frames; accepted: {n}")
        walked.append(piece)
        context_S = _context(n, history, request, walked)
        _check_context(context_S, n, first, slots, history)
        given_BFZYX, is_given_F = _given(request, block, shape)
        yield BlockInput(
            noise_BFZYX=draw(block),
            frames=_cameras(piece, B),
            given_BFZYX=given_BFZYX,
            is_given_F=is_given_F,
            context_S=np.pad(context_S, (0, slots - len(context_S)), constant_values=-1),
        )


def _context(
    n: int, history: History, request: Walk, walked: list[CameraPath]
) -> Int[np.ndarray, "S"]:
    """The frames that a block looks back at; `walked` ends with its own piece of the path."""
    block = len(walked) - 1
    if request.contexts is not None:
        if block >= len(request.contexts):
            raise ValueError(f"contexts are for {len(request.contexts)} blocks; need more")
        context_S = request.contexts[block]
    elif history.recomputes:
        context_S = select_frames(
            points_of(request),
            joined(walked).w2c_F44,
            block * n,
            memory_frames=history.memory_frames,
            recent_frames=history.recent_frames,
            block_frames=n,
        )
    elif history.sight is not None:
        spans, behind = history.spans_in_sight(block)
        context_S = np.arange((spans * history.span_blocks + behind) * n)
    else:
        context_S = np.arange(block * n)
    return np.asarray(context_S, np.int32)


def _check_context(context_S: np.ndarray, n: int, first: int, slots: int, history: History) -> None:
    rising = bool((np.diff(context_S) > 0).all())
    inside = not len(context_S) or (context_S[0] >= 0 and context_S[-1] < first)
    if not (rising and inside) or len(context_S) % n or len(context_S) > slots:
        raise ValueError(
            f"context {context_S.tolist()} of the block at frame {first}; accepted: at most "
            f"{slots} rising frame numbers below {first}, a multiple of {n} of them"
        )
    if not history.recomputes and history.sight is None and len(context_S) != first:
        raise ValueError(
            f"context {context_S.tolist()} of the block at frame {first}: semantics='append' "
            "never forgets, so it must be all frames before; use semantics='recompute'"
        )


def points_of(request: Walk) -> Float[np.ndarray, "N 3"]:
    """The points on which a walk's fields of view are compared."""
    return _fixed_points() if request.points_N3 is None else request.points_N3


@functools.cache
def _fixed_points() -> np.ndarray:
    return ball_points(np.random.default_rng(0))


def _pieces(n: int, request: Walk, frames: int) -> list[CameraPath]:
    path = request.path
    parts = (path.c2w_F44, path.intrinsics_F33, path.actions_F)
    return [CameraPath(*(x[i : i + n] for x in parts)) for i in range(0, frames, n)]


def _cameras(piece: CameraPath, batch: int) -> Frames:
    """Cameras and actions in float32, for every video of the batch."""
    parts = (piece.w2c_F44, piece.intrinsics_F33, piece.actions_F)
    return Frames(*(np.tile(np.float32(x)[None], (batch,) + (1,) * x.ndim) for x in parts))


def _given(
    request: Walk, block: int, shape: tuple[int, ...]
) -> tuple[Float[np.ndarray, "B F Z Y X"], Bool[np.ndarray, "F"]]:
    """What is known of a block before it is made: nothing, the picture, or all of it."""
    B, n, *frame = shape
    given, image, done = np.zeros(shape, np.float32), request.image_BZYX, request.done_BFZYX
    if image is not None and np.shape(image) != (B, *frame):
        raise ValueError(f"image_BZYX has shape {np.shape(image)}; accepted: {(B, *frame)}")
    if done is not None:
        rows, F, *size = np.shape(done)
        if [rows, *size] != [B, *frame] or F % n:
            raise ValueError(
                f"done_BFZYX has shape {np.shape(done)}; accepted: {(B, f'{n} k', *frame)}"
            )
        if block < F // n:
            given[:] = np.asarray(done[:, block * n : (block + 1) * n], np.float32)
            return given, np.ones(n, bool)
    if block == 0 and image is not None:
        given[:, 0] = np.asarray(image, np.float32)
        return given, np.arange(n) == 0
    return given, np.zeros(n, bool)


def _noise_source(noise: Array | np.ndarray, shape: tuple[int, ...]) -> Callable[[int], np.ndarray]:
    """noise(block) from a key, float32 whatever the model's dtype, or from an array."""
    n = shape[1]
    if isinstance(noise, jax.Array) and jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        return lambda block: np.asarray(
            jax.random.normal(jax.random.fold_in(noise, block), shape, jnp.float32)
        )
    noise = np.asarray(noise, np.float32)
    B, _, *size = shape
    if noise.ndim != 5 or [noise.shape[0], *noise.shape[2:]] != [B, *size]:
        raise ValueError(
            f"noise has shape {noise.shape}; accepted: a key, or {(B, 'frames', *size)}"
        )

    def cut(block: int) -> np.ndarray:
        end = (block + 1) * n
        if noise.shape[1] < end:
            raise ValueError(f"noise has {noise.shape[1]} frames; block {block} needs {end}")
        return noise[:, end - n : end]

    return cut
