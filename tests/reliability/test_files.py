"""Every kind of bad file: one line that names it, at once, in little memory, and no traceback."""

import contextlib
import dataclasses
import json
import time
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.common.checkpoint import check, checkpoint_files
from models.common.shards import checkpoint_shards
from models.pocket_world.params import read_header
from models.runs.checkpoint_folder import find_parts
from models.runs.pictures import upright
from models.runs.prompts import stand_in_embedding
from models.self_forcing.entry import Options
from models.self_forcing.params import WEIGHTS
from models.self_forcing.releases import RELEASES
from models.self_forcing.settings import chosen_sizes
from qvg_jax.app import cli
from qvg_jax.errors import UserError
from qvg_jax.reading.tensors import count_nonfinite
from qvg_jax.study.capture import load_captured
from tests.support import bad_files as bad
from tests.support import tiny_self_forcing as tiny
from tests.support.outputs import beside_progress
from tests.support.tiny_world import as_in_its_own_process, random_weights

DIT_NAMES = RELEASES["self-forcing"].dit_names

SECONDS = 2.0  # of the processor
SPARE = 2**22  # bytes beside twice the file's size: what any call needs


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with as_in_its_own_process(tmp_path_factory.getbasetemp()):
        empty = tmp_path_factory.mktemp("empty") / "empty"
        empty.touch()
        for read in (lambda p: next(upright(p)), load_captured, read_header):
            with contextlib.suppress(UserError):
                read(empty)  # imports what it needs
        yield


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("weights")).read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.weights_folder(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def skeleton():
    return WEIGHTS.skeleton(tiny.sizes().dit)


@contextlib.contextmanager
def refused(path, *words):
    """Expects one UserError that names the file, within the limits of time and memory."""
    size = path.stat().st_size if path.is_file() else 0
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(UserError) as caught:
            yield
        seconds = time.process_time() - start
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert path.name in line and all(word in line for word in words), line
    assert line.isprintable() or "\n  " in line, line  # a checkpoint's list of problems has lines
    assert not any(c in line for c in "\x1b\x07\0")
    assert most <= 2 * size + SPARE, f"{most} bytes for a file of {size}"
    assert seconds < SECONDS


@pytest.mark.parametrize("kind", bad.TENSORS)
def test_a_bad_safetensors_file(kind, skeleton, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(bad.TENSORS[kind])
    with refused(path, "missing or corrupt"):
        read_header(path)
    with refused(path, "not a readable safetensors file"):
        check(skeleton, path, WEIGHTS.rules)


@pytest.mark.parametrize("name, value", bad.EMBEDDED, ids=lambda x: ascii(x)[:20])
def test_a_bad_embedded_configuration(name, value, smoke, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(bad.embedded(smoke, **{name: value}))
    shown = "\\x1b" if name == bad.ESCAPE else name
    with refused(path, "not a pocket world file", shown):
        read_header(path)


@pytest.mark.parametrize("kind", [*bad.TEXTS, None])
def test_a_bad_text_as_the_embedded_configuration(kind, smoke, tmp_path):
    path = tmp_path / "w.safetensors"
    text = None if kind is None else bad.TEXTS[kind].decode("latin-1")
    path.write_bytes(bad.in_header(smoke, text))
    with refused(path, "not a pocket world file", "config"):
        read_header(path)


WAN = [(name, value) for name, values in bad.WAN.items() for value in values]


@pytest.mark.parametrize("name, value", WAN, ids=lambda x: ascii(x)[:20])
def test_a_bad_config_json(name, value, folder):
    config = json.loads((folder / "config.json").read_text())
    config = json.loads(json.dumps(config | {name: value}))  # as it comes out of a file
    parts = dataclasses.replace(find_parts(folder, DIT_NAMES), config=config)
    with refused(folder / "config.json"):
        chosen_sizes(Options(weights=str(folder)), parts, tiny.sizes())


@pytest.mark.parametrize("kind", bad.TEXTS)
def test_a_bad_text_as_config_json(kind, folder):
    path, before = folder / "config.json", (folder / "config.json").read_bytes()
    path.write_bytes(bad.TEXTS[kind])
    try:
        with refused(path):
            parts = find_parts(folder, DIT_NAMES)
            chosen_sizes(Options(weights=str(folder)), parts, tiny.sizes())
    finally:
        path.write_bytes(before)


def test_a_config_json_that_lacks_something(folder):
    config = json.loads((folder / "config.json").read_text())
    parts = find_parts(folder, DIT_NAMES)
    for name in ("num_layers", "dim", "eps", "text_len"):
        less = dataclasses.replace(parts, config={k: v for k, v in config.items() if k != name})
        with refused(folder / "config.json", name):
            chosen_sizes(Options(weights=str(folder)), less, tiny.sizes())


@pytest.mark.parametrize("kind", [*bad.INDICES, *bad.TEXTS])
def test_a_bad_index(kind, tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    data = bad.TEXTS.get(kind) or json.dumps(bad.INDICES.get(kind)).encode()
    index.write_bytes(b"" if kind == "empty" else data)
    missing = kind in ("a file that is not there", "99,999 shards")
    with refused(tmp_path if missing else index, *([] if missing else ["not an index"])):
        checkpoint_shards(tmp_path)


@pytest.mark.parametrize("kind", bad.ARRAYS)
def test_a_bad_npz(kind, tmp_path):
    path = tmp_path / "kv.npz"
    path.write_bytes(bad.ARRAYS[kind]())
    with refused(path):
        load_captured(path)


def test_the_corpus_of_arrays_begins_with_a_good_one(tmp_path):
    path = tmp_path / "kv.npz"
    for compression in (0, 8):
        path.write_bytes(bad.npz(bad.plain(), compression))
        np.testing.assert_array_equal(load_captured(path).k_LBHTD, bad.plain()["k"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_bfloat16_is_read_as_what_it_is(save, tmp_path):
    arrays = {n: x.astype(bad.ml_dtypes.bfloat16) for n, x in bad.plain().items()}
    arrays["k"] = np.asfortranarray(arrays["k"])
    save(tmp_path / "kv.npz", **arrays)
    captured = load_captured(tmp_path / "kv.npz")
    for x, name in ((captured.k_LBHTD, "k"), (captured.v_LBHTD, "v"), (captured.q_LBHQD, "q")):
        assert x.dtype == "bfloat16"
        np.testing.assert_array_equal(x, arrays[name])


@pytest.mark.parametrize("kind", bad.PICTURES)
def test_a_bad_picture(kind, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(bad.PICTURES[kind])
    with refused(path):
        next(upright(path))


def test_a_command_says_it_in_one_line(smoke, tmp_path, capsys):
    path = tmp_path / "kv.npz"
    path.write_bytes(bad.ARRAYS["a bomb"]())
    assert cli.main(["tune", str(path), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert beside_progress(out) == "" and err.count("\n") == 1 and "at most 16 times" in err
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(bad.embedded(smoke, width=0))
    assert cli.main(["generate", "--weights", str(weights)]) == 2
    out, err = capsys.readouterr()
    assert (
        beside_progress(out) == "" and err.count("\n") == 1 and "width=0: expected int >= 1" in err
    )
    assert not (tmp_path / "out").exists()


WRAPPED = ["_orig_mod.", "module.", "generator.", "generator_ema.", "model.diffusion_model.",
           "diffusion_model.", "_fsdp_wrapped_module.", "model._fsdp_wrapped_module.",
           "module.model._checkpoint_wrapped_module."]  # fmt: skip


@pytest.mark.parametrize("prefix", WRAPPED)
def test_wrapped_checkpoints_are_read(prefix, folder, skeleton, tmp_path):
    arrays = load_file(folder / tiny.FILES["dit"])
    path = tmp_path / "w.safetensors"
    save_file({prefix + name.removeprefix("model."): x for name, x in arrays.items()}, path)
    check(skeleton, path, WEIGHTS.rules)


def test_an_unknown_wrapper_is_named_first(folder, tmp_path):
    arrays = load_file(folder / tiny.FILES["dit"])
    path = tmp_path / "w.safetensors"
    save_file({"their.student." + n.removeprefix("model."): x for n, x in arrays.items()}, path)
    with pytest.raises(UserError) as caught:
        WEIGHTS.check(path, tiny.sizes().dit)
    first = str(caught.value).splitlines()[1]
    assert f"{len(arrays)} names begin with 'their.student.'" in first


def test_a_variant_beside_its_file_is_left_alone(tmp_path):
    for name in ("x.safetensors", "x.fp16.safetensors", "y.fp16.safetensors"):
        (tmp_path / name).write_bytes(b"")
    found = [p.name for p in checkpoint_files(tmp_path)]
    assert found == ["x.safetensors", "y.fp16.safetensors"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_named_with_its_file(value, folder, tmp_path):
    arrays = load_file(folder / tiny.FILES["dit"])
    name = sorted(arrays)[3]
    arrays[name] = arrays[name].copy()
    arrays[name].flat[0] = value
    save_file(arrays, tmp_path / "w.safetensors")
    with refused(tmp_path / "w.safetensors", f"{name} has 1 NaN or Inf"):
        WEIGHTS.load(tmp_path / "w.safetensors", tiny.sizes().dit)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_values_that_are_no_numbers_are_counted(dtype):
    x = np.linspace(-3, 3, 24).astype(dtype).reshape(4, 6)
    assert count_nonfinite(x) == count_nonfinite(x[::2, ::3]) == 0
    x[1, 2], x[3, 3], x[2, 0] = np.nan, np.inf, -np.inf
    assert count_nonfinite(x) == count_nonfinite(x.T) == 3 and count_nonfinite(x[:1]) == 0


@pytest.mark.parametrize("prompt", ["café", "it’s a fox", "\N{FOX FACE} runs", "a & b", "\udcff"])
def test_any_prompt_has_a_stand_in(prompt):
    embedded = stand_in_embedding(prompt, slots=9, width=4, dtype=np.float32)
    assert embedded.text_BUE.shape == (1, len(prompt.split()), 4) and embedded.said == []
    again = stand_in_embedding(prompt.replace("é", "e\u0301"), slots=9, width=4, dtype=np.float32)
    np.testing.assert_array_equal(embedded.text_BUE, again.text_BUE)
