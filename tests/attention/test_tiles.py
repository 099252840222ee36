"""Block-sparse attention: against a dense mask, by the rule written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvg_jax.attention import tiles
from qvg_jax.attention.tiles import TileRule, from_tiles, tile_attention, to_tiles

B, H, D = 2, 2, 8
QUERIES, KEYS = (2, 4, 6), (4, 4, 6)  # frames, rows, columns
RULES = {
    "top tiles": TileRule(query_tile=(2, 2, 3), key_tile=(2, 2, 2), sparsity=0.7),
    "a share of the mass": TileRule(
        query_tile=(1, 2, 3), key_tile=(2, 1, 3), sparsity=None, mass=0.6
    ),
    "both": TileRule(query_tile=(1, 2, 3), key_tile=(2, 1, 3), sparsity=0.75, mass=0.5),
    "all of them": TileRule(query_tile=(2, 4, 6), key_tile=(1, 1, 1), sparsity=0.0),
}


def tokens(seed, grid, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, *grid, H, D)) + rng.standard_normal((B, 1, *grid[1:], H, D))
    return jnp.asarray(1.5 * x.reshape(B, -1, H, D), dtype)


def number_of_tile(grid, tile):
    """The number of the tile of each token."""
    at = np.indices(grid).reshape(3, -1).T // tile
    return np.ravel_multi_index(at.T, np.array(grid) // tile)


def masked(q, k, v, rule):
    """Attention by the rule, with a mask over all pairs of tokens; also how many tiles each query tile keeps."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    of_q, of_k = number_of_tile(QUERIES, rule.query_tile), number_of_tile(KEYS, rule.key_tile)
    out, counts = np.zeros_like(q), []
    for b, h in np.ndindex(B, H):
        for n in range(of_q.max() + 1):
            mine = q[b, of_q == n, h]
            score = [mine.mean(0) @ k[b, of_k == m, h].mean(0) for m in range(of_k.max() + 1)]
            best, count = np.argsort(score)[::-1], 0
            if rule.sparsity is not None:
                count = int((1 - rule.sparsity) * len(score))
            if rule.mass is not None:
                share = np.exp(np.array(score) / np.sqrt(D))[best]
                inside = int((np.cumsum(share / share.sum()) <= rule.mass).sum())
                count = max(count, inside, 1)
            counts.append(count)
            seen = np.isin(of_k, best[:count])
            p = np.exp(mine @ k[b, seen, h].T / np.sqrt(D))
            out[b, of_q == n, h] = p @ v[b, seen, h] / p.sum(1, keepdims=True)
    return out, counts


@pytest.mark.parametrize("name", RULES)
def test_equals_a_dense_mask(name, monkeypatch):
    # Few keys at a time and one head at a time: several steps of the online softmax, of which the last is padded.
    monkeypatch.setattr(tiles, "_KEYS_AT_ONCE", 16)
    monkeypatch.setattr(tiles, "_STEP_BYTES", 1)
    rule = RULES[name]
    q, k, v = tokens(0, QUERIES), tokens(1, KEYS), tokens(2, KEYS)
    out = jax.jit(lambda *x: tile_attention(*x, rule, query_grid=QUERIES, key_grid=KEYS))(q, k, v)
    want, counts = masked(q, k, v, rule)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
    if name == "all of them":
        dense = jax.nn.dot_product_attention(q, k, v)
        np.testing.assert_allclose(out, dense, rtol=2e-5, atol=2e-5)
    else:
        assert max(counts) < 12 and (rule.mass is None or len(set(counts)) > 1), counts


def test_bfloat16_is_as_close_as_its_rounding():
    rule = RULES["top tiles"]
    q, k, v = (tokens(i, g, jnp.bfloat16) for i, g in enumerate((QUERIES, KEYS, KEYS)))
    out = tile_attention(q, k, v, rule, query_grid=QUERIES, key_grid=KEYS)
    assert out.dtype == jnp.bfloat16
    want, _ = masked(q, k, v, rule)
    assert np.linalg.norm(np.asarray(out, np.float64) - want) < 0.01 * np.linalg.norm(want)


def test_no_array_holds_all_pairs_of_tokens():
    grid = (8, 16, 16)
    x = jax.ShapeDtypeStruct((1, 2048, 1, D), jnp.float32)
    rule = TileRule(sparsity=0.75)
    program = jax.jit(lambda *x: tile_attention(*x, rule, query_grid=grid, key_grid=grid))
    spent = program.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    assert spent < 2048 * 2048 * 4 / 2


def test_tiles_are_boxes_of_tokens_and_go_back():
    numbers = jnp.arange(2 * 4 * 6.0).reshape(1, 48, 1, 1)
    x = to_tiles(numbers, QUERIES, (2, 2, 3))
    assert x.shape == (1, 1, 4, 12, 1)
    assert x[0, 0, 1, :, 0].tolist() == [3, 4, 5, 9, 10, 11, 27, 28, 29, 33, 34, 35]
    assert (from_tiles(x, QUERIES, (2, 2, 3)) == numbers).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(sparsity=1.0), "sparsity=1.0 is not accepted"),
        (dict(mass=1.5), "mass=1.5 is not accepted"),
        (dict(sparsity=None), "one of them, or both"),
        (dict(key_tile=(4, 0, 4)), "key_tile=.* is not accepted"),
        (dict(key_tile=(3, 2, 2), sparsity=0.5), r"key_tile=\(3, 2, 2\) does not divide grid"),
        (dict(key_tile=(4, 4, 6)), "keeps none of 1 key tiles"),
    ],
)
def test_bad_rules_say_what_is_accepted(wrong, message):
    q, k = tokens(0, QUERIES), tokens(1, KEYS)
    with pytest.raises(ValueError, match=message):
        rule = TileRule(**dict(query_tile=(1, 1, 1)) | wrong)
        tile_attention(q, k, k, rule, query_grid=QUERIES, key_grid=KEYS)
    with pytest.raises(ValueError, match="has 48 tokens; accepted: one of 96"):
        tile_attention(
            q, k, k, TileRule(query_tile=(1, 1, 1)), query_grid=QUERIES, key_grid=(2, 4, 6)
        )
