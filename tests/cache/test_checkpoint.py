"""Caches on disk: saved on so many devices, restored on others."""

import jax
import numpy as np
import pytest

import qvg_jax as qvg
from qvg_jax.cache.checkpoint import restore_cache, save_cache
from qvg_jax.cache.plan import Plan
from tests.support.spread_caches import CODECS, SIZES, block, grown, step


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_run_on_eight_devices_goes_on_on_two_and_on_one(tmp_path):
    saved = grown(Plan(spans=8), 10)
    save_cache(tmp_path / "cache", saved)
    want = step(grown(None, 10), *block(10))
    for plan in (Plan(spans=2), Plan()):
        like = qvg.KVCache.create(**SIZES | CODECS, sharding=plan)
        cache = restore_cache(tmp_path / "cache", like)
        assert [x.sharding for x in jax.tree.leaves(cache)] == [
            x.sharding for x in jax.tree.leaves(like)
        ]
        same(qvg.spread(step(cache, *block(10)), None), want)


def test_what_is_not_the_cache_that_is_wanted_is_refused(tmp_path):
    small = dict(heads=1, head_dim=8, block_tokens=2, span_blocks=1, max_spans=2, pos_dims=0)
    cache = qvg.KVCache.create(**small)
    with pytest.raises(ValueError, match=r"has no cache.json; accepted: what save_cache wrote"):
        restore_cache(tmp_path, cache)
    save_cache(tmp_path / "a", cache)
    with pytest.raises(ValueError, match="is not empty; accepted: a new folder"):
        save_cache(tmp_path / "a", cache)
    with pytest.raises(ValueError, match=r"other sizes: .dense_k is \[\[1, 1, 1, 10, 8\]"):
        restore_cache(tmp_path / "a", qvg.KVCache.create(**small | dict(sink_blocks=2)))
    same(restore_cache(tmp_path / "a", cache), cache)
