"""Pictures and videos as a viewer shows them, whatever the file's name and wherever it points."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from models.runs.pictures import pictures, upright
from qvg_jax.app.video import Mp4
from qvg_jax.errors import UserError

HEIGHT, WIDTH = 32, 48


def corners():
    """Red at the top left, green beside it, blue below."""
    x = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    x[:16, :24, 0] = x[:16, 24:, 1] = x[16:, :24, 2] = 255
    return x


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_is_what_a_viewer_shows(orientation, suffix, tmp_path):
    exif, path = Image.Exif(), tmp_path / f"a.{suffix}"
    exif[0x0112] = orientation
    Image.fromarray(corners()).save(path, exif=exif, quality=95)
    with Image.open(path) as image:
        want = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), int)
    got = np.asarray(next(upright(path)), int)
    assert got.shape == want.shape and np.abs(got - want).mean() < 5
    assert next(pictures(path, 16, 16)).size == (16, 16)


def with_matrix(path, *matrix):
    """Writes a, b, c, d of the display matrix into the header of an mp4's track."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (n * 2**16 for n in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "matrix, turns",
    [((1, 0, 0, 1), 0), ((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
)
def test_a_video_is_turned_as_its_display_matrix_says(matrix, turns, tmp_path):
    path = tmp_path / "a.mp4"
    with Mp4(path, 8) as video:
        video.add(corners())
        video.add(corners())
    with_matrix(path, *matrix)
    frames = [np.asarray(p, int) for p in upright(path)]
    want = np.rot90(corners(), turns)  # counterclockwise: (0, 1, -1, 0) is a quarter clockwise
    assert len(frames) == 2 and frames[0].shape == want.shape
    assert np.abs(frames[0] - want).mean() < 12


@pytest.mark.parametrize("name", ["12:30.png", "a%d.png", "http:", "x y.png"])
def test_a_name_is_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(corners()).save(name, format="png")
    np.testing.assert_array_equal(np.asarray(next(upright(name))), corners())


def test_a_video_is_written_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Mp4("12:30.mp4", 8) as video:
        video.add(corners())
    assert [p.name for p in tmp_path.iterdir()] == ["12:30.mp4"]


def test_what_is_refused(tmp_path):
    Image.fromarray(corners()).save(tmp_path / "a.png")
    texts = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{tmp_path}/a.png\n"
        "#EXT-X-ENDLIST\n",
        "list.txt": f"ffconcat version 1.0\nfile {tmp_path}/a.png\n",
        "empty.png": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}: not readable as an image or a video"):
            next(upright(tmp_path / name))
    for side in (12_000, 20_000):
        Image.new("1", (side, side)).save(tmp_path / "large.png")
        with pytest.raises(UserError, match="large.png.* pixels"):
            next(upright(tmp_path / "large.png"))
