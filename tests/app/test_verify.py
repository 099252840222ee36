"""`qvg verify`: the videos of a protocol, windows, bands, and the page; end to end with random weights."""

import json
import re

import pytest

from models import registry
from models.common.weights import Weights
from models.self_forcing import job
from qvg_jax.app import cli, perceptual
from qvg_jax.app.generate import Outcome
from qvg_jax.app.metrics import METRICS
from qvg_jax.app.protocol import Band, Protocol, VerifyOptions, Window
from qvg_jax.app.verify import Case, cases, summary, summary_table, verify
from qvg_jax.errors import UserError
from tests.support import tiny_self_forcing as tiny
from tests.support.tiny_world import as_in_its_own_process
from tests.support.tiny_worldplay import drawn


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """Two videos of Self-Forcing's protocol at a tiny size, and the command that made them."""
    out = tmp_path_factory.mktemp("verified")
    argv = ["verify", "self-forcing", "--weights", "random", "--frames", "27", "--videos", "2"]
    argv += ["--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH), "--out", str(out)]
    argv += ["--codec", tiny.CODEC]
    with (
        as_in_its_own_process(tmp_path_factory.getbasetemp()),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(job, "released_sizes", tiny.sizes)
        patch.setattr(Weights, "random", drawn)
        assert cli.main(argv) == 0
        made = (out / "video-01" / "video.mp4").stat().st_mtime_ns
        assert cli.main([*argv, "--resume"]) == 0  # nothing is made again
        assert (out / "video-01" / "video.mp4").stat().st_mtime_ns == made
    return out


def test_two_videos_are_measured_in_windows_and_not_judged_with_random_weights(verified):
    result = json.loads((verified / "verify.json").read_text())
    assert result["verdict"] == "not judged" and result["weights"] == "random"
    assert {band["because"] for band in result["bands"]} == {"the weights are random"}
    first, second = result["videos"]
    protocol = registry.named("self-forcing").protocol
    assert [v["prompt"] for v in (first, second)] == list(protocol.prompts[:2])
    assert (first["seed"], second["seed"]) == (0, 1)
    onset, _, whole = (row for row in result["table"] if row["codec"] == tiny.CODEC)
    curve = first["frames"][tiny.CODEC]["psnr"]
    # Caches of other shapes round differently: what was never compressed is not always the same.
    assert len(curve) == 105 and min(curve[:93]) > 75 > max(curve[93:])
    own = [sum(v["frames"][tiny.CODEC]["psnr"][93:105]) / 12 for v in (first, second)]
    assert onset["psnr"]["mean"] == pytest.approx(sum(own) / 2, abs=1e-3)
    assert onset["psnr"]["least"] == pytest.approx(min(own), abs=1e-3)
    assert onset["psnr"]["mean"] < whole["psnr"]["mean"]


def test_the_page_is_one_file_with_everything_in_it(verified):
    page = (verified / "verify.html").read_text()
    assert "not judged" in page and "27.42" in page and "<polyline" in page
    assert not re.search(r"(src|href)=.(?!data:)", page)
    assert page.count("data:image/png;base64,") == 1


def test_cases_take_what_the_user_asks_for_and_the_rest_from_the_protocol(tmp_path):
    entry = registry.named("worldplay")
    options = entry.options(out=tmp_path)
    first, *more = cases(entry, options, VerifyOptions())
    assert len(more) == 2 and first.options.frames == 48
    assert first.options.actions == entry.protocol.options["actions"]
    assert first.options.codecs == (entry.default_codec, *entry.protocol.recipes, "bf16")
    assert [c.options.seed for c in (first, *more)] == [0, 1, 2]
    assert first.options.out == tmp_path / "video-01"
    asked = entry.options(codec="rtn", prompt="a hall", actions="w-8", frames=8, seed=5)
    one, two = cases(entry, asked, VerifyOptions(videos=2))
    assert one.options.codecs == ("rtn", "bf16") and one.options.actions == "w-8"
    assert (one.options.frames, one.options.prompt, two.options.prompt) == (8, "a hall", "a hall")
    assert two.options.seed == 6


def _summary(db, frames=4):
    """The summary of a run whose every frame has `db` dB."""
    protocol = Protocol(
        frames=4,
        recipes=("rtn",),
        windows=(Window("late", 2), Window("later", 8)),
        bands=(
            Band(recipe="rtn", window="late", least=20, why="stated"),
            Band(recipe="rtn", window="later", least=20, why="stated"),
        ),
    )
    arm = {
        "bits_per_element": {"from_formats": 2.5},
        "bytes": {"times_smaller": 6.4},
        "frames": {"psnr_vs_bf16": [100.0, 100.0] + [db] * (frames - 2)},
    }
    report = dict(arms={"bf16": {}, "rtn": arm}, device="cpu", versions={}, config={"weights": {}})
    options = registry.named("self-forcing").options(prompt="a fox")
    return summary("toy", protocol, [(Case("video-01", options), report)], ["psnr"])


@pytest.mark.parametrize(("db", "verdict"), [(20.0, "pass"), (19.9, "fail")])
def test_a_band_passes_from_its_limit_on(db, verdict):
    result = _summary(db)
    late, later = result["bands"]
    assert (late["verdict"], late["measured"]) == (verdict, db)
    assert (later["verdict"], later["because"]) == ("not judged", "no such arm, or too few frames")
    assert result["verdict"] == verdict
    assert f"verdict: {verdict}" in summary_table(result)


def test_every_protocol_names_recipes_and_options_of_its_model():
    from qvg_jax.codecs import presets

    for name in registry.names():
        entry = registry.named(name)
        if entry.protocol is None:
            continue
        for recipe in (*entry.protocol.recipes, *(b.recipe for b in entry.protocol.bands)):
            presets.parse_pair(recipe)
        entry.options(**dict(entry.protocol.options))
        arms = (entry.default_codec, *entry.protocol.recipes)
        assert {b.recipe for b in entry.protocol.bands} <= {*arms}


def test_a_window_that_is_not_there_and_lpips_that_is_not_installed():
    band = Band(recipe="rtn", window="late", least=20, why="stated")
    with pytest.raises(ValueError, match="'late' is not one of"):
        Protocol(frames=4, recipes=(), windows=(Window("all"),), bands=(band,))
    try:
        import lpips  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UserError, match="pip install 'qvg-jax\\[lpips\\]'"):
            perceptual.load_lpips()


def test_an_interrupted_video_goes_on_whatever_its_model_keeps(tmp_path):
    asked = []

    def interrupted(options, metrics):
        asked.append(options.resume)
        return Outcome(options.out / "video.mp4", 0, None, 2)

    entry = registry.named("pocket-world")
    options = entry.options(out=tmp_path, resume=True)
    assert verify(entry, options, VerifyOptions(), interrupted, METRICS) is None
    assert asked == [True]
