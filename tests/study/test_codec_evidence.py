"""The table of evidence: every recipe finds a form that fits the span, and what does not fit says so."""

import numpy as np
import pytest

from benchmarks import codec_evidence
from qvg_jax.codecs.accounting import pair_bits
from qvg_jax.study.stress import stress


def test_recipes_fit_narrow_heads():
    shape = (1, 6, 4096, 64)
    for recipe in codec_evidence.RECIPES:
        assert pair_bits(codec_evidence.fitting(recipe, shape), shape) < 2.7, recipe
    assert codec_evidence.fitting("dither", shape)[0].spec is not None
    assert pair_bits(codec_evidence.fitting("dither", shape), shape) <= 2.33
    with pytest.raises(ValueError, match="rtn:group=48"):
        codec_evidence.fitting("rtn:group=48", shape)


def test_the_table():
    small = stress(5, frames=4, height=8, width=8, heads=2, head_dim=32, queries=16)
    found = {"bf16": codec_evidence.errors(small, "bf16")}
    assert found["bf16"]["median"] < 0.02
    rough, fine = (codec_evidence.errors(small, f"dither:bits={n}") for n in (2, 4))
    assert fine["mean"] < rough["mean"] / 3 and fine["worst_queries"] < rough["worst_queries"]
    assert codec_evidence.averaged([rough, fine])["worst_layer"] == rough["worst_layer"]
    row = dict(bits=2.2, stress=rough, data="not possible", loop=dict(plain=30.0, folded=29.5))
    lines = codec_evidence.table({"dither": row}).splitlines()
    assert len(lines) == 4 and "30.0, 29.5" in lines[2] and "not possible" in lines[3]
    assert np.isclose(
        rough["bits"], pair_bits(codec_evidence.fitting("dither", (1, 2, 256, 32)), (1, 2, 256, 32))
    )
