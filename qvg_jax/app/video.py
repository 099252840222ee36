"""mp4 files, written frame by frame: H.264 that plays in a browser."""

import contextlib
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import UInt8

from qvg_jax.errors import UserError
from qvg_jax.files import synchronize

__all__ = ["Mp4"]

_BT709 = 1  # the number of BT.709 in H.264's tables of primaries and transfer functions


class Mp4:
    """A video file that is valid at whatever frame it ends.

        with Mp4("video.mp4", fps=8) as video:
            for frame_HW3 in frames:
                video.add(frame_HW3)

    Frames go to a temporary file beside `path`. When the block ends, also by an exception such as
    Ctrl-C, the file is finished with the frames so far and takes the name `path`. If it cannot be
    finished (a full disk), or if there was no frame, it is removed, and an older file stays.

    H.264, yuv420p in BT.709, index in front (`+faststart`). The same frames give the same bytes:
    one encoder thread, no dates.

    With `growing` the file has its name from the first frame on and can be played while it grows,
    also if the process is killed: a fragmented mp4, each frame a fragment of its own and written
    at once. It replaces an older file at once, and is about as large; only a broken one stays too.
    """

    def __init__(self, path: str | os.PathLike, fps: int, *, crf: int = 16, growing: bool = False):
        """Opens nothing yet: the first frame decides the size.

        Args:
            path: where the video appears.
            fps: frames a second, at least 1.
            crf: x264's constant rate factor; lower is better and larger.
            growing: see above.

        Raises:
            ValueError: `fps` is not a whole number of at least 1.
        """
        if isinstance(fps, bool) or not isinstance(fps, int) or fps < 1:
            raise UserError(f"fps={fps!r} is not accepted: give a whole number of at least 1")
        self.path = Path(path)
        self.frames = 0
        self.growing = growing
        self._fps, self._crf = fps, crf
        self._partial = self.path if growing else self.path.with_name(self.path.name + ".partial")
        self._container = self._stream = None
        self._broken = False

    def add(self, frame_HW3: UInt8[np.ndarray, "H W 3"]) -> None:
        """Appends a frame.

        Raises:
            ValueError: not uint8 (H, W, 3), an odd side, or another size than the first frame.
            OSError: it could not be written; the file is given up.
        """
        frame_HW3 = np.ascontiguousarray(frame_HW3)
        shape = frame_HW3.shape
        if (
            frame_HW3.dtype != np.uint8
            or len(shape) != 3
            or shape[2] != 3
            or shape[0] % 2
            or (shape[1] % 2)
        ):
            raise ValueError(
                f"frame of {frame_HW3.dtype} with shape {shape}; accepted: uint8 (H, W, 3), "
                "H and W even"
            )
        if self._stream is not None and shape[:2] != (self._stream.height, self._stream.width):
            first = self._stream.height, self._stream.width, 3
            raise ValueError(f"frame with shape {shape} after frames of {first}; accepted: those")
        try:
            if self._stream is None:
                self._open(*shape[:2])
            picture = av.VideoFrame.from_ndarray(frame_HW3, "rgb24").reformat(
                format="yuv420p",
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                dst_colorspace=Colorspace.ITU709,
            )
            picture.pts = self.frames
            self._container.mux(self._stream.encode(picture))
        except OSError as error:
            self._broken = True
            raise _named(error, self.path) from error
        self.frames += 1

    def _open(self, height: int, width: int) -> None:
        # bitexact: no version of the muxer in the file.
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        if self.growing:
            options["movflags"] = "+frag_every_frame+empty_moov+default_base_moof"
            options["flush_packets"] = "1"
        # "file:", for FFmpeg takes what is in front of another colon as a protocol.
        where = f"file:{self._partial}"
        self._container = av.open(where, "w", format="mp4", options=options)
        stream = self._container.add_stream("libx264", rate=self._fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # A key frame every two seconds, so that a player can jump.
        stream.options = {"crf": str(self._crf), "preset": "veryfast", "g": str(2 * self._fps)}
        # x264's macroblock tree reads memory that nobody wrote: some pictures come out as other
        # bytes on every run. Without it files are a few percent larger.
        stream.options |= {"x264-params": "mbtree=0"}
        if self.growing:
            stream.options |= {"tune": "zerolatency"}  # no frame waits for the ones after it
        context = stream.codec_context
        context.time_base = Fraction(1, self._fps)
        context.thread_count = 1  # how x264 cuts its work depends on the number of threads
        context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        context.color_primaries = context.color_trc = _BT709
        self._stream = stream

    def close(self) -> None:
        """Finishes the file and gives it its name; does nothing if there is nothing to finish.

        Raises:
            OSError: it could not be finished; nothing is left of it.
        """
        container, self._container = self._container, None
        if container is None:
            return
        try:
            if self._broken:
                with contextlib.suppress(OSError):  # the first error is the one to report
                    container.close()
                return
            container.mux(self._stream.encode(None))
            container.close()
            self._check()
            synchronize(self._partial)
            if not self.growing:
                os.replace(self._partial, self.path)
        except OSError as error:
            raise _named(error, self.path) from error
        finally:
            if not self.growing:
                self._partial.unlink(missing_ok=True)

    def _check(self) -> None:
        # The muxer does not report every failed write: what it wrote is read back.
        try:
            with av.open(f"file:{self._partial}") as file:
                stored = sum(p.size > 0 for p in file.demux(video=0))
        except av.error.InvalidDataError as error:
            raise OSError("nothing of it could be read back") from error
        if stored != self.frames:
            raise OSError(f"only {stored} of {self.frames} frames could be read back")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _named(error: OSError, path: Path) -> OSError:
    """The error with the name of the file that the user asked for."""
    return OSError(error.errno or 0, error.strerror or str(error), str(path))
