"""Encoding of a span on the GPU kernels: k-means and the quantizer behind it.

Every Lloyd iteration is one kernel, which reads x once; the last assignment, the residual, its scales and
codes are another. Between them XLA handles what is as small as the table of centroids.

Differs from the way without kernels: nearest centroids are found with centroids rounded to bfloat16 and scores
compared to 16 bits, so a token nearly as near to two of them may go to the other; the residual is
relative to the stored centroids rounded to bfloat16 (as decoding kernels read them), and between
stages it is bfloat16. The objective agrees to a part in a thousand.

Axes: B batch, H heads, R both flattened, T tokens, D head dim, K centroids, S stages.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_kernels import kmeans, quantize_pack
from qvg_jax.codecs.base import Written
from qvg_jax.codecs.smoothing.lloyd import restarted
from qvg_jax.codecs.smoothing.tables import store_table
from qvg_jax.devices import on_several_devices

__all__ = ["LARGEST", "Clustering", "encode_kernels", "unsupported"]

# Tokens with a non-finite or larger entry do not take part in the clustering: one of them would
# turn the mean of its cluster, and then every distance, into NaN.
LARGEST = 1e15


@dataclasses.dataclass(frozen=True)
class Clustering:
    """Arguments of `kmeans_smoothing`, checked; `table` is how centroids are stored."""

    num_centroids: int
    iters: int
    cold_iters: int
    stages: int
    table: str
    warm_start: bool
    reseed: bool


def unsupported(
    x_BHTD: Array, clustering: Clustering, written: Written | None, kernels: str
) -> str | None:
    """Why the kernels, "mosaic" or "triton", cannot encode x, or None if they can."""
    if written is None:
        return "the quantizer is neither symmetric integers nor a mid-rise grid, with e4m3 scales"
    if clustering.table in ("f16", "f32"):
        return f"centroid_dtype={clustering.table}; the kernels read bf16, int8 or e4m3"
    return (
        kmeans.supported(x_BHTD, clustering.num_centroids, kernels)
        or quantize_pack.supported(written.form, x_BHTD.shape[3])
        or on_several_devices(x_BHTD)
    )


def encode_kernels(
    x_BHTD: Array,
    start: np.ndarray,
    previous_BHSKD: Array | None,
    warm: Array | None,
    clustering: Clustering,
    written: Written,
    result: Callable[..., Any],
    otherwise: Callable[[], Any],
    kernels: str,
) -> Any:
    """Encodes a span that is not `unsupported`.

    Args:
        x_BHTD: the span.
        start: tokens that a cold start takes as centroids.
        previous_BHSKD, warm: the state, if there is one.
        clustering: settings of k-means.
        written: the quantizer.
        result: `result(ids_BHST, (centroids, steps), learned_BHSKD, packed)` makes what is returned.
        otherwise: what is returned, computed without kernels, if a token is not finite or too
            large. It shows in the sums of the first iteration, so that no pass looks for it.
        kernels: "mosaic" or "triton".
    """
    b, h, t, d = x_BHTD.shape
    flat = lambda x: x.reshape(b * h, *x.shape[2:])  # noqa: E731
    heads = lambda x: x.reshape(b, h, *x.shape[1:])  # noqa: E731
    reseed = clustering.reseed

    def sums(x_BHTD: Array, c_BHKD: Array, scores: bool) -> kmeans.Sums:
        out = kmeans.kmeans_sums(flat(x_BHTD), flat(c_BHKD), scores=scores, implementation=kernels)
        return kmeans.Sums(*(y if y is None else heads(y) for y in out))

    def moved(s: kmeans.Sums, c_BHKD: Array) -> Array:
        mean_BHKD = s.total_RKD / jnp.maximum(s.number_RK, 1)[..., None]
        return jnp.where(s.number_RK[..., None] > 0, mean_BHKD, c_BHKD)

    def first_centroids(x_BHTD: Array, stage: int) -> Array:
        c_BHKD = x_BHTD[:, :, start].astype(jnp.float32)
        if not clustering.warm_start:
            return c_BHKD
        return jnp.where(warm, previous_BHSKD[:, :, stage].astype(jnp.float32), c_BHKD)

    n = clustering.cold_iters
    if clustering.warm_start and clustering.iters != n:
        n = jnp.where(warm, clustering.iters, n)

    def respread(x_BHTD: Array, s: kmeans.Sums, c_BHKD: Array) -> Array:
        spare_BHK = (s.number_RK <= 1) & (jnp.asarray(n) > 1)

        def some() -> Array:
            square_BHT = jnp.sum(jnp.square(x_BHTD.astype(jnp.float32)), axis=-1)
            distance_BHT = jnp.maximum(square_BHT - 2 * s.score_RT, 0)
            return restarted(x_BHTD, c_BHKD, spare_BHK, distance_BHT)

        return lax.cond(jnp.any(spare_BHK), some, lambda: c_BHKD)

    def clustered(x_BHTD: Array, s: kmeans.Sums, c_BHKD: Array) -> Array:
        """Centroids after n iterations, of which s was the first."""
        c_BHKD = moved(s, c_BHKD)
        if reseed:
            c_BHKD = respread(x_BHTD, s, c_BHKD)
        step = lambda _, c: moved(sums(x_BHTD, c, False), c)  # noqa: E731
        if isinstance(n, int):  # a loop whose length is data waits for the host in every step
            for i in range(1, n):
                c_BHKD = step(i, c_BHKD)
            return c_BHKD
        return lax.fori_loop(1, n, step, c_BHKD)

    def by_kernels(s: kmeans.Sums, c_BHKD: Array) -> Any:
        r_BHTD, ids, tables, learned = x_BHTD, [], [], []
        for stage in range(clustering.stages):
            if stage:
                c_BHKD = first_centroids(r_BHTD, stage)
                s = sums(r_BHTD, c_BHKD, reseed)
            c_BHKD = clustered(r_BHTD, s, c_BHKD)
            codes_BHKD, steps, c_BHKD = store_table(c_BHKD, clustering.table)
            args = flat(r_BHTD), flat(c_BHKD)
            if stage < clustering.stages - 1:
                ids_RT, r_RTD = quantize_pack.assign_and_subtract(*args, implementation=kernels)
                r_BHTD = heads(r_RTD)
            else:
                ids_RT, *rest = quantize_pack.assign_and_pack(
                    *args, written.form, implementation=kernels
                )
            ids.append(heads(ids_RT))
            tables.append((codes_BHKD, steps))
            learned.append(c_BHKD)
        stages_of = lambda *parts: jnp.stack(parts, axis=2)  # noqa: E731
        packed = written.collect(*map(heads, rest))
        return result(
            stages_of(*ids), jax.tree.map(stages_of, *tables), stages_of(*learned), packed
        )

    c_BHKD = first_centroids(x_BHTD, 0)
    s = sums(x_BHTD, c_BHKD, reseed)
    usual = jnp.all(jnp.abs(s.total_RKD) <= LARGEST)
    return lax.cond(usual, lambda: by_kernels(s, c_BHKD), otherwise)
