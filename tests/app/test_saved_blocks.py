"""Blocks on disk: read back as written, and nothing else."""

import json
import logging

import numpy as np
import pytest

from qvg_jax.app.saved_blocks import SavedBlocks
from qvg_jax.errors import UserError

SHAPE = (2, 3)
REQUEST = {"seed": 1, "sampler": {"steps": 4}}
BLOCKS = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)


def saved(folder, request=REQUEST, **which):
    return SavedBlocks(folder, request, SHAPE, np.float32, **which)


def written(folder, request=REQUEST):
    blocks = saved(folder, request)
    for i, block in enumerate(BLOCKS):
        blocks.add("a:b=1", i, block)
    return blocks


def test_blocks_come_back(tmp_path):
    written(tmp_path)
    np.testing.assert_array_equal(saved(tmp_path, resume=True).read("a:b=1"), BLOCKS)
    assert saved(tmp_path, resume=True).read("another").shape == (0, *SHAPE)
    np.testing.assert_array_equal(
        np.fromfile(next(tmp_path.glob("*.bin")), np.float32), BLOCKS.ravel()
    )


@pytest.mark.parametrize("suffix", ["bin", "sums"])
@pytest.mark.parametrize("left", range(1, 40, 6))
def test_a_torn_tail_is_cut(tmp_path, caplog, suffix, left):
    written(tmp_path)
    file = next(tmp_path.glob(f"*.{suffix}"))
    each = len(file.read_bytes()) // len(BLOCKS)
    file.write_bytes(file.read_bytes()[:left])
    with caplog.at_level(logging.WARNING):
        again = saved(tmp_path, resume=True).read("a:b=1")
    np.testing.assert_array_equal(again, BLOCKS[: left // each])
    assert suffix == "bin" and not left % each or "cut off or damaged" in caplog.text


@pytest.mark.parametrize("where", [0, 24, 50, 95])
def test_a_rotten_block_and_the_ones_after_it_are_left_out(tmp_path, where):
    written(tmp_path)
    file = next(tmp_path.glob("*.bin"))
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    blocks = saved(tmp_path, resume=True)
    np.testing.assert_array_equal(blocks.read("a:b=1"), BLOCKS[: where // 24])
    for i in range(where // 24, len(BLOCKS)):
        blocks.add("a:b=1", i, BLOCKS[i])
    np.testing.assert_array_equal(saved(tmp_path, resume=True).read("a:b=1"), BLOCKS)


def test_blocks_of_another_run_are_none_of_ours(tmp_path):
    """As after two processes have written into one folder: the request of one, a file of the other."""
    written(tmp_path / "one")
    written(tmp_path / "two", request=REQUEST | {"seed": 2})
    for kind in ("bin", "sums"):
        file = next((tmp_path / "two").glob(f"*.{kind}"))
        (tmp_path / "one" / file.name).write_bytes(file.read_bytes())
    assert len(saved(tmp_path / "one", resume=True).read("a:b=1")) == 0
    first = next((tmp_path / "two").glob("*.bin"))
    first.rename(first.with_name("other.bin"))  # of another arm
    first.with_suffix(".sums").rename(first.with_name("other.sums"))
    assert len(saved(tmp_path / "two", REQUEST | {"seed": 2}, resume=True).read("other")) == 0


def test_another_request_is_named(tmp_path):
    written(tmp_path)
    other = REQUEST | {"seed": 2}
    prompt = "a" * 100
    for before, now, said in (
        ({"steps": 5}, {"steps": 4}, r"made with sampler.steps=5, now it is 4; give"),
        ({"steps": 5, "shift": 1}, {"steps": 5}, "made with sampler.shift, now without it;"),
        ({"steps": 5}, {"steps": 5, "shift": 1}, "made with no sampler.shift, now with it;"),
        (
            f"{prompt}b",
            f"{prompt}c",
            r"made with sampler=\.\.\.a{40}b', now it is \.\.\.a{40}c';",
        ),
    ):
        written(tmp_path / said[:30], REQUEST | {"sampler": before})
        with pytest.raises(UserError, match=said):
            saved(tmp_path / said[:30], REQUEST | {"sampler": now}, resume=True)
    with pytest.raises(UserError, match="made with seed=1, now it is 2"):
        saved(tmp_path, other, resume=True)
    with pytest.raises(UserError, match="unfinished run, made with seed=1.*--restart"):
        saved(tmp_path, other)
    with pytest.raises(UserError, match="first 4 blocks of this run, interrupted.*--resume"):
        saved(tmp_path)
    with pytest.raises(UserError, match="exclude each other"):
        saved(tmp_path, resume=True, restart=True)
    blocks = saved(tmp_path, other, restart=True)
    assert len(blocks.read("a:b=1")) == 0
    assert len(saved(tmp_path, resume=True).read("a:b=1")) == 4  # nothing was replaced yet
    blocks.add("a:b=1", 0, BLOCKS[0])
    assert len(saved(tmp_path, other, resume=True).read("a:b=1")) == 1


def test_a_finished_run_may_be_replaced_or_go_on(tmp_path):
    written(tmp_path).finish()
    saved(tmp_path)
    longer = saved(tmp_path, resume=True)
    longer.add("a:b=1", 4, BLOCKS[0])
    with pytest.raises(UserError, match="first 5 blocks"):
        saved(tmp_path)
    longer.finish(keep=False)
    assert not tmp_path.exists()
    saved(tmp_path).finish()  # nothing was written


def test_other_versions_are_said(tmp_path, caplog):
    written(tmp_path)
    stored = json.loads((tmp_path / "request.json").read_text())
    stored["versions"]["jax"] = "0.0.1"
    (tmp_path / "request.json").write_text(json.dumps(stored))
    with caplog.at_level(logging.WARNING):
        assert len(saved(tmp_path, resume=True).read("a:b=1")) == len(BLOCKS)
    assert "0.0.1" in caplog.text and "may differ" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"seed": 1}', '{"format": 2, "request": []}', "\xff", "[" * 9999]
)
def test_a_request_that_cannot_be_read_is_said(tmp_path, text):
    written(tmp_path)
    (tmp_path / "request.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="request.json is not readable.*--restart"):
        saved(tmp_path, resume=True)
    assert len(saved(tmp_path, restart=True).read("a:b=1")) == 0


def test_nothing_to_go_on_from_is_the_beginning(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        blocks = saved(tmp_path / "new", resume=True)
        assert len(blocks.read("a:b=1")) == 0
    assert "from the beginning" in caplog.text
    blocks.add("a:b=1", 0, BLOCKS[0])
    assert len(saved(tmp_path / "new", resume=True).read("a:b=1")) == 1
