"""The benchmark of the kernels without a GPU: what it measures by XLA, and what users add."""

import argparse

import pytest

from benchmarks import encode, kernels
from benchmarks.attention_cases import Row
from benchmarks.decode_cases import CODECS, FORMS
from qvg_jax.attention.formats import scheme_of


@pytest.mark.slow
def test_other_implementations_are_timed_beside_ours(monkeypatch, capsys):
    monkeypatch.setattr(
        kernels, "ROWS", (Row("tiny", 2, 16, 512, 2), Row("wide", 1, 16, 512, 1, 64))
    )
    seen = []

    def mine(row, arrays):
        seen.append({name: x.shape for name, x in arrays.items() if name != "view"})
        return lambda: seen.append("run"), lambda: seen.append("wait")

    rows = kernels.attention_table(2, ["tiny"], ["xla"], also={"mine:f": mine})
    assert [(r["row"], r["read"]) for r in rows] == [("tiny", "xla"), ("tiny", "mine:f")]
    assert all(r["ms"] > 0 and r["keys"] == 2 * 512 + 16 for r in rows)
    shape = (1, 16, 2, 128)
    whole = (1, 1040, 2, 128)
    assert seen[0] == {"q": shape, "k": shape, "v": shape, "keys": whole, "values": whole}
    assert seen[1:3] == ["run", "wait"] and seen[-1] == "wait"  # the first call is not measured
    assert "tiny, mine:f" in capsys.readouterr().out
    (row,) = kernels.attention_table(1, ["wide"], ["xla"])
    assert row["row"] == "wide"


@pytest.mark.slow
def test_decoding_and_encoding_by_xla_stand_beside_a_copy(monkeypatch):
    monkeypatch.setattr(kernels, "DECODE", ((2, 512),))
    monkeypatch.setattr(encode, "SHAPES", {"tiny": (2, 256)})
    rows = kernels.decode_table(1, decoders=["xla"])
    names = {f"{x} to bf16, {form}, xla" for x in ("values", "keys, rotated") for form in CODECS}
    assert {r["what"] for r in rows} == names | {"copy bf16"}
    only_kernels = ["--codecs", "--shapes", "tiny", "--repeats", "1"]
    rows = encode.main(["--implementation", "xla", *only_kernels])["encode"]
    names = {"k-means sums", "subtract", "subtract by a metric", *encode.FORMS, *encode.DITHERED}
    assert {f"{name}, xla" for name in names} < {r["what"] for r in rows}
    assert all(r["ms"] > 0 for r in rows)


def test_codecs_that_xla_decodes_have_the_forms_that_kernels_decode():
    for form, codec in CODECS.items():
        assert scheme_of(codec(), 128) == FORMS[form]


@pytest.mark.parametrize("text", ["json", "json:nothing", "no_such_module:f", ":f"])
def test_a_function_that_is_not_there_is_refused_before_anything_is_measured(text):
    with pytest.raises(argparse.ArgumentTypeError, match="give MODULE:FUNCTION"):
        kernels._named(text)
