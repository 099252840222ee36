"""A walk through a generated world, one block for each action, under a codec that can be changed.

    walk = Walk(world, seed=3, codec="midrise-k1v3")
    for seen in walk.tour(): ...          # real frames, so that there is something to remember
    seen = walk.step("w")                 # the block's frames, and how large the cache is now
    walk.switch("qvg")                    # the memory so far, in other codes
    walk.save("walk.mp4")

Nothing here knows of a page or a thread: `qvg play` drives it, and so can a notebook.
"""

import collections
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from qvg_jax.app.metrics import to_uint8
from qvg_jax.app.play.places import Box
from qvg_jax.app.video import Mp4
from qvg_jax.cache.health import (
    CacheFullError,
    NonFiniteError,
    cache_bytes,
    raise_if_not_finite,
)
from qvg_jax.cache.recode import recode
from qvg_jax.cache.state import KVCache
from qvg_jax.codecs.base import Codec
from qvg_jax.loop import Stream, stream

__all__ = ["Meter", "Seen", "Walk", "World", "write_clip"]

CLIP_BYTES = 256 << 20  # of frames that a walk keeps for `save`; the oldest go first
CLIP_WIDTH = 768  # small frames are enlarged to about this many pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """What a model brings along to be walked in.

    Attributes:
        model: its name.
        step: `step(state, x) -> (state, frames)` for `stream`; frames [1, F, H, W, 3] in [-1, 1].
        actions: the names that `Walk.step` accepts.
        keys: names of keys as browsers give them, letters in lower case, and their actions.
        begin: `begin(seed, codec) -> state` with an empty cache. The cache must not fill up:
            `overflow="drop"`.
        inputs: `inputs(seed, actions) -> xs`, endless: `tour_blocks` blocks of real frames, then
            one block for each action that it takes from the iterator.
        codec: codecs for K and V by the name that a user gives; ValueError if there are none.
        cache, with_cache: the cache in a state, and a state with another one.
        tour_blocks: blocks of real frames in the beginning; may be 0.
        block_frames, height, width: of a block and a frame.
        fps: at which frames should be seen.
        place: `place(x) -> (x, y)` where the block ends, in any unit, north at small y.
        before: `before(state) -> hook`, made anew for each cache, and the hook is the `before` of `stream`;
            None for nothing.
        views: `views(x) -> boxes`, the ground that each frame of the block shows, in the unit of
            `place`; None if that means nothing.
        toward: `toward(view, goal) -> action` that brings one view nearer to another, None where
            they are about the same; None if there is no way back.
        truth: `truth(seed, x) -> uint8 [F, H, W, 3]`, the frames a perfect memory would show;
            None if nobody knows.
    """

    model: str
    step: Any
    actions: Sequence[str]
    keys: Mapping[str, str]
    begin: Callable[[int, tuple[Codec, Codec]], Any]
    inputs: Callable[[int, Iterator[str]], Iterator[Any]]
    codec: Callable[[str], tuple[Codec, Codec]]
    cache: Callable[[Any], KVCache]
    with_cache: Callable[[Any, KVCache], Any]
    tour_blocks: int
    block_frames: int
    height: int
    width: int
    fps: int
    place: Callable[[Any], tuple[float, float]]
    before: Callable[[Any], Callable[[Any, Any], Any]] | None = None
    views: Callable[[Any], Sequence[Box]] | None = None
    toward: Callable[[Box, Box], str | None] | None = None
    truth: Callable[[int, Any], UInt8[np.ndarray, "F H W 3"]] | None = None


class Meter(NamedTuple):
    """The size of the memory at one moment. Bytes are those of the device's buffers that are in use."""

    bytes: int
    bf16_bytes: int  # K and V of the same tokens in bf16
    span_bits: float  # per element of a compressed span
    frames: int  # that are remembered
    forgotten: int  # frames that were, and made room
    capacity: int  # frames that fit
    sink: int = 0  # of them the first ones, which are never forgotten
    full_times: float = 1.0  # `times_smaller` of the full memory

    @property
    def times_smaller(self) -> float:
        """bf16_bytes / bytes; a little below 1 for bf16 itself, whose positions count, too."""
        return self.bf16_bytes / max(1, self.bytes)

    @property
    def bits(self) -> float:
        """Bits per element of everything that is kept: spans, sink, window, positions."""
        return 16 / self.times_smaller if self.bf16_bytes else 16.0


class Seen(NamedTuple):
    """One block of a walk."""

    number: int  # of the block, the tour included
    action: str | None  # None in the tour
    frames_FHW3: UInt8[np.ndarray, "F H W 3"]
    meter: Meter
    seconds: float  # from the action to the frames on the host
    place: tuple[float, float]
    x: Any  # what the step read; `World.truth` takes it


class Walk:
    """One world, one memory, one path; not for several threads at once.

    The same seed, actions and switches give the same frames, and without a switch they are those
    of `qvg generate` with the same tour and actions.
    """

    def __init__(self, world: World, *, seed: int = 0, codec: str = "bf16"):
        """Makes an empty cache; nothing is compiled yet.

        Raises:
            ValueError: a codec that the world does not accept.
        """
        self.world = world
        self._set_codec(codec, world.codec(codec))
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Forgets everything and begins in front of the tour of another world, or of the same."""
        world = self.world
        self.seed = seed
        self.blocks = 0
        self.broken: str | None = None  # why there is no way on
        keep = max(1, CLIP_BYTES // (3 * world.height * world.width))
        self._clip = collections.deque(maxlen=keep)
        self._action: str | None = None
        self._x: Any = None
        self._inputs = self._noticed(world.inputs(seed, iter(lambda: self._action, None)))
        self._stream = self._streamed(world.begin(seed, self._codecs))

    def tour(self) -> Iterator[Seen]:
        """Yields the rest of the real frames, block by block."""
        while self.blocks < self.world.tour_blocks:
            yield self._next(None)

    def step(self, action: str) -> Seen:
        """One block further; in front of the tour it takes the tour first.

        Raises:
            ValueError: an unknown action; the walk goes on.
            NonFiniteError, CacheFullError: the cache went bad. There is no way on but `restart`,
                and every later step says so again; the frames so far can be saved.
        """
        if action not in self.world.actions:
            accepted = ", ".join(self.world.actions)
            raise ValueError(f"action={action!r} is not known; accepted: {accepted}")
        for _ in self.tour():
            pass
        return self._next(action)

    def switch(self, codec: str) -> Meter:
        """Another codec from here on, also for what is remembered: spans are decoded and encoded again.

        So the meter shows at once what the codec makes of the whole memory. What the codec before
        has lost stays lost. Switching to the codec that is in use changes nothing. The first
        switch to a codec waits for the compiler; the blocks after it do not.

        Raises:
            ValueError: a codec that is not accepted; nothing has changed.
            NonFiniteError: the walk was broken before.
        """
        codecs = self.world.codec(codec)
        self._check()
        state = self._stream.state
        cache = recode(self.world.cache(state), *codecs)
        self._set_codec(codec, codecs)
        self._stream = self._streamed(self.world.with_cache(state, cache))
        if self._x is not None:
            self._stream.warm(self._x)
        return self.meter()

    def meter(self) -> Meter:
        """How large the memory is now."""
        cache = self.world.cache(self._stream.state)
        size, lay, n = cache_bytes(cache), cache.layout, self.world.block_frames
        of_block = 4 * lay.layers * lay.batch * lay.heads * lay.head_dim * lay.block_tokens
        return Meter(
            bytes=size.in_use.total,
            bf16_bytes=size.bf16,
            span_bits=lay.span_bits,
            frames=size.tokens // lay.block_tokens * n,
            forgotten=int(cache.dropped_blocks) * n,
            capacity=lay.capacity_blocks * n,
            sink=lay.sink_blocks * n,
            full_times=of_block * lay.capacity_blocks / size.allocated.total,
        )

    def frames(self) -> list[UInt8[np.ndarray, "H W 3"]]:
        """All frames, tour first; of a very long walk the newest (256 MiB of them)."""
        return list(self._clip)

    def save(self, path: str | os.PathLike) -> int:
        """Writes `frames` as mp4, small ones enlarged, and returns how many there were.

        Raises:
            ValueError: there is no frame yet.
            OSError: the file could not be written.
        """
        return write_clip(path, self.frames(), self.world.fps)

    def _next(self, action: str | None) -> Seen:
        self._check()
        self._action = action
        begin = time.perf_counter()
        try:
            frames = next(self._stream)
            raise_if_not_finite(f"frames of block {self.blocks}", frames)
            frames_FHW3 = to_uint8(frames[0])
        except (NonFiniteError, CacheFullError) as error:
            self.broken = str(error)
            raise
        seconds = time.perf_counter() - begin
        self._clip.extend(frames_FHW3)
        number, self.blocks = self.blocks, self.blocks + 1
        place = self.world.place(self._x)
        return Seen(number, action, frames_FHW3, self.meter(), seconds, place, self._x)

    def _check(self) -> None:
        if self.broken:
            raise NonFiniteError(f"the walk has ended: {self.broken}; restart it")

    def _set_codec(self, name: str, codecs: tuple[Codec, Codec]) -> None:
        self.codec, self._codecs = name, codecs

    def _noticed(self, xs: Iterator[Any]) -> Iterator[Any]:
        for x in xs:
            self._x = x
            yield x

    def _streamed(self, state: Any) -> Stream:
        before = None if self.world.before is None else self.world.before(state)
        return stream(self.world.step, state, self._inputs, before=before)


def write_clip(
    path: str | os.PathLike, frames: Sequence[UInt8[np.ndarray, "H W 3"]], fps: int
) -> int:
    """Writes frames as mp4, enlarged by a whole number to about 768 pixels (a pixel is a square).

    Returns:
        How many frames there were.

    Raises:
        ValueError: none.
        OSError: the file could not be written.
    """
    if not frames:
        raise ValueError("there is no frame to save yet")
    scale = max(1, CLIP_WIDTH // frames[0].shape[1])
    with Mp4(path, fps) as video:
        for frame_HW3 in frames:
            video.add(frame_HW3.repeat(scale, 0).repeat(scale, 1))
    return len(frames)
