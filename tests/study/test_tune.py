"""Captured K, V and Q, codecs measured on them, and codecs in the loop of a tiny world."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.pocket_world import capture, pipeline, trial
from models.pocket_world.params import load_weights
from qvg_jax.app import cli
from qvg_jax.attention.api import attend
from qvg_jax.cache.operations import KVCache, append
from qvg_jax.cache.rope import axial_rope, frequency_ladder
from qvg_jax.codecs import presets
from qvg_jax.codecs.accounting import pair_bits
from qvg_jax.codecs.fitted import fitted
from qvg_jax.study.capture import Captured, Recorder, load_captured, save_captured
from qvg_jax.study.tune import Bench, Score, candidates, pareto, recommended, restored, tune
from tests.support.tiny_world import as_in_its_own_process, random_weights

L, B, H, T, Q, D = 2, 1, 2, 96, 8, 16


def made_up(seed=0, pairing="half", turns=True) -> Captured:
    rng = np.random.default_rng(seed)
    place = rng.standard_normal((8, D)).astype(np.float32)
    clustered = lambda: (  # noqa: E731
        place[rng.integers(0, 8, (L, B, H, T))] + 0.1 * rng.standard_normal((L, B, H, T, D))
    ).astype(np.float32)
    rope = axial_rope([frequency_ladder(D)], pairing=pairing)
    pos = lambda n, at: jnp.arange(at, at + n, dtype=jnp.float32)[None, :, None]  # noqa: E731
    table = lambda n, at: (  # noqa: E731
        np.stack(rope.table(pos(n, at))) if turns else np.zeros((2, B, n, 0), np.float32)
    )
    return Captured(
        k_LBHTD=clustered(),
        v_LBHTD=clustered(),
        q_LBHQD=rng.standard_normal((L, B, 2 * H, Q, D)).astype(np.float32),
        turn_k=table(T, 0),
        turn_q=table(Q, T),
        layers=np.arange(L),
        pairing=pairing,
    )


def test_a_captured_file_comes_back(tmp_path):
    there = made_up(pairing="interleaved")
    save_captured(tmp_path / "a.npz", there)
    back = load_captured(tmp_path / "a.npz")
    for field in dataclasses.fields(there):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(there, field.name))
    plain = {"k": there.k_LBHTD, "v": there.v_LBHTD, "q": there.q_LBHQD}
    np.savez(tmp_path / "plain.npz", **plain)
    assert load_captured(tmp_path / "plain.npz").turn_k.shape == (2, B, T, 0)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(v_LBHTD=np.zeros((L, B, H, T, D + 2))), "the same"),
        (dict(q_LBHQD=np.zeros((L, B, 3, Q, D))), "Q has shape"),
        (dict(turn_k=np.zeros((2, B, T, 3))), "turn_k has shape"),
        (dict(pairing="both"), "pairing='both'"),
        (dict(k_LBHTD=np.full((L, B, H, T, D), np.nan)), "NaN"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(made_up(), **change)


def test_bad_files_are_named(tmp_path):
    torn, empty = tmp_path / "torn.npz", tmp_path / "empty.npz"
    save_captured(torn, made_up())
    torn.write_bytes(torn.read_bytes()[:-200])
    np.savez(empty, x=np.zeros(3))
    for path, words in ((torn, "not an .npz"), (empty, "has no 'k'"), (tmp_path / "no", "missing")):
        with pytest.raises(ValueError, match=words):
            load_captured(path)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_the_bench_attends_as_the_library_does(pairing):
    there = made_up(pairing=pairing)
    rope = axial_rope([frequency_ladder(D)], pairing=pairing)
    cache = KVCache.create(
        layers=L, batch=B, heads=H, head_dim=D, block_tokens=T - Q, sink_blocks=0, max_spans=0,
        window_blocks=1, overflow="drop", pos_dims=1, dtype=jnp.float32,
    )  # fmt: skip
    k, v = (jnp.asarray(x).swapaxes(2, 3) for x in (there.k_LBHTD, there.v_LBHTD))
    pos = jnp.arange(T, dtype=jnp.float32)[None, :, None]
    cache = append(cache, k[:, :, :-Q], v[:, :, :-Q], pos[:, : T - Q])
    # The library's new block asks; the bench's queries are given the same positions.
    turn_q = np.stack(rope.table(pos[:, -Q:]))
    bench = Bench(dataclasses.replace(there, turn_q=turn_q), 32)
    for layer in range(L):
        q = jnp.asarray(there.q_LBHQD[layer]).swapaxes(1, 2)
        new = (x[layer][:, -Q:] for x in (k, v))
        want = attend(q, cache, *new, layer=layer, positions=pos[:, -Q:], rope=rope)
        got = bench._exact[layer].reshape(B, 2 * H, Q, D)
        np.testing.assert_allclose(got, want.swapaxes(1, 2), atol=2e-5)


def test_tokens_beyond_the_last_span_stay_exact():
    x = made_up().k_LBHTD
    got = np.asarray(restored(presets.get("rtn"), x, 40))
    exact = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(got[..., 80:, :], exact[..., 80:, :])
    assert np.abs(got[..., :80, :] - exact[..., :80, :]).max() > 0.05


def test_scores_order_codecs_and_find_the_front():
    seen = []
    recipes = ["bf16", "rtn", "rtn-4bit", "midrise:num_centroids=8"]
    scores = tune(made_up(), 96, recipes, progress=seen.append)
    by = {s.recipe: s for s in scores}
    assert [s.bits for s in scores] == sorted(s.bits for s in scores) and len(seen) == 4
    assert by["bf16"].key_error < 0.005 and by["bf16"].attention_error < 0.005
    assert by["rtn-4bit"].attention_error < by["rtn"].attention_error
    assert by["midrise:num_centroids=8"].value_error < by["rtn"].value_error
    assert by["bf16"].best and by["rtn-4bit"].best


def test_the_front_has_what_nothing_beats():
    points = [(1.0, 0.5), (2.0, 0.6), (2.0, 0.3), (3.0, 0.3), (4.0, 0.1)]
    got = pareto(Score(str(i), b, 0, 0, e) for i, (b, e) in enumerate(points))
    assert {s.recipe for s in got if s.best} == {"0", "2", "4"}


def test_budgets_and_spans_are_checked():
    with pytest.raises(ValueError, match="budget=0.5"):
        tune(made_up(), 96, ["rtn"], budget=0.5)
    with pytest.raises(ValueError, match="span_tokens=97"):
        tune(made_up(), 97, ["rtn"])
    with pytest.raises(ValueError, match="codec='nope'"):
        tune(made_up(), 96, ["nope"])
    told = {}
    (score,) = tune(made_up(), 96, ["rtn:group=48", "rtn"], refused=told.__setitem__)
    assert score.recipe == "rtn" and "group=48" in told["rtn:group=48"]
    with pytest.raises(ValueError, match=r"^rtn:group=48: .*group=48"):
        tune(made_up(), 96, ["rtn:group=48"])
    assert "midrise:num_centroids=16" in candidates(128)
    assert "midrise:num_centroids=32" not in candidates(128)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with as_in_its_own_process(tmp_path_factory.getbasetemp()):
        yield random_weights(tmp_path_factory.mktemp("weights"))


def test_capture_is_what_the_cache_holds_and_what_layers_ask(tiny):
    model = load_weights(tiny)
    there = capture.capture(model, (1,), 16, seed=3)
    cfg = model.cfg
    tokens = 4 * cfg.block_tokens
    assert there.k_LBHTD.shape == (1, 1, cfg.heads, tokens, cfg.head_dim)
    assert there.q_LBHQD.shape == (1, 1, cfg.heads, cfg.block_tokens, cfg.head_dim)
    both = capture.capture(model, (0, 1), 16, seed=3)
    np.testing.assert_array_equal(both.q_LBHQD[1], there.q_LBHQD[0])
    assert np.abs(both.q_LBHQD[0] - both.q_LBHQD[1]).max() > 0.1
    with pytest.raises(ValueError, match="layers"):
        capture.capture(model, (2,), 16, seed=3)
    with pytest.raises(ValueError, match="frames=6"):
        capture.capture(model, (0,), 6, seed=3)


def test_a_recorder_keeps_the_last_query_of_every_layer():
    recorder = Recorder()
    listening = recorder.listening(lambda layer, q: q + layer)

    @jax.jit
    def run(q):
        return jax.lax.scan(lambda q, i: (listening(i, q), None), q, jnp.arange(3))[0]

    run(jnp.ones(2))
    run(jnp.zeros(2))
    assert {i: q.tolist() for i, q in recorder.queries().items()} == {
        0: [0, 0],
        1: [0, 0],
        2: [1, 1],
    }


def test_a_trial_compares_arms_with_bf16_and_each_other(tiny, tmp_path, capsys):
    small = "--worlds 1 --seeds 3 --tour 32 --frames 8 --steps 1 --span-blocks 2 --half-width 100"
    argv = ["--out", str(tmp_path), "--weights", str(tiny), *small.split(), "--against", "rtn"]
    trial.main([*argv, "--codecs", "bf16,rtn,midrise:num_centroids=8"])
    rows = json.loads((tmp_path / "trial.json").read_text())
    assert set(rows) == {"bf16", "rtn", "midrise:num_centroids=8"}
    ours = rows["midrise:num_centroids=8"]
    assert ours["spans"] > 0 and ours["bits"] < 16 and len(ours["curve"]) == 2
    wins, losses, p = ours["against rtn"]["bf16"]
    assert wins + losses == 3 and 0 < p <= 1
    assert (tmp_path / "trial.png").read_bytes().startswith(b"\x89PNG")
    assert ours["bf16"] < 100 and "| rtn:" in capsys.readouterr().out


def test_sign_tests_count():
    ours, theirs = np.array([2.0, 3.0, 1.0, 5.0]), np.array([1.0, 1.0, 1.0, 6.0])
    wins, losses, p = trial.sign_test(ours, theirs)
    assert (wins, losses) == (2, 1) and p == pytest.approx(1.0)
    assert trial.sign_test(np.arange(1, 7), np.zeros(6))[2] == pytest.approx(2 / 2**6)


def test_clustered_recipes_of_a_world_have_centroids_for_its_short_spans():
    """The sizes that the page lists; 256 centroids for 768 tokens would make "auto" twice as large."""
    sizes = {
        name: pair_bits(pipeline.world_codec(name), (1, 4, 768, 64))
        for name in ("dither", "auto", "kmeans-e8")
    }
    assert sizes["auto"] == sizes["dither"] and max(sizes.values()) < 2.5


def test_codecs_may_differ_for_k_and_v_in_a_world():
    cfg = pipeline.PocketWorldConfig.smoke()
    pair = pipeline.world_codec("midrise-k1v3")
    layout = pipeline.make_cache(cfg, pair, 64).layout
    one, three = (c.bits_per_element(layout.span_shape) for c in pair)
    assert three == pytest.approx(one + 2) and layout.span_bits == pytest.approx(one + 1)


def test_keys_and_values_may_come_from_two_recipes():
    key_codec, value_codec = pipeline.world_recipe("bf16/midrise:bits=3")
    assert key_codec.name == "bf16" and value_codec.name == "midrise"
    assert value_codec.bits_per_element((1, 1, 768, 128)) > 3
    assert pipeline.world_recipe("qvg") == pipeline.world_codec("qvg")
    with pytest.raises(ValueError, match="3 parts"):
        pipeline.world_recipe("qvg/rtn/qvg")


def test_the_command_captures_and_tunes(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.setattr("models.pocket_world.params.DEFAULT_WEIGHTS", tiny)
    monkeypatch.setattr("models.pocket_world.job.params.load_weights", lambda: load_weights(tiny))
    file, out = tmp_path / "kv.npz", tmp_path / "tuned"
    assert cli.main(["capture", "--frames", "16", "--layers", "0,1", "--out", str(file)]) == 0
    assert "2 layers" in capsys.readouterr().out
    names = "rtn,midrise:num_centroids=16,rtn:group=48"
    argv = ["tune", str(file), "--span-tokens", "192", "--codec", names, "--out", str(out)]
    assert cli.main([*argv, "--model", "pocket-world"]) == 0
    table = capsys.readouterr().out
    assert "dB to bf16" in table and "rtn" in table and "left out rtn:group=48: " in table
    saved = json.loads((out / "tune.json").read_text())
    assert all(row["loop"] is not None for row in saved["scores"])
    assert (out / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["tune", str(tmp_path / "missing.npz")]) == 2
    assert "missing.npz" in capsys.readouterr().err
    assert cli.main(["capture", "--layers", "9", "--frames", "16", "--out", str(file)]) == 2
    assert "layers=(9,)" in capsys.readouterr().err


def test_groups_of_presets_are_clamped_to_the_head_dim():
    shape = (1, 2, 37_440, 64)
    for name in ("kivi", "quarot", "qvg-asym", "rtn"):
        assert pair_bits(presets.parse_pair(fitted(name, 64)), shape) < 3, name
    assert (
        fitted("qvg-asym", 64) == "qvg-asym:group=64"
        and fitted("kivi", 64) == "kivi:value_group=64"
    )
    assert fitted("qvg-asym", 128) == "qvg-asym" and fitted("qvg-asym", 96) == "qvg-asym:group=96"
    assert fitted("qvg-asym:group=48", 64) == "qvg-asym:group=48"  # what a user states stays
    assert fitted("nope", 64) == "nope"
    scores = tune(made_up(), 96, ["kivi:group=32", "quarot"])
    assert {s.recipe for s in scores} == {"kivi:group=32:value_group=16", "quarot:group=16"}


def test_worst_queries_and_clipping_are_seen():
    there = made_up(turns=False)
    v = there.v_LBHTD.copy()
    v[1, 0, 0, 5, 3] = 900.0  # one massive value; the scales of `rtn` end at 448
    loud = dataclasses.replace(there, v_LBHTD=v)
    assert 0.4 < Bench(loud, 96).score("rtn").peaks < 0.6
    assert Bench(loud, 96).score("rtn-4bit").peaks > 0.95  # whose scale is a seventh of the value
    score = Bench(there, 96).score("rtn")
    assert score.median_layer <= score.worst_layer < score.worst_queries and score.peaks > 0.9


def test_what_clips_or_is_bad_at_its_worst_is_not_recommended():
    def score(name, mean, worst, peaks=1.0, loop=None):
        return Score(name, 2.3, 0, 0, mean, loop, False, mean, worst, worst, peaks)

    rough, even = score("rough", 0.1, 0.9), score("even", 0.12, 0.3)
    assert recommended([rough, even]) is even
    assert recommended([score("clips", 0.01, 0.02, 0.5), rough]) is rough
    assert recommended([score("clips", 0.01, 0.02, 0.5)]) is None
    looped = [score("a", 0.1, 0.3, loop=20.0), score("b", 0.1, 0.3, loop=30.0), even]
    assert recommended(looped) is looped[1]
    front = {s.recipe: s.best for s in pareto([rough, even])}
    assert front == {"rough": True, "even": True}
