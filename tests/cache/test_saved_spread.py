"""Caches on disk: saved on so many devices, restored on others."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import qvg_jax as qvg
from qvg_jax.cache.plan import Plan
from qvg_jax.cache.saved import from_saved, to_saved
from tests.support.spread_caches import CODECS, SIZES, block, grown, step


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_run_on_eight_devices_goes_on_on_two_and_on_one(tmp_path):
    saved = grown(Plan(spans=8), 10)
    with ocp.StandardCheckpointer() as files:
        files.save(tmp_path / "cache", to_saved(saved))
    want = step(grown(None, 10), *block(10))
    for plan in (Plan(spans=2), Plan()):
        like = qvg.KVCache.create(**SIZES | CODECS, sharding=plan)
        target = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if isinstance(x, jax.Array)
            else x
            for name, x in to_saved(like).items()
        }
        with ocp.StandardCheckpointer() as files:
            cache = from_saved(files.restore(tmp_path / "cache", target), like)
        assert [x.sharding for x in jax.tree.leaves(cache)] == [
            x.sharding for x in jax.tree.leaves(like)
        ]
        same(qvg.spread(step(cache, *block(10)), None), want)
