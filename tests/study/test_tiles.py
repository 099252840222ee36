"""The loss of reading a share of the tiles: planted histories, the rule of `tile_attention`, and the benchmark."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tiles as benchmark
from qvg_jax.attention.tiles import TileRule, tile_attention
from qvg_jax.errors import UserError
from qvg_jax.study.capture import Captured, save_captured
from qvg_jax.study.tiles import CHOICES, TileGrids, measure_tiles
from qvg_jax.study.tune import Bench

L, H, T, Q, D = 2, 2, 64, 8, 16
GRIDS = TileGrids(queries=(1, 2, 4), keys=(8, 2, 4), query_tile=(1, 2, 2), key_tile=(2, 2, 2))
STILL = np.zeros((2, 1, T, 0), np.float32), np.zeros((2, 1, Q, 0), np.float32)


def random_capture(seed=0, own=False):
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, L, 1, H, T + Q, D), np.float32)
    q = rng.standard_normal((L, 1, 2 * H, Q, D), np.float32)  # two query heads to a key head
    parts = (k[..., :T, :], v[..., :T, :], q, *STILL, np.arange(L))
    mine = dict(own_k_LBHQD=k[..., T:, :], own_v_LBHQD=v[..., T:, :]) if own else {}
    return Captured(*parts, **mine)


def by(losses):
    return {(x.choice, x.share): x for x in losses}


def test_means_lose_what_the_rule_of_longcat_loses():
    captured = random_capture()
    (loss,) = (x for x in measure_tiles(captured, GRIDS, [0.25]) if x.choice == "means")
    rule = TileRule(query_tile=GRIDS.query_tile, key_tile=GRIDS.key_tile, sparsity=0.75)
    dense = dataclasses.replace(rule, sparsity=0.0)
    q, k, v = (
        jnp.asarray(x[:, 0]).swapaxes(1, 2)
        for x in (captured.q_LBHQD, captured.k_LBHTD, captured.v_LBHTD)
    )
    k, v = (jnp.repeat(x, 2, 2) for x in (k, v))
    grids = dict(query_grid=GRIDS.queries, key_grid=GRIDS.keys)
    outs = [np.asarray(tile_attention(q, k, v, r, **grids)) for r in (rule, dense)]
    change, size = np.linalg.norm(outs[0] - outs[1]), np.linalg.norm(outs[1])
    assert loss.tiles == 2 and loss.error == pytest.approx(change / size, rel=1e-4)


def test_all_tiles_lose_nothing_and_exact_mass_finds_the_most():
    for own in (False, True):
        found = by(measure_tiles(random_capture(1, own), GRIDS, [1, 0.5, 0.25]))
        assert set(found) == {(c, s) for c in CHOICES for s in (1, 0.5, 0.25)}
        for choice in CHOICES:
            whole, half, quarter = (found[choice, s] for s in (1, 0.5, 0.25))
            assert whole.error < 1e-6 and whole.mass == pytest.approx(1, abs=1e-5)
            assert 0 < half.error < quarter.error <= quarter.worst_layer
            assert quarter.mass <= found["exact mass", 0.25].mass + 1e-6
        # Without own keys half of the tiles have about half of the mass of random tokens; own keys are always read.
        assert (found["newest", 0.5].mass > 0.52) == own


def test_all_tiles_after_a_codec_lose_what_the_codec_loses():
    captured = random_capture()
    (loss,) = (x for x in measure_tiles(captured, GRIDS, [1], recipe="rtn") if x.choice == "means")
    assert loss.error == pytest.approx(Bench(captured, T).score("rtn").attention_error, rel=1e-4)


def test_a_planted_tile_is_found():
    captured = random_capture(2)
    k, q = captured.k_LBHTD.copy() * 0.1, captured.q_LBHQD.copy()
    q[:] = 4.0
    frame, row, column = np.indices((8, 2, 4)).reshape(3, -1)
    k[..., (frame // 2 == 1) & (column // 2 == 0), :] = 1.0
    found = by(measure_tiles(dataclasses.replace(captured, k_LBHTD=k, q_LBHQD=q), GRIDS, [0.125]))
    for choice in ("means", "exact mass"):
        assert found[choice, 0.125].mass > 0.99 and found[choice, 0.125].error < 0.01
    assert found["newest", 0.125].mass < 0.01


@pytest.mark.parametrize(
    ("changes", "shares", "message"),
    [
        (dict(key_tile=(3, 2, 2)), [0.5], "key_tile=.* does not divide grid"),
        (dict(keys=(4, 2, 4)), [0.5], "accepted: one of 64"),
        ({}, [0.5, 0.0], "share=0.0 is not accepted"),
    ],
)
def test_bad_tiles_and_shares_say_what_is_accepted(changes, shares, message):
    with pytest.raises(UserError, match=message):
        measure_tiles(random_capture(), dataclasses.replace(GRIDS, **changes), shares)


def test_the_benchmark_prints_a_line_for_each_share(tmp_path, capsys):
    save_captured(tmp_path / "kv.npz", random_capture())
    given = "--frames 0 --recipe rtn --span-tokens 32 --data-keys 8 2 4 --data-queries 1 2 4"
    given += " --data-query-tile 1 2 2 --data-key-tile 2 2 2"
    files = ["--data", str(tmp_path / "kv.npz"), "--out", str(tmp_path / "out.json")]
    benchmark.main([*given.split(), *files])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 5 and lines[2].startswith(
        "| captured | as captured | 1, 8 tiles |"
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["captured, rtn"]) == 5 * len(CHOICES)
    assert found["captured, rtn"][0]["error"] > found["captured, None"][0]["error"]
