"""Lock-step, scores, report.json and report.png, on a model that is only a cache."""

import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from qvg_jax.app.figure import write_figure
from qvg_jax.app.job import Arm, Block, Job, lockstep
from qvg_jax.app.metrics import PSNR_CAP, psnr, ssim, to_uint8
from qvg_jax.app.report import Record, aligned, table, write_json
from qvg_jax.cache.health import CacheFullError, NonFiniteError
from qvg_jax.cache.operations import KVCache, append, compress
from qvg_jax.codecs.base import identity
from tests.support.cache_model import SIZES, coarse

HEIGHT, WIDTH, FRAMES = 8, 12, 2  # of a picture; frames of a block
CODECS = {"bf16": identity(), "coarse": coarse()}


class State(NamedTuple):
    cache: KVCache
    offset: Any  # how much brighter this arm's frames are


def step(state, x):
    """K and V from the block's number; frames are the truth, brighter by the arm's offset."""
    key = jax.random.fold_in(jax.random.key(0), x["number"])
    lay = state.cache.layout
    k = jax.random.normal(key, (lay.layers, 1, lay.block_tokens, lay.heads, lay.head_dim))
    cache = compress(append(state.cache, k * x["size"], k, jnp.zeros((1, lay.block_tokens, 1))))
    offset = jnp.where(x["number"] < 3, 0.0, state.offset)
    return State(cache, state.offset), x["truth"][None] + offset


def truth(frame):
    return np.random.default_rng(frame).integers(20, 200, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def job(tour=6, frames=9, bad_block=None, names=("bf16", "coarse"), max_spans=6, seen=1.0):
    blocks = []
    for number in range(math.ceil((tour + frames) / FRAMES)):
        pictures = np.stack([truth(number * FRAMES + i) for i in range(FRAMES)])
        x = {
            "number": np.int32(number),
            "size": np.float32(np.nan if number == bad_block else 1),
            "truth": pictures.astype(np.float32) / 127.5 - 1,
        }
        blocks.append(Block(x, pictures, np.full(FRAMES, 1.0 if number < 5 else seen)))
    arms = []
    for i, name in enumerate(names):
        cache = KVCache.create(
            **SIZES,
            span_blocks=2,
            max_spans=max_spans,
            keep_recent=1,
            pos_dims=1,
            key_codec=CODECS[name],
            value_codec=CODECS[name],
        )
        arms.append(Arm(name=name, state=State(cache, jnp.float32(i * 0.1))))
    return Job(
        model="test",
        step=step,
        arms=tuple(arms),
        blocks=iter(blocks),
        cache=lambda state: state.cache,
        tour=tour,
        frames=frames,
        block_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        config={
            "seed": 3,
            "tour_frames": tour,
            "frames": frames,
            "cache": {"block_frames": FRAMES},
        },
    )


def recorded(**sizes):
    run = job(**sizes)
    record = Record(run)
    for made in lockstep(run):
        record.add(made)
    return record, record.report(fps=8)


@pytest.fixture(scope="module")
def finished():
    return recorded()


def test_lockstep_gives_every_arm_the_same_blocks_and_no_frame_too_many():
    made = list(lockstep(job(tour=6, frames=9)))
    assert [m.first for m in made] == list(range(0, 16, 2))
    assert [len(m.truth_FHW3) for m in made] == [2] * 7 + [1]
    for m in made:
        assert set(m.frames) == set(m.bytes) == set(m.seconds) == {"bf16", "coarse"}
        np.testing.assert_array_equal(m.frames["bf16"], m.truth_FHW3)
        assert m.frames["coarse"].shape == m.truth_FHW3.shape
        assert m.bytes["bf16"].tokens == m.bytes["coarse"].tokens


def test_lockstep_ends_before_the_bad_block_and_names_the_arm():
    made = []
    with pytest.raises(NonFiniteError, match="^bf16: K, V or a position of block 4 is not finite"):
        for block in lockstep(job(bad_block=4)):
            made.append(block)
    assert [m.first for m in made] == [0, 2, 4, 6]
    run = lockstep(job(max_spans=1, frames=40))
    with pytest.raises(CacheFullError, match="^bf16: 1 of 8 blocks found no room"):
        list(run)


def test_blocks_are_asked_for_one_at_a_time():
    asked = []
    run = job()

    def blocks(given=run.blocks):
        for block in given:
            asked.append(block)
            yield block

    run = lockstep(Job(**(vars(run) | {"blocks": blocks()})))
    next(run)
    next(run)
    assert len(asked) == 2


def test_psnr_and_ssim_are_what_they_are_called():
    a = truth(0)
    b = a + np.uint8(5)
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / 25), abs=1e-9)
    assert psnr(a, a) == PSNR_CAP and ssim(a, a) == pytest.approx(1.0)
    assert ssim(a, truth(1)) < 0.5 < ssim(a, b)
    one_off = a.copy()
    one_off[0, 0, 0] += 1
    assert psnr(a, one_off) < PSNR_CAP


def test_frames_become_bytes():
    x = np.array([-3.0, -1.0, 0.0, 1.0, 3.0, np.nan, np.inf], np.float32)
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 0, 255]
    levels = np.arange(256)
    np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1), levels)


def test_the_report_has_a_score_for_every_generated_frame(finished):
    _, report = finished
    bf16, other = report["arms"]["bf16"], report["arms"]["coarse"]
    assert set(bf16["frames"]) == {"psnr_vs_truth", "ssim_vs_truth"}
    keys = {f"{m}_vs_{r}" for m in ("psnr", "ssim") for r in ("truth", "bf16")}
    assert set(other["frames"]) == set(other["means"]) == keys
    assert all(len(v) == 9 for v in other["frames"].values())
    assert bf16["frames"]["psnr_vs_truth"] == [100.0] * 9
    # Brighter by 0.1 of [-1, 1] is 13 levels of 255: nothing saturates at 200.
    assert other["means"]["psnr_vs_truth"] == pytest.approx(10 * math.log10(255**2 / 169), abs=0.2)
    assert other["frames"]["psnr_vs_truth"] == other["frames"]["psnr_vs_bf16"]
    assert len(report["seen_in_tour"]) == 9


def test_bytes_and_bits_come_from_the_buffers(finished):
    _, report = finished
    bf16, other = report["arms"]["bf16"], report["arms"]["coarse"]
    assert bf16["bits_per_element"] == {"from_formats": 16.0, "from_buffers": 16.0}
    bits = other["bits_per_element"]
    assert bits["from_formats"] == bits["from_buffers"] < 16
    for arm in (bf16, other):
        for regions in (arm["bytes"]["in_use"], arm["bytes"]["allocated"]):
            assert regions["total"] == sum(v for k, v in regions.items() if k != "total")
        assert arm["bytes"]["in_use_after_block"][-1] == arm["bytes"]["in_use"]["total"]
        assert len(arm["bytes"]["in_use_after_block"]) == 8
    tokens = 8 * SIZES["block_tokens"]
    width = SIZES["layers"] * SIZES["heads"] * SIZES["head_dim"]
    assert bf16["bytes"]["tokens"] == tokens
    assert bf16["bytes"]["bf16_would_be"] == 2 * 2 * width * tokens
    ratio = bf16["bytes"]["in_use"]["total"] / other["bytes"]["in_use"]["total"]
    assert other["bytes"]["times_smaller"] == pytest.approx(ratio, abs=1e-4)


def test_frames_that_the_tour_did_not_show_do_not_count_against_the_truth():
    _, report = recorded(seen=0.5)  # from block 5 on: generated frames 5 to 9
    arm = report["arms"]["coarse"]
    assert report["seen_in_tour"] == [1.0] * 4 + [0.5] * 5
    first = arm["first_compressed_frame"]
    known = np.mean(arm["frames"]["psnr_vs_truth"][first:4])
    assert arm["means"]["psnr_vs_truth"] == pytest.approx(known, abs=1e-4)
    everywhere = np.mean(arm["frames"]["psnr_vs_bf16"][first:])
    assert arm["means"]["psnr_vs_bf16"] == pytest.approx(everywhere, abs=1e-4)
    _, report = recorded(seen=0.0, tour=10, frames=4)
    assert report["arms"]["coarse"]["means"]["psnr_vs_truth"] is None
    assert " -  " in table(report)


def test_means_are_over_frames_that_read_compressed_spans():
    """Sink, two blocks of a span and one recent: the span is encoded at the end of block 3."""
    _, report = recorded(tour=0, frames=20)
    for name in ("bf16", "coarse"):
        arm = report["arms"][name]
        assert arm["first_compressed_frame"] == 4 * FRAMES
        scores = arm["frames"]["psnr_vs_truth"]
        assert arm["means"]["psnr_vs_truth"] == pytest.approx(np.mean(scores[8:]), abs=1e-4)
    equal, after = np.split(np.array(arm["frames"]["psnr_vs_bf16"]), [6])
    assert (equal == PSNR_CAP).all() and after.max() < 40
    assert arm["means"]["psnr_vs_bf16"] == pytest.approx(np.mean(after[2:]), abs=1e-4)
    assert report["warnings"] == [] and "warning" not in table(report)


def test_a_run_that_compressed_nothing_says_so():
    _, report = recorded(tour=0, frames=8)  # the span is encoded behind the last block
    for arm in report["arms"].values():
        assert arm["first_compressed_frame"] is None and arm["means"]["psnr_vs_truth"] > 20
    assert report["arms"]["coarse"]["means"]["psnr_vs_bf16"] is None
    last = table(report).splitlines()[-1]
    assert last.startswith("warning: coarse: no frame was made from a compressed span")
    assert "all 8 frames" in last and "--frames" in last
    assert recorded(tour=0, frames=8, names=("bf16",))[1]["warnings"] == []


def test_timings_are_the_only_thing_that_varies(finished):
    _, again = recorded()
    first = dict(finished[1])
    assert set(first["timings"]["arms"]) == {"bf16", "coarse"}
    assert first["timings"]["arms"]["bf16"]["generated_frames_per_second"] > 0
    first.pop("timings")
    again.pop("timings")
    assert json.dumps(first) == json.dumps(again)


def test_json_is_valid_and_keeps_lists_on_a_line(finished, tmp_path):
    _, report = finished
    odd = report | {"text": "[ 1,\n 2]  [a]"}
    write_json(tmp_path / "r.json", odd)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == odd
    assert max(line.count(",") for line in text.splitlines()) >= 8
    with pytest.raises(ValueError):
        write_json(tmp_path / "r.json", {"x": float("nan")})
    assert json.loads((tmp_path / "r.json").read_text()) == odd
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_the_table_has_a_line_for_each_arm(finished):
    lines = table(finished[1]).splitlines()
    assert lines[0].split()[:2] == ["arm", "bits/element"]
    assert [line.split()[0] for line in lines[2:]] == ["bf16", "coarse"]
    assert lines[2].split()[1] == "16.000" and "1.00x" in lines[2]
    assert aligned([("a", "n", "w"), ("bb", "10", "x"), ("c", "5", "yy")]).splitlines() == [
        "a    n  w",
        "----------",
        "bb  10  x",
        "c    5  yy",
    ]


def test_the_figure_is_drawn_twice_alike(finished, tmp_path):
    record, report = finished
    for name in ("a.png", "b.png"):
        write_figure(tmp_path / name, report, record.strip)
    a, b = ((tmp_path / n).read_bytes() for n in ("a.png", "b.png"))
    assert a == b and b"Software" not in a
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert picture.shape[1] == 1650 and picture.shape[0] > 500
    # The strip's pixels are in it: some colour of the first generated frame.
    colour = record.strip[0][1]["truth"][0, 0]
    assert (picture == colour).all(-1).any()


def test_a_strip_spans_the_generated_frames(finished):
    record, _ = finished
    numbers = [n for n, _ in record.strip]
    assert numbers[0] == 0 and numbers[-1] == 8 and len(numbers) == 8
    np.testing.assert_array_equal(record.strip[0][1]["truth"], truth(6))
    short, report = recorded(frames=1, names=("bf16",))
    assert [n for n, _ in short.strip] == [0]


def test_the_figure_copes_with_one_arm_one_frame_and_unseen_places(tmp_path):
    for i, sizes in enumerate((dict(frames=1, names=("bf16",)), dict(seen=0.2))):
        record, report = recorded(**sizes)
        write_figure(tmp_path / f"{i}.png", report, record.strip)
        assert Image.open(tmp_path / f"{i}.png").size[0] == 1650
