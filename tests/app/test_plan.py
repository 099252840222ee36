"""`qvg plan`: what fits, from shapes and from compiled programs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from models.longcat import entry as longcat_entry
from models.longcat import settings as longcat_settings
from models.longcat.predicted import evaluation_seconds
from models.runs.shared_needs import LeftOut, needs_on_devices
from models.self_forcing import job
from models.self_forcing.entry import Options
from models.self_forcing.plan import _step, make_plan
from models.self_forcing.predicted import block_seconds
from models.self_forcing.settings import PLANS, released_sizes, settle
from models.wan_vae.params import WEIGHTS as VAE_WEIGHTS
from models.worldplay import entry as worldplay_entry
from models.worldplay import settings as worldplay_settings
from models.worldplay.predicted import block_seconds as worldplay_seconds
from qvg_jax.app import cli
from qvg_jax.app.memory_plan import (
    Need,
    Plan,
    plan_table,
    shape_bytes,
    temporary_bytes,
)
from qvg_jax.app.option_types import parse_bytes
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.plan import Plan as CachePlan
from qvg_jax.loop import run_chunk
from tests.support import tiny_self_forcing as tiny
from tests.support.tiny_world import as_in_its_own_process


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with (
        as_in_its_own_process(tmp_path_factory.getbasetemp()),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(job, "released_sizes", tiny.sizes)
        yield


def options(**changes):
    fields = dict(frames=48, codec=tiny.CODEC, height=tiny.HEIGHT, width=tiny.WIDTH)
    return Options(**(fields | dict(compare=("bf16",)) | changes))


@pytest.fixture(scope="module")
def plan():
    return make_plan(options(), 10**9, tiny.sizes())


def test_sizes_in_words():
    assert parse_bytes("24GB") == 24 * 10**9 == parse_bytes("24e9") == parse_bytes("24 gb")
    assert parse_bytes("22.5GiB") == int(22.5 * 2**30)
    assert parse_bytes("512M") == 512 * 10**6 and parse_bytes("100B") == 100
    assert parse_bytes("24") == 24 * 10**9 == parse_bytes("24000000000")
    assert parse_bytes("22.4") == int(22.4 * 10**9)
    assert parse_bytes("2.4e1") == 24 * 10**9 and parse_bytes("1e9") == 10**9  # by value alone
    for bad in ("", "GB", "24XB", "-1GB", "0GB", "1.2.3GB", "0.1"):
        with pytest.raises(ValueError, match="24GB"):
            parse_bytes(bad)


def test_bytes_of_shapes_and_of_programs():
    tree = {"a": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), "b": jnp.zeros(4, jnp.uint8)}
    assert shape_bytes(tree) == 34
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0)
    assert temporary_bytes(in_place, x) == 0
    assert temporary_bytes(jax.jit(lambda x: x + 1), x) == 2**18
    assert temporary_bytes(jax.jit(lambda x: jnp.tanh(x @ x) @ x), x) >= 2 * 2**18


def test_a_plan_counts_the_arrays_that_a_run_makes(plan):
    settings = settle(options(), tiny.sizes())
    model, vae = job.WEIGHTS.random(settings.sizes.dit), VAE_WEIGHTS.random(settings.sizes.vae)
    assert [need.name for need in plan.needs] == ["bf16", tiny.CODEC]
    for need in plan.needs:
        cache = settings.cache(need.name)
        real = KVCache.create(
            **{
                field.name: getattr(cache.layout, field.name)
                for field in dataclasses.fields(cache.layout)
                if field.name not in ("plan", "part")  # of several devices
            },
            dtype=jnp.float32,
        )
        buffers = sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(real))
        assert need.held["cache"] == buffers
        assert need.held["transformer"] == sum(x.nbytes for x in jax.tree.leaves(model))
        assert need.held["VAE"] == sum(x.nbytes for x in jax.tree.leaves(vae))
        assert all(size > 0 for size in need.temporaries.values())
        assert need.total > sum(need.held.values())
    assert plan.needs[1].held["cache"] < plan.needs[0].held["cache"]
    assert plan.before["text encoder"] > 0 and plan.backend == "cpu" and plan.seconds > 0


def test_a_plan_for_two_devices_has_a_line_for_each_way_of_sharing(caplog):
    asked = options(compare=(), span=12)
    settings = settle(asked, tiny.sizes())
    cache = settings.cache(tiny.CODEC)
    assert cache.layout.max_spans == 3
    held = {"cache": shape_bytes(cache), "VAE": 7}
    alone = Need(name=tiny.CODEC, held=held, temporaries={"a block": 5})

    left_out = LeftOut()

    def on(count):
        parts = dict(axes=PLANS, tokens=settings.block_tokens(), longest=lambda share: 3)
        parts |= dict(left_out=left_out)
        return needs_on_devices(alone, cache, count, **parts)

    needs = on(2)
    names = [need.name.removeprefix(tiny.CODEC) for need in needs]
    assert names == [", spans over 2", ", heads over 2", ", ring over 2"]
    one, spans, heads, ring = (need.held["cache"] for need in (alone, *needs))
    assert one / 2 < heads < spans < 0.75 * one  # two slots of four, and one of them stays empty
    assert spans < ring < one
    assert all(need.held["VAE"] == 7 for need in needs)
    assert not on(8)  # of a block of 3 frames of 6 tokens, and 2 heads: `attend` refuses them too
    on(8)
    left_out.say()
    (warning,) = caplog.messages  # of both calls and all plans
    assert warning.startswith("left out: ") and warning.count(", spans over 8") == 2
    (nine,) = on(9)
    assert nine.name == f"{tiny.CODEC}, ring over 9"


def test_seconds_of_a_block_are_those_of_the_benchmark_and_fall_with_devices():
    asked = Options(frames=63, codec="qvg", compare=("bf16",))
    settings = settle(asked, released_sizes())

    def seconds(arm, **plan):
        return block_seconds(settings, arm, settings.cache(arm), CachePlan(**plan))

    assert seconds("bf16") == pytest.approx(0.955, rel=0.03)  # block 21, measured
    assert seconds("qvg") == pytest.approx(0.729, rel=0.1)  # in fp8
    one, spans, heads = seconds("qvg"), seconds("qvg", spans=2), seconds("qvg", heads=2)
    assert 0.4 * one < heads < spans < 0.6 * one
    assert seconds("qvg", heads=4) < heads
    shared = block_seconds(settings, "qvg", settings.cache("qvg"), CachePlan(spans=2), 90_000_000)
    assert shared - spans == pytest.approx(150 * 45_000_000 / 197e9)  # each layer in each pass
    other = dataclasses.replace(settings, sizes=tiny.sizes())
    assert block_seconds(other, "qvg", settings.cache("qvg"), CachePlan()) is None
    need = dataclasses.replace(needs(5)[0], seconds=0.5)
    of = dict(what="run", before={}, backend="cpu", seconds=1.0, advice="", notes=("from an H100",))
    said = Plan(needs=(need, *needs(6)), **of)
    table = plan_table(said, 10)
    assert "s a block" in table and "0.500" in table and "From an H100." in table


def test_seconds_of_worldplay_and_longcat_are_those_of_their_benchmarks():
    asked = worldplay_entry.Options(frames=48, codec="qvg:storage=single", compare=("bf16", "qvg"))
    settings = worldplay_settings.settle(asked, worldplay_settings.released_sizes())

    def block(arm, **plan):
        return worldplay_seconds(settings, arm, settings.cache(arm), CachePlan(**plan))

    assert block("bf16") == pytest.approx(3.702) and block("qvg") is None
    one, two = block("qvg:storage=single"), block("qvg:storage=single", spans=2)
    assert one == pytest.approx(3.638, rel=0.01) and 0.5 * one < two < 0.6 * one
    asked = longcat_entry.Options(codec="midrise", compare=("bf16", "nvfp4"))
    settings = longcat_settings.settle(asked, longcat_settings.released_sizes())
    evaluation = functools.partial(evaluation_seconds, settings)
    assert evaluation("midrise", 1) == pytest.approx(1.222, rel=0.02)
    assert evaluation("bf16", 2) == pytest.approx(0.818, rel=0.04)  # of two H200s


@pytest.mark.slow
def test_a_block_of_real_size_needs_no_second_cache():
    """XLA copied the dense K and V of all layers once: 7.5 GB with 30 of them."""
    sizes, temporaries = released_sizes(), {}
    wanted = Options(frames=63, codec="qvg", height=240, width=416)
    for layers in (1, 2):
        dit = dataclasses.replace(sizes.dit, layers=layers)
        small = dataclasses.replace(sizes, dit=dit)
        step = _step(
            settle(wanted, small), job.WEIGHTS.skeleton(dit), settle(wanted, small).cache("qvg")
        )
        temporaries[layers] = temporary_bytes(run_chunk, *step)
    cache = settle(wanted, small).cache("qvg")
    dense_of_a_layer = shape_bytes((cache.dense_k, cache.dense_v)) / 2
    # Fresh K and V of three frames, of the 26 in the window; twice, as they are cast and stored.
    assert temporaries[2] - temporaries[1] < dense_of_a_layer / 3


def test_the_longest_video_grows_with_the_memory_and_shrinks_with_the_bits(plan):
    bf16, qvg = plan.needs
    assert bf16.longest == qvg.longest == 63  # the RoPE table has 64 rows
    settings = settle(options(), tiny.sizes())
    for need in plan.needs:
        size = lambda frames: shape_bytes(settings.cache(need.name, frames))  # noqa: B023, E731
        memory = need.total - need.held["cache"] + size(30)
        found = (
            make_plan(options(codec=need.name, compare=()), memory, tiny.sizes()).needs[0].longest
        )
        assert size(30) == size(found) < size(found + 3)  # spans come by the dozen


def needs(*totals):
    return tuple(
        Need(name=f"c{i}", held={"weights": 1, "cache": n - 2}, temporaries={"a": 1, "b": 0})
        for i, n in enumerate(totals)
    )


def test_what_fits():
    plan = Plan(
        what="x", before={"text": 50}, needs=needs(40, 60), backend="gpu", seconds=1, advice="less"
    )
    small, large = plan.needs
    assert (small.total, large.total) == (40, 60)
    assert not plan.fits(small, 49) and plan.fits(small, 50)  # the text encoder comes first
    assert not plan.fits(large, 59) and plan.fits(large, 60)
    assert "Fits: c0." in plan_table(plan, 55) and "Fits: c0; c1." in plan_table(plan, 60)
    first = (
        "Nothing fits: text alone, without any cache, take 0.00 GB (50 bytes); accepted: a device"
    )
    assert first in plan_table(plan, 40)
    plan = dataclasses.replace(plan, before={"text": 30}, larger="two of them")
    assert "Nothing fits: less" in plan_table(plan, 35)
    parts = {"transformer": 36, "VAE": 4, "cache": 1}
    heavy = tuple(dataclasses.replace(n, held=parts) for n in plan.needs)
    said = plan_table(dataclasses.replace(plan, needs=heavy), 39)
    assert "Nothing fits: transformer and VAE alone, without any cache, take 0.00 GB (40 " in said
    assert said.endswith("accepted: two of them")


def command(*argv):
    sizes = ["--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH), "--frames", "48"]
    return cli.main(["plan", "--codec", f"bf16,{tiny.CODEC}", *sizes, *argv])


def test_the_command(capsys):
    assert command("--memory", "1GB") == 0
    out = capsys.readouterr().out
    assert "48 latent frames of 32 x 48" in out and f"Fits: bf16; {tiny.CODEC}." in out
    assert "compiled for cpu" in out and "text encoder" in out and "at most" in out
    said = []
    # Room for nothing, for the text encoder, for the networks.
    for memory in ("10KB", "{size}B", "{size}B"):
        size = re.search(r"take 0.00 GB .([\d,]+) bytes", said[-1])[1] if said else ""
        assert command("--memory", memory.format(size=size.replace(",", ""))) == 1
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert said[0].startswith("Nothing fits: text encoder alone, without any cache, take 0.00 GB")
    assert said[1].startswith("Nothing fits: transformer, prompt K/V, VAE and ")
    assert said[1].endswith("accepted: a device with more memory, or several with --share-weights")
    assert said[2].startswith("Nothing fits: not one block; accepted: fewer --frames")


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--memory", "much"], ["'much'", "24GB"]),
        ([], ["--memory"]),
        (["--memory", "1GB", "--codec", "zip"], ["'zip'", "accepted: qvg"]),
        (["--memory", "1GB", "--frames", "7"], ["frames=7", "6 and 9"]),
        (
            ["--memory", "1GB", "--model", "pocket-world"],
            ["cannot be used with `qvg plan`", "self-forcing"],
        ),
    ],
)
def test_bad_input(argv, parts, capsys):
    assert command(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("qvg: error: ") and all(part in err for part in parts), err


def test_what_runs_when_the_cache_is_gone_needs_its_own_room_only():
    need = Need(name="c", held={"weights": 10, "cache": 5}, temporaries={"a block": 3})
    for decoding, total in ((4, 18), (8, 18), (9, 19)):
        late = dataclasses.replace(need, in_place_of_cache={"decoding": decoding})
        assert late.total == total
