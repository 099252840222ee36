"""Readers of outside files and words under hypothesis: a value or one line, at once, never a traceback.

The normal run tries few inputs of each reader, the same ones every time. The nightly run goes on for
`QVG_FUZZ_SECONDS` (1,200) with each reader and other inputs in every batch:

    QVG_FUZZ_SECONDS=1200 pytest -m nightly -n 0 -s tests/reliability/test_fuzz.py
"""

import io
import json
import os
import time
import types
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from models.common.checkpoint import check
from models.common.lora import merge_lora
from models.common.shards import checkpoint_shards
from models.longcat.config import LongCatConfig
from models.pocket_world.camera import parse_actions
from models.pocket_world.params import load_weights
from models.runs.pictures import upright
from models.runs.prompts import stand_in_embedding
from models.self_forcing.config import SelfForcingConfig
from models.self_forcing.params import WEIGHTS
from models.worldplay import cameras
from qvg_jax.app.convert import _weights
from qvg_jax.app.hub import Address
from qvg_jax.app.option_types import parse_bytes
from qvg_jax.app.video import Mp4
from qvg_jax.codecs import presets
from qvg_jax.errors import UserError, printable
from qvg_jax.reading.schema import read_json
from qvg_jax.study.capture import load_captured
from tests.support import bad_files as bad
from tests.support import tiny_self_forcing as tiny
from tests.support.tiny_world import random_weights

SECONDS = 3.0  # of the processor, for one input
QUICK = 25  # inputs of a reader in the normal run
BATCH = 500

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = [*bad.WAN, "depth", "hidden_size", "num_heads", "mlp_ratio", "text_tokens_zero_pad",
          "enable_bsa", "in_channels", "caption_channels"]  # fmt: skip
WAN = dict(num_layers=2, dim=32, num_heads=2, ffn_dim=40, in_dim=16, out_dim=16, freq_dim=8,
           text_len=7, eps=1e-6, depth=2, hidden_size=24)  # fmt: skip


def mutated(corpus: list[bytes]) -> st.SearchStrategy[bytes]:
    """Files of a corpus with bytes written over, cut out, put in and cut off; and any bytes."""
    edit = st.tuples(
        st.sampled_from(["write", "cut", "insert", "end", "repeat"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=8),
    )

    def edited(file: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
        for kind, where, data in edits:
            at = int(where * len(file))
            file = {
                "write": file[:at] + data + file[at + len(data) :],
                "cut": file[:at] + file[at + len(data) ** 3 :],
                "insert": file[:at] + data + file[at:],
                "end": file[:at],
                "repeat": file[:at] + file[max(0, at - 64) : at] + file[at:],
            }[kind]
        return file

    files = st.builds(edited, st.sampled_from(corpus), st.lists(edit, max_size=4))
    return files | st.binary(max_size=200)


# Each reader gets an input and a folder of its own for files.


def read_weights(data, folder):
    path = folder / "w.safetensors"
    path.write_bytes(data)
    load_weights(path)


def read_checkpoint(data, folder):
    path = folder / "c.safetensors"
    path.write_bytes(data)
    check(_skeleton(), path, WEIGHTS.rules)


def read_lora(data, folder):
    path = folder / "l.safetensors"
    path.write_bytes(data)
    model = types.SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.common.lora.nnx.split", lambda _: (None, None))
        patch.setattr("models.common.lora.nnx.to_flat_state", lambda _: [])
        merge_lora(model, path, ())


def read_index(data, folder):
    (folder / "m.safetensors.index.json").write_bytes(data)
    checkpoint_shards(folder)


def read_config(data, folder):
    (folder / "config.json").write_bytes(data)
    read_json(folder / "config.json", dict)


def read_sizes(fields, folder):
    for make in (SelfForcingConfig.from_wan, LongCatConfig.from_json):
        try:
            made = make(fields)
        except ValueError as error:
            printable(str(error))
        else:
            assert 1 <= made.layers <= 1024 and made.width == made.heads * made.head_dim


def read_captured(data, folder):
    (folder / "kv.npz").write_bytes(data)
    captured = load_captured(folder / "kv.npz")
    assert captured.k_LBHTD.size and np.isfinite(captured.k_LBHTD).all()


def read_picture(data, folder):
    (folder / "a.png").write_bytes(data)
    for _, picture in zip(range(3), upright(folder / "a.png"), strict=False):
        assert picture.width * picture.height <= 2**26


def read_recipe(text, folder):
    try:
        pair = presets.parse_pair(text)
    except ValueError:
        return
    assert len(pair) == 2


def read_words(text, folder):
    for read in (parse_actions, cameras.parse_actions, parse_bytes, Address.parse):
        try:
            read(text)
        except ValueError as error:
            printable(str(error))
    assert printable(text).isprintable()
    stand_in_embedding(text, slots=8, width=4, dtype=np.float32)


def read_entries(tree, folder):
    entry, tensors = _weights(tree, None, np.ndarray, folder / "w.pt")
    assert all(isinstance(x, np.ndarray) for x in tensors.values())


def _skeleton(made=[]):  # noqa: B006 - made once
    if not made:
        made.append(WEIGHTS.skeleton(tiny.sizes().dit))
    return made[0]


def _encoded(image: str, **more) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(48 * 32 * 3, dtype=np.uint8).reshape(32, 48, 3)).save(
        file, format=image, **more
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """For each reader what hypothesis draws its inputs from."""
    folder = tmp_path_factory.mktemp("corpus")
    smoke = random_weights(folder).read_bytes()
    header, _ = bad.split(smoke)
    small = bad.tensors({"__metadata__": header["__metadata__"]})
    exif = Image.Exif()
    exif[0x0112] = 6
    with Mp4(folder / "v.mp4", 8) as video:
        for _ in range(3):
            video.add(np.zeros((32, 48, 3), np.uint8))
    pictures = [_encoded("PNG"), _encoded("JPEG", exif=exif), _encoded("WEBP"), _encoded("GIF"),
                (folder / "v.mp4").read_bytes(), *bad.PICTURES.values()]  # fmt: skip
    arrays = [bad.npz(bad.plain()), bad.npz(bad.plain(), zipfile.ZIP_DEFLATED),
              *(make() for kind, make in bad.ARRAYS.items() if kind != "a bomb")]  # fmt: skip
    stored = list(bad.TENSORS.values())
    texts = [text for text in bad.TEXTS.values() if len(text) < 2**20]  # others only take long
    fields = st.dictionaries(st.sampled_from(FIELDS), JSON | st.integers(1, 64), max_size=5)
    index = JSON | st.fixed_dictionaries({"weight_map": JSON})
    config = json.loads(header["__metadata__"]["config"])
    changed = st.tuples(st.sampled_from([*config, "x"]), JSON).map(
        lambda c: bad.in_header(smoke, json.dumps(config | {c[0]: c[1]}))
    )
    recipe = st.builds(
        "{}:{}={}".format,
        st.sampled_from([*presets.PRESETS, *presets.PAIRS]),
        st.sampled_from(
            ["bits", "num_centroids", "group", "stages", "iters", "mode", "scale_dtype"]
        ),
        st.integers()
        | st.floats()
        | st.text(max_size=9)
        | st.sampled_from(["2", "[]", "None", "{}"]),
    )
    words = st.sampled_from(
        ["w-", "d-8", ",", "hf:", "a/b", "24", "GB", "1e", "9" * 25, "-", "\x1b["]
    )
    tree = st.recursive(
        st.builds(np.zeros, st.just(2)) | st.none() | st.integers(),
        lambda inner: st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=4),
        max_leaves=12,
    )
    return {
        read_weights: mutated([small, *stored]) | changed,
        read_checkpoint: mutated([small, *stored]),
        read_lora: mutated(stored),
        read_index: index.map(lambda x: json.dumps(x).encode()) | mutated(texts),
        read_config: mutated(texts),
        read_sizes: fields.map(lambda x: WAN | x),
        read_captured: mutated(arrays),
        read_picture: mutated(pictures),
        read_recipe: st.text(max_size=40) | recipe,
        read_words: st.text(max_size=40) | st.lists(words | st.text(max_size=3)).map("".join),
        read_entries: tree | JSON,
    }


READERS = [read_weights, read_checkpoint, read_lora, read_index, read_config, read_sizes,
           read_captured, read_picture, read_recipe, read_words, read_entries]  # fmt: skip


def batch(reader, strategy, folder, number, count):
    """Tries `count` inputs; the same number gives the same ones."""

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(strategy)
    def one(value):
        start = time.process_time()
        try:
            reader(value, folder)
        except UserError as error:
            assert printable(str(error)).isprintable()
        assert time.process_time() - start < SECONDS

    one()


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__)
def test_few_inputs(reader, inputs, tmp_path):
    batch(reader, inputs[reader], tmp_path, 0, QUICK)


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__)
def test_many_inputs(reader, inputs, tmp_path):
    end = time.monotonic() + float(os.environ.get("QVG_FUZZ_SECONDS", "1200"))
    number = 1
    while time.monotonic() < end:
        batch(reader, inputs[reader], tmp_path, number, BATCH)
        number += 1
    print(f"{reader.__name__}: {(number - 1) * BATCH} inputs")
