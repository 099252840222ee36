"""What the pages say is true: links lead somewhere, commands are accepted, and the code of "add a ..." works."""

import ast
import contextlib
import importlib.util
import io
import json
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qvg_jax as qvg
from models import registry
from qvg_jax.app import cli
from qvg_jax.attention.formats import scheme_of
from tests.support.pages import ROOT, anchors, code_blocks, commands, links, listed_files, pages
from tests.support.tiny_world import as_in_its_own_process

NAMES = [str(page.relative_to(ROOT)) for page in pages()]
TOY = "docs/add-a-model.md"  # whose commands need its package


def run_blocks(name):
    """Runs the Python of a page from top to bottom; returns its names."""
    names = {"__name__": "page"}
    for block in code_blocks(ROOT / name, "python"):
        exec(compile(block, name, "exec"), names)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in links(page):
        target, _, heading = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not heading or heading in anchors(path), link


@pytest.mark.parametrize("name", [name for name in NAMES if name != TOY])
def test_commands_are_accepted(name):
    for words in commands(ROOT / name):
        if words[0] == "qvg":
            app = cli._app(words[1:])
            app.parse_args(words[1:], exit_on_error=False, print_error=False)
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, words
            tests = [word for word in words[3:] if word.startswith("tests/")]
            assert all(Path(ROOT, test).exists() for test in tests), words


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_code_exist(name):
    """Imports of every Python block, and the files that tables list."""
    for block in code_blocks(ROOT / name, "python"):
        found = [n for n in ast.parse(block).body if isinstance(n, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(found, []), name, "exec"), {})
    for file in listed_files(ROOT / name):
        assert file.exists(), file


@pytest.fixture(scope="module")
def use_it():
    """What the code of the page has defined at its end, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = run_blocks("docs/use-it-in-your-model.md")
    return names, printed.getvalue()


@pytest.mark.slow
def test_code_of_use_it_in_your_model_runs(use_it):
    names, printed = use_it
    assert "384 tokens in 2 spans" in printed and "384 and 128 of 512 tokens" in printed
    assert int(names["mixed"].num_spans) == 0 and names["shared"].layout.plan == qvg.Plan(heads=2)
    assert names["alone"].layout == names["divided"].layout == names["cache"].layout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["how-it-works", "choose-a-codec"])
def test_code_of_the_guide_runs(name, capsys):
    """What the guide prints are numbers that its text relies on; its own assertions hold."""
    names = run_blocks(f"docs/{name}.md")
    printed = capsys.readouterr().out
    if name == "how-it-works":
        assert printed.startswith("2.30 bits")
    else:
        assert names["scores"][0].recipe == "turboquant" and names["scores"][0].best
        assert names["again"][0].bits == names["mine"].bits_per_element((1, 2, 256, 64))


def test_a_codec_from_outside_is_a_value_and_serves_a_cache():
    names = run_blocks("docs/add-a-codec.md")
    codec, cache, signs = names["codec"], names["cache"], names["signs"]
    assert signs(32) == signs(group=32) and str(signs(32)) == "signs(group=32)"
    assert qvg.presets.parse(str(codec)) == codec
    assert int(cache.num_spans) == 1 and int(cache.dense_blocks) == 0
    packed_k, packed_v = (
        jax.tree.map(lambda x: x[0, 0], span) for span in (cache.span_k, cache.span_v)
    )
    assert qvg.packed_bytes(packed_k) == codec.nbytes((1, 2, 128, 64))
    # Attention to what is decoded, written out.
    q, k, v = (names[n].astype(jnp.float32)[0].swapaxes(0, 1) for n in "qkv")
    decoded_k, decoded_v = (codec.decode(x, jnp.float32)[0] for x in (packed_k, packed_v))
    error = decoded_k - jnp.concatenate([k, k], 1)
    assert jnp.linalg.norm(error) < 0.7 * jnp.linalg.norm(decoded_k)  # one bit per channel of noise
    keys, values = jnp.concatenate([decoded_k, k], 1), jnp.concatenate([decoded_v, v], 1)
    logits = jnp.einsum("htd,hsd->hts", q, keys) / 8
    want = jnp.einsum("hts,hsd->thd", jax.nn.softmax(logits), values)
    np.testing.assert_allclose(names["out"][0].astype(jnp.float32), want, atol=0.03)


@pytest.mark.slow
def test_a_decoder_reads_its_prompt_causally_and_its_cache_whole(use_it):
    names, _ = use_it
    cache, padded, f32 = names["cache"], names["padded"], jnp.float32
    assert int(cache.tokens) == 104 and int(cache.num_spans) == 1 and int(cache.filled) == 8
    assert (int(names["shorter"].tokens), int(names["emptied"].tokens)) == (102, 0)
    assert names["beams"].layout.batch == 3 and padded.row_tokens.tolist() == [8, 3]
    # The second row of the batch is its first three tokens, attended causally.
    q, k, v = (names[n][1, :3].astype(f32).swapaxes(0, 1) for n in "qkv")
    turned = [
        names["rope"].rotate(x[None], names["rope"].table(jnp.arange(3.0)[None, :, None]))[0]
        for x in (q, k)
    ]
    k, v = jnp.repeat(turned[1], 2, 0), jnp.repeat(v, 2, 0)
    logits = jnp.einsum("htd,hsd->hts", turned[0], k) / 32**0.5
    logits = jnp.where(jnp.tri(3, dtype=bool)[None], logits, -jnp.inf)
    want = jnp.einsum("hts,hsd->thd", jax.nn.softmax(logits), v)
    np.testing.assert_allclose(names["out"][1, :3].astype(f32), want, atol=0.03)


def test_a_declared_storage_is_read_by_the_kernels_definition():
    names = run_blocks("docs/add-a-kernel-format.md")
    codec, packed = names["codec"], names["packed"]
    assert not isinstance(names["scheme"], str)
    want = codec.decode(packed)[0]
    np.testing.assert_allclose(names["values"].astype(jnp.float32), want.astype(jnp.float32))
    error = want.astype(jnp.float32) - names["x_BHTD"][0]
    assert jnp.linalg.norm(error) < 0.1 * jnp.linalg.norm(names["x_BHTD"][0])
    assert "no storage" in scheme_of(run_blocks("docs/add-a-codec.md")["signs"](), 128)


@pytest.fixture
def toy_package(tmp_path, monkeypatch):
    """The package that the page describes, on the path."""
    (code,), (project,) = (code_blocks(ROOT / TOY, kind) for kind in ("python", "toml"))
    (tmp_path / "toy_model.py").write_text(code)
    points = tomllib.loads(project)["project"]["entry-points"]["qvg.models"]
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[qvg.models]", *lines]))
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._foreign.cache_clear()
    yield
    registry._foreign.cache_clear()
    sys.modules.pop("toy_model", None)


def test_a_model_from_outside_generates_a_video(toy_package, tmp_path, capsys):
    ((_, *words),) = commands(ROOT / TOY)
    out = tmp_path / "out"
    with as_in_its_own_process(tmp_path):
        assert cli.main([*words, "--out", str(out)]) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert list(report["arms"]) == ["bf16", "rtn", "midrise:num_centroids=8"]
    assert report["config"]["contrast"] == 60
    assert (out / "video.mp4").stat().st_size > 0
    assert cli.main([*words, "--weights", "x", "--out", str(out)]) == 2
    assert "the toy has none" in capsys.readouterr().err
