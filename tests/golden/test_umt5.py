"""umT5 against the golden vectors: float32 to 1e-4 absolute, bfloat16 to 5 % relative L2."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from models.common import CheckpointError
from models.umt5 import (
    UMT5,
    PromptTooLongWarning,
    Tokenizer,
    Tokens,
    UMT5Config,
    borrow_umt5,
    clean_prompt,
    encode_prompts,
    encode_tokens,
    load_umt5,
    relative_buckets,
)
from tests.support.golden import close

SUBJECT = "self_forcing"
BF16_RELATIVE_L2 = 0.05


@pytest.fixture(scope="module")
def io(vectors):
    return vectors("umt5_tiny_io")


@pytest.fixture(scope="module")
def fields(folder):
    return folder.config["umt5"]


@pytest.fixture(scope="module")
def model(folder, fields):
    config = UMT5Config.from_json(fields, dtype=jnp.float32)
    return load_umt5(folder.path / "umt5_tiny.safetensors", config)


def test_relative_buckets_exactly(io, fields):
    ours = relative_buckets(io["rel_pos"], fields["num_buckets"])
    np.testing.assert_array_equal(ours, io["rel_bucket"])


def test_first_block(model, io):
    @jax.jit
    def stages(model, ids, mask):
        block = jax.tree.map(lambda x: x[0], model.blocks)
        bucket_TT = model.buckets(ids.shape[1])
        out = {"pos_bias_l0_head0": block.bias(bucket_TT)[0]}
        out["emb"] = x = model.token_embedding(ids)
        out["blk0_norm1"] = y = block.norm1(x)
        out["blk0_attn"] = y = block.attention(y, mask.astype(bool), bucket_TT)
        out["blk0_ffn"] = block.feed_forward(block.norm2(x + y))
        out["blk0_out"] = block(x, mask.astype(bool), bucket_TT)
        return out

    for name, x in stages(model, io["ids"], io["mask"]).items():
        close(x, io[name])
    close(jax.nn.gelu(io["gelu_x"], approximate=True), io["gelu_y"])


def test_embeddings(model, io):
    mask = io["mask"]
    np.testing.assert_array_equal(mask.sum(1), io["seq_lens"])
    raw, zeroed = jax.jit(lambda m, *a: (m(*a), m.encode(*a)))(model, io["ids"], mask)
    close(raw[mask.astype(bool)], io["out_raw"][mask.astype(bool)])
    close(zeroed, io["out_zeroed"])
    assert not zeroed[~mask.astype(bool)].any()


def test_bfloat16(folder, fields, io):
    config = UMT5Config.from_json(fields)
    model = load_umt5(folder.path / "umt5_tiny.safetensors", config)
    ours = encode_tokens(model, Tokens(io["ids"], io["mask"].astype(bool)))
    assert ours.dtype == jnp.bfloat16
    golden = io["out_zeroed_bf16"]
    difference = np.asarray(ours, np.float32) - golden
    assert np.linalg.norm(difference) < BF16_RELATIVE_L2 * np.linalg.norm(golden)


def test_hugging_face_names_load_the_same(folder, model, tmp_path):
    inner = {"attn": "0.SelfAttention", "norm1": "0.layer_norm", "norm2": "1.layer_norm"}
    inner |= {"pos_embedding.embedding": "0.SelfAttention.relative_attention_bias"}
    inner |= {"ffn.gate.0": "wi_0", "ffn.fc1": "wi_1", "ffn.fc2": "wo"}

    def name_there(name):
        if name.startswith("token"):
            return "shared.weight"
        if name.startswith("norm"):
            return "encoder.final_layer_norm.weight"
        _, i, rest = name.split(".", 2)
        for ours, there in inner.items():
            if rest.startswith(ours):
                there = "1.DenseReluDense." * there.startswith("w") + there
                return f"encoder.block.{i}.layer.{there}{rest.removeprefix(ours)}"
        raise KeyError(name)

    tensors = {
        name_there(k): v for k, v in load_file(folder.path / "umt5_tiny.safetensors").items()
    }
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" in tensors
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()  # tied
    tensors["decoder.final_layer_norm.weight"] = np.ones(3, np.float32)  # left out
    save_file(tensors, tmp_path / "t5.safetensors")
    other = load_umt5(tmp_path / "t5.safetensors", model.config)
    jax.tree.map(np.testing.assert_array_equal, other, model)


def test_wrong_checkpoint_lists_keys(folder, model, tmp_path):
    tensors = load_file(folder.path / "umt5_tiny.safetensors")
    del tensors["blocks.1.attn.q.weight"], tensors["norm.weight"]
    tensors["blocks.0.attn.q.bias"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError) as e:
        load_umt5(tmp_path / "t5.safetensors", model.config)
    for text in ("3 problems", "missing: blocks.q.kernel[1]", "missing: norm.weight"):
        assert text in str(e.value)
    assert "unused: blocks.0.attn.q.bias" in str(e.value)


def test_memory_is_released(folder, model, io):
    path = folder.path / "umt5_tiny.safetensors"
    with borrow_umt5(path, model.config) as borrowed:
        leaves = jax.tree.leaves(borrowed)
        assert not any(x.is_deleted() for x in leaves)
    assert all(x.is_deleted() for x in leaves)
    with pytest.raises(KeyError), borrow_umt5(path, model.config) as borrowed:
        leaves = jax.tree.leaves(borrowed)
        raise KeyError
    assert all(x.is_deleted() for x in leaves)

    words = {f"w{i}": int(i) for i in io["ids"][0]}
    length = io["ids"].shape[1]
    tokenizer = Tokenizer(lambda text: [words[w] for w in text.split()], str, length)
    n = min(io["seq_lens"][0], length) - 1
    prompt = " ".join(f"w{i}" for i in io["ids"][0, :n])
    out = encode_prompts([prompt], tokenizer, path, model.config)
    tokens = tokenizer([prompt])
    close(out, encode_tokens(model, tokens))
    assert not out[0, n + 1 :].any() and out[0, n].any()
    with pytest.raises(ValueError, match="does not belong"):
        encode_tokens(model, Tokens(tokens.ids_BT + model.config.vocabulary, tokens.mask_BT))


def test_released_structure():
    model = nnx.eval_shape(lambda: UMT5(UMT5Config.xxl(), rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(model)) == 5_680_910_336
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}


def test_bad_config():
    fields = dict(vocab=8, dim=4, dim_attn=7, dim_ffn=4, num_heads=2, num_layers=1, num_buckets=32)
    with pytest.raises(ValueError, match="num_heads=2 must divide dim_attn=7"):
        UMT5Config.from_json(fields)
    with pytest.raises(ValueError, match="shared_pos"):
        UMT5Config.from_json(fields | {"shared_pos": True})
    with pytest.raises(ValueError, match="buckets=30"):
        UMT5Config.from_json(fields | {"dim_attn": 8, "num_buckets": 30})


def test_clean_prompt(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)  # as if not installed
    assert clean_prompt("  a\tcat \n\n on a  <mat> ") == "a cat on a <mat>"
    for text in ("a café", "salt &amp; pepper", "\x1b[0m"):
        with pytest.raises(ImportError, match=r"qvg-jax\[text\]"):
            clean_prompt(text)
    fake = SimpleNamespace(fix_text=lambda t: t.replace("Ã©", "é"))
    monkeypatch.setitem(sys.modules, "ftfy", fake)
    assert clean_prompt("cafÃ© &amp;amp; &amp;lt;tea&amp;gt;\u00a0 ") == "café & <tea>"


class FakeSentencePiece:
    """The surface of both libraries that the wrapper uses; an id is a letter's place + 2."""

    def __init__(self, model_file=None, eos_id=1):
        self._eos_id = eos_id

    def encode(self, text, add_special_tokens=None):
        ids = [ord(c) - ord("a") + 2 for c in text.replace(" ", "")]
        return ids if add_special_tokens is None else SimpleNamespace(ids=ids)

    def decode(self, ids):
        return "".join(chr(i - 2 + ord("a")) for i in ids)

    def pad_id(self):
        return 0

    def eos_id(self):
        return self._eos_id

    def token_to_id(self, token):
        return {"<pad>": 0, "</s>": 1}[token]

    def no_padding(self):
        self.unpadded = True

    def no_truncation(self):
        self.untruncated = True


def test_tokenizer_files(monkeypatch, tmp_path):
    fake = FakeSentencePiece()
    tokenizers = SimpleNamespace(Tokenizer=SimpleNamespace(from_file=lambda path: fake))
    monkeypatch.setitem(sys.modules, "tokenizers", tokenizers)
    sentencepiece = SimpleNamespace(SentencePieceProcessor=FakeSentencePiece)
    monkeypatch.setitem(sys.modules, "sentencepiece", sentencepiece)
    (tmp_path / "spiece.model").touch()
    of_model = Tokenizer.from_file(tmp_path, length=6)
    (tmp_path / "tokenizer.json").touch()
    of_json = Tokenizer.from_file(tmp_path, length=6)
    assert fake.unpadded and fake.untruncated
    for tokenizer in (of_model, of_json):
        ids, mask = tokenizer(["ab c", ""])
        np.testing.assert_array_equal(ids, [[2, 3, 4, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
        np.testing.assert_array_equal(mask, ids != 0)
        assert ids.dtype == np.int32
        with pytest.warns(PromptTooLongWarning, match="prompt 1 has 9 tokens.*'fgh'"):
            ids, mask = tokenizer(["abcde", "abcdefgh"])
        np.testing.assert_array_equal(ids, [[2, 3, 4, 5, 6, 1]] * 2)
        assert mask.all()
    with pytest.raises(TypeError, match="sequence of strings"):
        of_json("a cat")


def test_tokenizer_files_that_do_not_open(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Tokenizer.from_file(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such"):
        Tokenizer.from_file(tmp_path / "absent.json")
    for name in ("a.json", "a.model", "a.txt"):
        (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs tokenizers: pip install 'qvg-jax\[text\]'"):
        Tokenizer.from_file(tmp_path / "a.json")
    with pytest.raises(ValueError, match="accepted"):
        Tokenizer.from_file(tmp_path / "a.txt")
    no_end = SimpleNamespace(SentencePieceProcessor=lambda model_file: FakeSentencePiece(eos_id=-1))
    monkeypatch.setitem(sys.modules, "sentencepiece", no_end)
    with pytest.raises(ValueError, match="no end token"):
        Tokenizer.from_file(tmp_path / "a.model")
