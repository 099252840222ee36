"""Which heads look back: planted ones are found, lists are read and written, and models run with them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.pocket_world import job
from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.heads import drop_errors
from models.pocket_world.modeling import PocketWorld
from models.runs.head_lists import history_of
from models.self_forcing.entry import Options
from models.self_forcing.settings import settle
from qvg_jax.app import cli
from qvg_jax.errors import UserError
from qvg_jax.reading.head_lists import read_head_list
from qvg_jax.study.capture import Captured, save_captured
from qvg_jax.study.heads import HeadRegions, classes, measure_heads
from tests.support import tiny_self_forcing as tiny
from tests.support.tiny_world import as_in_its_own_process, random_weights

L, H, BLOCK, T, Q, D = 2, 3, 4, 40, 4, 16
REGIONS = HeadRegions(block_tokens=BLOCK, sink_blocks=1, local_blocks=2)
# What head h of layer l looks at: own block, newest, sink or history; values there are its own.
PLANTED = np.array([["history", "sink", "own"], ["newest", "history", "sink"]])
PLACES = {"sink": [1], "history": [20, 9], "newest": [34], "own": [T + 2]}
PUBLISHED = {
    "format": "a name",
    "num_layers": 2,
    "num_heads": 2,
    "layers": [
        {"layer_idx": 1, "static_head": [0, 1], "dynamic_head": []},
        {"layer_idx": 0, "local_head": [1], "temporal_head": [0]},
    ],
}


def planted(seed: int) -> Captured:
    rng = np.random.default_rng(seed)
    k = 0.1 * rng.standard_normal((L, 1, H, T + Q, D), np.float32)
    v = rng.standard_normal((L, 1, H, T + Q, D), np.float32)
    q = np.zeros((L, 1, H, Q, D), np.float32)
    for l in range(L):
        for h in range(H):
            direction = rng.standard_normal(D).astype(np.float32)
            direction *= 12 / np.linalg.norm(direction)
            q[l, 0, h] = direction
            k[l, 0, h, PLACES[PLANTED[l, h]]] = direction / 2
    still = np.zeros((2, 1, T, 0), np.float32), np.zeros((2, 1, Q, 0), np.float32)
    parts = (k[..., :T, :], v[..., :T, :], q, *still, np.arange(L))
    return Captured(*parts, own_k_LBHQD=k[..., T:, :], own_v_LBHQD=v[..., T:, :])


def test_planted_heads_are_found():
    scores = measure_heads([planted(0), planted(1)], REGIONS)
    np.testing.assert_allclose(scores.shares.sum(0), 1, rtol=1e-5)
    for name, share in zip(("own", "newest", "sink", "history"), scores.shares, strict=True):
        assert (share[name == PLANTED] > 0.9).all() and (share[name != PLANTED] < 0.1).all()
    looks_back = PLANTED == "history"
    assert (scores.error[looks_back] > 0.5).all() and (scores.error[~looks_back] < 0.1).all()
    np.testing.assert_array_equal(classes(scores, 4 / 6), looks_back)
    assert classes(scores, 0).all() and not classes(scores, 1).any()
    # A head without much output may lose it: its own error stays, that over the layer does not.
    quiet = planted(0)
    for x in (quiet.v_LBHTD, quiet.own_v_LBHQD):
        x[0, :, 0] *= 0.01
    scores = measure_heads([quiet], REGIONS)
    assert scores.error[0, 0] > 0.5 and scores.layer_error[0, 0] < 0.05


def test_what_cannot_be_measured_is_named():
    with pytest.raises(UserError, match="no captures"):
        measure_heads([], REGIONS)
    with pytest.raises(UserError, match="40 tokens of history are not more than those of 1 blocks"):
        measure_heads([planted(0)], dataclasses.replace(REGIONS, local_blocks=9))
    other = dataclasses.replace(planted(0), layers=np.array([0, 2]))
    with pytest.raises(UserError, match=r"layers \[0, 2\] with 3 heads beside layers \[0, 1\]"):
        measure_heads([planted(0), other], REGIONS)
    with pytest.raises(ValueError, match="share=1.5"):
        classes(np.zeros((1, 1)), 1.5)


def test_tune_writes_a_list_that_a_model_reads(tmp_path, capsys):
    for seed in range(2):
        save_captured(tmp_path / f"{seed}.npz", planted(seed))
    command = ["tune", str(tmp_path / "0.npz"), "--heads", "--also", str(tmp_path / "1.npz")]
    command += ["--share", "0.67", "--out", str(tmp_path)]
    assert cli.main(command) == 2 and "--block-tokens" in capsys.readouterr().err
    assert cli.main([*command, "--block-tokens", str(BLOCK)]) == 0
    assert "4 of 6 heads are local" in capsys.readouterr().out
    assert (tmp_path / "heads.png").read_bytes()[:4] == b"\x89PNG"
    written = json.loads((tmp_path / "heads.json").read_text())
    assert written["table"] == ["#..", ".#."] and written["made_by"]["share"] == 0.67
    sizes = dict(layers=L, count=H, usual=9)
    found = history_of(str(tmp_path / "heads.json"), local=None, **sizes)
    assert found is not None and (found.counts, found.local_blocks) == ((1, 1), 2)
    assert history_of("all", local=None, **sizes) is None
    with pytest.raises(UserError, match="no list of its own"):
        history_of("auto", local=None, **sizes)
    own = history_of("auto", layers=6, count=3, local=None, usual=9, own=job.HEADS)
    assert own is not None and (own.full, own.local_blocks) == (12, 2)  # pocket world's
    with pytest.raises(UserError, match="2 layers and 3 heads; accepted: 4 layers and 3 heads"):
        history_of(str(tmp_path / "heads.json"), local=None, **sizes | dict(layers=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layers=PUBLISHED["layers"][:1]), r"layers are numbered \[1\]; accepted: 0 to 1"),
        (dict(num_heads=3), r"layer 1 has the heads \[0, 1\]; accepted: 0 to 2"),
        (dict(num_layers="many"), "num_layers"),
        (dict(layers=[{"layer_idx": 0, "static_head": [0, 1]}]), "layer 0 lacks a list"),
        (dict(table=["#.", "#"]), r"table\[1\]='#' is not accepted: give 2 of"),
        (dict(layers=None), "layers"),
    ],
)
def test_lists_that_are_none_are_named(tmp_path, change, message):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(PUBLISHED | change))
    with pytest.raises(UserError, match=message):
        read_head_list(path)
    path.write_text(json.dumps(PUBLISHED["layers"]))  # a list of layers alone
    assert read_head_list(path).table.tolist() == [[True, False], [False, False]]
    path.write_text("{}")
    with pytest.raises(UserError, match="neither 'table' nor 'layers'"):
        read_head_list(path)


def test_self_forcing_takes_a_published_list(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(PUBLISHED))
    common = dict(height=tiny.HEIGHT, width=tiny.WIDTH, frames=30, span=6, codec=tiny.CODEC)
    options = Options(**common, compare=("bf16",), heads=str(path), local=2)
    settings = settle(options, tiny.sizes(jnp.float32))
    cache, plain = (settings.cache(name) for name in (tiny.CODEC, "bf16"))
    lay = cache.layout
    assert plain.layout.history is None and lay.history is not None
    assert lay.history.table == ((True, False), (False, False)) and lay.own_window
    assert (lay.sink_blocks, lay.keep_recent, lay.history.local_blocks) == (3, 0, 2)
    same = dataclasses.replace(options, heads="all", local=None, sink=3)
    whole = settle(same, tiny.sizes(jnp.float32)).cache(tiny.CODEC)
    pairs = zip((cache.span_k, cache.span_v), (whole.span_k, whole.span_v), strict=True)
    assert all(4 * _size(a) == _size(b) for a, b in pairs)
    for wrong, message in ((dict(heads="all"), "local=2 with --heads all"),):
        with pytest.raises(UserError, match=message):
            settle(dataclasses.replace(options, **wrong), tiny.sizes(jnp.float32))


def _size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_a_world_runs_with_local_heads_and_the_report_says_so(tmp_path, capsys):
    """Two layers of one head: the second has no history. The bf16 arm keeps all of it."""
    (tmp_path / "heads.json").write_text('{"local_blocks": 1, "table": ["#", "."]}')
    common = ["generate", "pocket-world", "--tour", "48", "--frames", "12", "--codec", "rtn"]
    common += ["--weights", str(random_weights(tmp_path)), "--out", str(tmp_path / "out")]
    with as_in_its_own_process(tmp_path):
        assert cli.main([*common, "--heads", str(tmp_path / "heads.json")]) == 0
        assert cli.main([*common, "--heads", str(tmp_path / "none.json")]) == 2
    assert "none.json: not readable" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    said, bf16 = (report["arms"][name] for name in ("rtn", "bf16"))
    assert said["heads_with_history"] == {
        "count": 1,
        "of": 2,
        "by_layer": [1, 0],
        "local_blocks": 1,
    }
    assert "heads_with_history" not in bf16 and "1 of 2 heads" in report["config"]["heads"]
    per_element = said["bits_per_element"]
    assert per_element["from_buffers"] == pytest.approx(per_element["from_formats"], rel=1e-6)


@pytest.mark.slow
def test_a_head_that_the_network_does_not_read_changes_no_prediction():
    cfg = PocketWorldConfig.smoke()
    model = PocketWorld(cfg, rngs=nnx.Rngs(0))
    kernel = model.blocks.out.kernel
    kernel[...] = kernel[...].at[1].set(0)
    with jax.numpy_rank_promotion("allow"):
        errors = drop_errors(model, 32, 2)
    assert errors.shape == (2, 1) and errors[0, 0] > 1e-4 and errors[1, 0] == 0
