"""Which old frames or spans to look at: those whose cameras saw what the next cameras will see.

Two cameras are as similar as their views overlap. The overlap is counted on random points around
the asking camera; they are drawn once for a video, so that all comparisons share them.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

RADIUS = 8.0  # world units: how far a camera sees
HALF_WIDTH, HALF_HEIGHT = 30.0, 17.5  # degrees: half the field of view


def ball_points(
    rng: np.random.Generator, count: int = 50_000, radius: float = RADIUS
) -> Float[np.ndarray, "N 3"]:
    """Uniform points in a ball around the origin: r = R u^(1/3), theta = arccos(1 - 2 u'')."""
    u, around, up = rng.random((3, count))
    r, phi, theta = radius * np.cbrt(u), 2 * np.pi * around, np.arccos(1 - 2 * up)
    flat = r * np.sin(theta)
    return np.stack([flat * np.cos(phi), flat * np.sin(phi), r * np.cos(theta)], -1)


def _angles(v_x3: np.ndarray) -> np.ndarray:
    """Azimuth and elevation in degrees, [..., 2]."""
    x, y, z = np.moveaxis(v_x3, -1, 0)
    return np.degrees(np.stack([np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))], -1))


def in_view(
    points_N3: Float[np.ndarray, "N 3"], c2w_44: Float[np.ndarray, "4 4"]
) -> Bool[np.ndarray, "N"]:
    """Which points lie in a camera's field of view, by azimuth and elevation about its centre."""
    away = _angles(points_N3 - c2w_44[:3, 3]) - _angles(c2w_44[:3, 2])
    away = np.abs((away + 180) % 360 - 180)
    return (away < (HALF_WIDTH, HALF_HEIGHT)).all(-1)


def similarity(
    points_N3: Float[np.ndarray, "N 3"],
    query_w2c_44: Float[np.ndarray, "4 4"],
    history_w2c_44: Float[np.ndarray, "4 4"],
) -> float:
    """Share of the points in the query's view that the history's camera sees and is near to.

    Args:
        points_N3: points about the origin; they are placed about the query's camera.
        query_w2c_44, history_w2c_44: world to camera.
    """
    return _overlap(_ahead(points_N3), query_w2c_44, history_w2c_44)


def _ahead(points_N3: np.ndarray) -> np.ndarray:
    """The points that a camera sees from where it is: the same for every query."""
    return points_N3[in_view(points_N3, np.eye(4))]


def _overlap(ahead_N3: np.ndarray, query_w2c_44: np.ndarray, history_w2c_44: np.ndarray) -> float:
    if not len(ahead_N3):
        return 0.0
    c2w = query_w2c_44 @ np.linalg.inv(history_w2c_44)  # the history's camera as the query sees it
    near = np.linalg.norm(ahead_N3 - c2w[:3, 3], axis=-1) < RADIUS
    return float((in_view(ahead_N3, c2w) & near).mean())


def select_frames(
    points_N3: Float[np.ndarray, "N 3"],
    w2c_F44: Float[np.ndarray, "F 4 4"],
    first: int,
    *,
    memory_frames: int = 16,
    recent_frames: int = 12,
    block_frames: int = 4,
) -> Int[np.ndarray, "S"]:
    """The frames that the block which starts at frame `first` looks back at.

    They are the recent frames and the clips whose cameras overlap most with the block's.

    The distance of a clip is the mean over the block's cameras q of 1 - similarity(q, .),
    averaged over the clip's first frame and the one half a clip later; ties go to the older clip.

    Args:
        points_N3: from `ball_points`.
        w2c_F44: world to camera, of all frames up to the end of the block if they are known.
        first: number of frames there are.
        memory_frames: most frames to return; with no more than that, all are taken.
        recent_frames: newest frames, always taken.
        block_frames: frames of a block, and of a clip; clips start at its multiples.

    Returns:
        Sorted frame numbers.

    Raises:
        ValueError: numbers of frames that clips cannot make up, or a path that ends before
            `first`.
    """
    check_window(memory_frames, recent_frames, block_frames)
    if not 0 <= first < len(w2c_F44):
        raise ValueError(
            f"first={first} is outside the camera path of {len(w2c_F44)} frames: the next "
            "block's cameras decide what is remembered"
        )
    if first < memory_frames:
        return np.arange(first)
    ahead_N3, queries = _ahead(points_N3), w2c_F44[first : first + block_frames]
    clips = np.arange(0, first - recent_frames, block_frames)
    distance = [_clip_distance(ahead_N3, queries, w2c_F44, s, block_frames) for s in clips]
    wanted = (memory_frames - recent_frames) // block_frames
    taken = clips[np.argsort(distance, kind="stable")[:wanted]]
    old = (taken[:, None] + np.arange(block_frames)).ravel()
    return np.union1d(old, np.arange(first - recent_frames, first))


def select_spans(
    points_N3: Float[np.ndarray, "N 3"],
    w2c_F44: Float[np.ndarray, "F 4 4"],
    queries_Q44: Float[np.ndarray, "Q 4 4"],
    count: int,
    *,
    span_frames: int,
    block_frames: int = 4,
) -> tuple[int, ...]:
    """Numbers of the spans whose cameras overlap most with those of a block, at most `count`.

    The distance of a span is that of its closest clip, as `select_frames` has it; ties go to the older
    span.

    Args:
        points_N3: from `ball_points`.
        w2c_F44: world to camera, of the frames of all spans, one after another.
        queries_Q44: world to camera, of the block that is to read.
        count: how many.
        span_frames: frames of a span, whole blocks.
        block_frames: frames of a block, and of a clip.

    Returns:
        Rising numbers.
    """
    starts = range(0, len(w2c_F44), span_frames)
    if len(starts) <= count:
        return tuple(range(len(starts)))
    ahead_N3 = _ahead(points_N3)
    distance = [
        min(
            _clip_distance(ahead_N3, queries_Q44, w2c_F44, clip, block_frames)
            for clip in range(start, start + span_frames, block_frames)
        )
        for start in starts
    ]
    return tuple(sorted(int(i) for i in np.argsort(distance, kind="stable")[:count]))


def _clip_distance(
    ahead_N3: np.ndarray,
    queries_Q44: np.ndarray,
    w2c_F44: np.ndarray,
    start: int,
    block_frames: int,
) -> float:
    """Distance of the clip that begins at a frame from the cameras of a block."""
    seen = (start, start + block_frames // 2)
    return np.mean([1 - _overlap(ahead_N3, q, w2c_F44[i]) for q in queries_Q44 for i in seen])


def check_window(memory_frames: int, recent_frames: int, block_frames: int) -> None:
    """Raises ValueError unless a context is made of whole blocks, the recent ones among them."""
    whole = memory_frames % block_frames == 0 == recent_frames % block_frames
    if not whole or not 0 < recent_frames <= memory_frames:
        raise ValueError(
            f"memory_frames={memory_frames} and recent_frames={recent_frames} must be multiples "
            f"of the {block_frames} frames of a block, with 0 < recent_frames <= memory_frames"
        )
