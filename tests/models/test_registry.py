"""Models by name: those of this repository, one from outside, one that is broken."""

import dataclasses
import json
import sys
import textwrap

import pytest

from models import registry
from qvg_jax.app import cli
from qvg_jax.app.early_checks import check_early
from qvg_jax.app.model_entry import GenerateOptions, ModelEntry, PlanOptions, deferred
from qvg_jax.errors import UserError
from tests.support.tiny_world import as_in_its_own_process

TOY = '''
"""A model of gray frames that get brighter: it has a cache, a path and no network."""

import dataclasses

from qvg_jax.app.model_entry import GenerateOptions, ModelEntry
from qvg_jax.app.option_types import Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GenerateOptions):
    """Options of the toy.

    Attributes:
        brightness: gray level that a block adds.
    """

    codec: str = "rtn"
    brightness: Count = 10


def prepare(options):
    import jax
    import jax.numpy as jnp

    import qvg_jax as qvg
    from qvg_jax.app.job import Arm, Block, Job

    def cache(recipe):
        key_codec, value_codec = qvg.presets.pair(recipe)
        return qvg.KVCache.create(
            heads=1, head_dim=64, block_tokens=4, span_blocks=2, pos_dims=0,
            key_codec=key_codec, value_codec=value_codec,
        )

    @jax.jit
    def step(cache, number):
        x = jnp.full((1, 4, 1, 64), number, jnp.float32)
        seen = qvg.attend(x, cache, x, x).mean()
        cache = qvg.compress(qvg.append(cache, x[None], x[None]))
        gray = jnp.minimum(number * options.brightness / 127.5 - 1, 1.0)
        return cache, jnp.full((1, 2, 64, 128, 3), gray + 0 * seen)

    names = dict.fromkeys(("bf16", *options.codecs))
    return Job(
        model="toy",
        step=step,
        arms=tuple(Arm(name=name, state=cache(name)) for name in names),
        blocks=(Block(float(i)) for i in range(6)),
        cache=lambda cache: cache,
        tour=0, frames=12, block_frames=2, height=64, width=128, truth=False,
        config={"brightness": options.brightness},
    )


ENTRY = ModelEntry(name="toy", summary="Gray frames.", options=Options, prepare=prepare)
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Another package on the path that registers a toy, a broken entry and something else."""
    (tmp_path / "toy_package.py").write_text(TOY)
    (tmp_path / "broken_package.py").write_text("import a_module_that_is_not_there\n")
    info = tmp_path / "toy_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        textwrap.dedent(
            """
            [qvg.models]
            toy = toy_package:ENTRY
            broken = broken_package:ENTRY
            number = toy_package:TOY_NUMBER
            longcat = toy_package:ENTRY
            """
        )
    )
    (tmp_path / "toy_package.py").write_text(TOY + "\nTOY_NUMBER = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._foreign.cache_clear()
    yield tmp_path
    registry._foreign.cache_clear()
    for name in ("toy_package", "broken_package"):
        sys.modules.pop(name, None)


def test_a_model_from_outside_is_found_and_generates(outside, tmp_path, capsys):
    with as_in_its_own_process(tmp_path):
        argv = ["generate", "toy", "--brightness", "20", "--out", str(tmp_path / "out")]
        assert cli.main(argv) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["arms"]) == ["bf16", "rtn"]
    assert report["config"]["brightness"] == 20
    assert (tmp_path / "out" / "video.mp4").stat().st_size > 0


def test_its_options_are_its_own(outside, capsys):
    assert cli.main(["generate", "toy", "--help"]) in (0, None)
    out = capsys.readouterr().out
    assert "--brightness N" in out and "gray level" in out and "--tour" not in out
    assert cli.main(["generate", "toy", "--tour", "3"]) == 2
    assert "--tour. Models that have it: pocket-world" in capsys.readouterr().err
    assert cli.main(["generate", "longcat", "--brightness", "3"]) == 2
    assert "--brightness. Models that have it: toy" in capsys.readouterr().err


def test_a_broken_entry_says_why_and_the_others_work(outside, capsys):
    assert cli.main(["generate", "broken"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "model='broken'" in err and "No module named 'a_module_that_is_not_there'" in err
    assert cli.main(["generate", "number"]) == 2
    assert "is a int; accepted: a qvg_jax.app.model_entry.ModelEntry" in capsys.readouterr().err
    assert registry.named("toy").name == "toy"
    cli.main(["generate", "--help"])
    listed = capsys.readouterr().out
    assert "toy" in listed and "Gray frames." in listed and "broken" in listed


def test_a_name_of_this_repository_is_not_replaced(outside):
    assert registry.named("longcat").prepare.__name__ == "prepare"
    assert registry.named("longcat").summary.startswith("LongCat")


def test_an_unknown_name():
    with pytest.raises(UserError, match="model='wan' is not known; accepted: pocket-world"):
        registry.named("wan")


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_entries_are_complete(name):
    entry = registry.named(name)
    assert entry.name == name and entry.summary.endswith(".")
    assert entry.options().codecs[0] == entry.default_codec
    assert entry.options(codec="auto", compare=("rtn",)).codecs == (entry.default_codec, "rtn")
    assert "accepted" in entry.memory_advice(entry.options())


def test_options_come_with_what_reads_them():
    def prepare(options):
        raise AssertionError

    with pytest.raises(TypeError, match="give both plan and plan_options"):
        ModelEntry(
            name="x", summary="X.", options=GenerateOptions, prepare=prepare,
            plan_options=PlanOptions,
        )  # fmt: skip


def test_a_deferred_function_is_imported_when_it_is_called():
    assert deferred("math:sqrt")(9) == 3
    with pytest.raises(ModuleNotFoundError):
        deferred("no_such_module:f")()


@pytest.mark.parametrize("name", registry.names())
def test_codecs_and_walks_are_checked_before_a_model_is_imported(name, tmp_path, monkeypatch):
    entry, late = registry.named(name), f"{registry.named(name).options.__module__}"
    monkeypatch.delitem(sys.modules, late.replace(".entry", ".job"), raising=False)
    bad = [dict(codec="zip"), dict(compare=("rtn", "rtn:mood=1"))]
    if "actions" in {f.name for f in dataclasses.fields(entry.options)}:
        bad.append(dict(actions="w-8,jump-2"))
    for given in bad:
        options = entry.options(out=tmp_path / "new" / "out", **given)
        with pytest.raises(UserError, match="zip|mood|jump-2"):
            check_early(entry, options)
    entry.check(entry.options(compare=("rtn", "bf16")))
    assert late.replace(".entry", ".job") not in sys.modules
    assert not (tmp_path / "new").exists()
