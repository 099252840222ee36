"""One call of a fused attention: its parts, and how many there are."""

import jax
import jax.numpy as jnp
import numpy as np

from qvg_jax.attention.flash import no_keys, parts_for, split, visit


def test_parts_without_a_key_count_nothing():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 8)) for i, n in enumerate((5, 12, 12)))
    run = visit(no_keys(q), q, k, v, 3, backend="xla", parts=4)
    logits = jnp.einsum("nqd,nkd->nqk", q, k[:, :3]) * 8**-0.5
    want = jnp.einsum("nqk,nkd->nqd", jax.nn.softmax(logits, -1), v[:, :3])
    np.testing.assert_allclose(run.out_nQD, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run.lse_nQ, jax.nn.logsumexp(logits, -1), rtol=1e-5, atol=1e-5)
    more = visit(run, q, k, v, 0, backend="xla", parts=4)
    np.testing.assert_allclose(more.out_nQD, run.out_nQD, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(more.lse_nQ, run.lse_nQ, rtol=1e-6, atol=1e-6)


def test_few_queries_are_split_and_many_are_not():
    # 24 blocks of threads for 132 multiprocessors: five parts run at once. 66 x 132 fill them alone.
    assert parts_for(12, 256, 32_768, 132) == 5
    assert parts_for(132, 128 * 66, 32_768, 132) == 1
    assert parts_for(12, 256, 100, 132) == 1


def test_parts_are_equal_and_hold_all_keys():
    assert split(1, 1, 100) == (1, 100)
    assert split(1, 1, 100, 3) == (3, 102)
    parts, keys = split(12, 256, 32_768)
    assert keys >= 32_768 and keys % (64 * parts) == 0
