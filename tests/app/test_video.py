"""mp4 and files: what is written reads back, and what fails leaves nothing half-done."""

import errno
import hashlib

import av
import numpy as np
import pytest

from qvg_jax.app.panels import GAP, Panel, Sheet
from qvg_jax.app.video import Mp4
from qvg_jax.files import replacing, writable_folder


def pictures(count=9, height=64, width=96):
    """A red field whose right half gets greener with time."""
    x = np.zeros((count, height, width, 3), np.uint8)
    x[..., 0] = 200
    x[:, :, width // 2 :, 1] = 10 * np.arange(count)[:, None, None]
    return x


def write(path, frames, fps=8):
    with Mp4(path, fps) as video:
        for frame in frames:
            video.add(frame)
    return video


def test_a_video_reads_back(tmp_path):
    frames = pictures()
    write(tmp_path / "v.mp4", frames)
    with av.open(str(tmp_path / "v.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate) == (9, 8)
        assert stream.duration * stream.time_base == 9 / 8
        decoded = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(stream)])
    assert decoded.shape == frames.shape
    inside = np.s_[:, 8:-8, list(range(8, 40)) + list(range(56, 88))]  # not at the edge of colours
    error = np.abs(decoded[inside].astype(int) - frames[inside])
    assert error.max() <= 6  # limited-range 4:2:0 and x264 at crf 16


def test_the_index_is_in_front_so_that_a_browser_can_start(tmp_path):
    write(tmp_path / "v.mp4", pictures())
    data = (tmp_path / "v.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_the_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, pictures())
    a, b = (hashlib.sha256((tmp_path / n).read_bytes()).digest() for n in ("a", "b"))
    assert a == b
    assert b"Lavf" not in (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_video_has_the_frames_so_far(tmp_path, error):
    with pytest.raises(error), Mp4(tmp_path / "v.mp4", 8) as video:
        for frame in pictures(5):
            video.add(frame)
        raise error
    with av.open(str(tmp_path / "v.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_no_frame_no_file(tmp_path):
    write(tmp_path / "v.mp4", [])
    assert list(tmp_path.iterdir()) == []


def noise(count):
    return np.random.default_rng(0).integers(0, 255, (count, 64, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize("room", [2_000, 40_000, 90_000])
def test_a_failing_disk_leaves_the_old_video(tmp_path, room):
    resource = pytest.importorskip("resource")
    write(tmp_path / "v.mp4", pictures(3))
    old = (tmp_path / "v.mp4").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # a real failed write
    try:
        with pytest.raises(OSError, match="v.mp4") as error:
            write(tmp_path / "v.mp4", noise(20))  # 106 kB
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert (tmp_path / "v.mp4").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_a_full_disk_is_reported_by_its_name(tmp_path):
    video = Mp4(tmp_path / "v.mp4", 8)
    video.add(pictures(1)[0])
    container = video._container

    class Full:
        def mux(self, packets):
            raise OSError(errno.ENOSPC, "No space left on device", "elsewhere")

        def close(self):
            container.close()

    video._container = Full()
    with pytest.raises(OSError, match="No space left on device.*v.mp4"):
        video.add(pictures(1)[0])
    video.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frame, message",
    [
        (np.zeros((64, 96, 3), np.float32), r"frame of float32 with shape \(64, 96, 3\)"),
        (np.zeros((64, 97, 3), np.uint8), r"frame of uint8 with shape \(64, 97, 3\); accepted"),
        (np.zeros((64, 96), np.uint8), r"shape \(64, 96\); accepted: uint8 \(H, W, 3\)"),
        (np.zeros((32, 96, 3), np.uint8), r"shape \(32, 96, 3\) after frames of \(64, 96, 3\)"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(tmp_path, frame, message):
    with Mp4(tmp_path / "v.mp4", 8) as video:
        video.add(pictures(1)[0])
        with pytest.raises(ValueError, match=message):
            video.add(frame)


@pytest.mark.parametrize("fps", [0, -1, 2.5, True])
def test_fps_is_a_whole_number(tmp_path, fps):
    with pytest.raises(ValueError, match="fps=.* is not accepted"):
        Mp4(tmp_path / "v.mp4", fps)


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as partial:
        partial.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_made_and_tried(tmp_path):
    assert writable_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            writable_folder(bad)


def sheet_of(panels, number, **sizes):
    sheet = Sheet(panels, 64, 96, **(dict(tour=4, frames=6) | sizes))
    frames = pictures(panels)
    drawn = sheet.draw([Panel(f, f"arm {i}", "note") for i, f in enumerate(frames)], number)
    return sheet, frames, drawn


@pytest.mark.parametrize("panels", [1, 2, 3, 5, 9])
def test_a_sheet_shows_every_pixel_as_a_square(panels):
    sheet, frames, drawn = sheet_of(panels, 0)
    assert drawn.shape == (sheet.height, sheet.width, 3) and drawn.dtype == np.uint8
    assert sheet.height % 2 == sheet.width % 2 == 0
    assert sheet.width <= 1600 or sheet.scale == 1
    for i, frame in enumerate(frames):
        left, top, right, bottom = sheet.box(i)
        big = frame.repeat(sheet.scale, 0).repeat(sheet.scale, 1)
        np.testing.assert_array_equal(drawn[top:bottom, left:right], big)


def test_a_sheet_names_its_panels_and_its_time():
    sheet, _, drawn = sheet_of(2, 0)
    left, top, right, bottom = sheet.box(1)
    background = drawn[0, 0]
    assert (drawn[:top, left:right] != background).any()
    assert (drawn[:top, right : right + GAP] == background).all()  # labels stay over their panel
    foot = lambda number: sheet_of(2, number)[2][bottom:]  # noqa: E731
    assert (foot(3) != foot(4)).any() and (foot(4) != foot(9)).any()


def test_a_long_title_is_made_to_fit():
    sheet = Sheet(2, 64, 96, tour=4, frames=6)
    frame = pictures(1)[0]
    drawn = sheet.draw(
        [Panel(frame, "qvg:num_centroids=64:group=32: 2.52 bits per element")] * 2, 0
    )
    _, top, right, _ = sheet.box(0)
    assert (drawn[:top, right : right + GAP] == drawn[0, 0]).all()
    with pytest.raises(ValueError, match="1 panels for a sheet of 2"):
        sheet.draw([Panel(frame, "")], 0)


def test_the_same_frames_give_the_same_bytes_every_time(tmp_path):
    """Panels on a dark ground, which x264 with its macroblock tree wrote in ten ways out of 25."""
    draw = np.random.default_rng(0)
    frames = np.full((6, 230, 420, 3), 18, np.uint8)
    for left in (12, 216):
        coarse = draw.integers(0, 255, (6, 16, 24, 3), dtype=np.uint8)
        frames[:, 58:186, left : left + 192] = coarse.repeat(8, 1).repeat(8, 2)
    written = set()
    for i in range(12):
        draw.integers(0, 255, (50, 400, 400), dtype=np.uint8)  # leaves something in free memory
        with Mp4(tmp_path / f"{i}.mp4", 16) as video:
            for frame in frames:
                video.add(frame)
        written.add((tmp_path / f"{i}.mp4").read_bytes())
    assert len(written) == 1
