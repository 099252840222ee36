"""Sums of the tokens nearest to each centroid, from which a Lloyd iteration makes new centroids.

Axes: R rows (batch and heads), T tokens, D head dim, K centroids.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.gpu.triton_launch import missing
from pallas_kernels.kmeans import reference
from pallas_kernels.kmeans.types import HEAD_DIM, TILE, Metric, Sums, Tuning

__all__ = [
    "assign",
    "check",
    "kmeans_sums",
    "padded_centroids",
    "parts_for",
    "supported",
    "whole_eights",
]

_NUM_SMS = 132  # of an H100 SXM; other GPUs get another balance, not another meaning
_NEVER = -3e38  # bias of a centroid that is not to be chosen
_MOST = 256  # centroids whose sums fit into the registers of two warpgroups


def supported(x_RTD: Array, clusters: int, implementation: str = "mosaic") -> str | None:
    """The reason why the kernels of an implementation cannot cluster this, or None if they can."""
    if x_RTD.dtype != jnp.bfloat16:
        return f"dtype={x_RTD.dtype}; the kernel reads bfloat16"
    accepted = (64, 128, 256) if implementation == "triton" else (HEAD_DIM,)
    if x_RTD.shape[-1] not in accepted:
        return f"head_dim={x_RTD.shape[-1]}; it must be {' or '.join(map(str, accepted))}"
    return None if clusters <= _MOST else f"{clusters} centroids; the kernel has at most {_MOST}"


def check(x_RTD: Array, c_RKD: Array, implementation: str) -> None:
    """Raises the errors that the functions of `kmeans` and `quantize_pack` document."""
    if implementation not in ("xla", "mosaic", "triton"):
        raise ValueError(f"implementation={implementation!r}; accepted: 'xla', 'mosaic', 'triton'")
    shapes = [x_RTD.shape, c_RKD.shape]
    if (
        [len(s) for s in shapes] != [3, 3]
        or (shapes[0][0], shapes[0][2]) != (shapes[1][0], shapes[1][2])
        or 0 in shapes[0] + shapes[1]
    ):
        raise ValueError(f"{x_RTD.shape=}, {c_RKD.shape=}; accepted: (R, T, D) and (R, K, D)")
    if implementation == "xla":
        return
    why = supported(x_RTD, c_RKD.shape[1], implementation)
    if implementation == "triton":
        why = why or missing()
    if why is not None:
        raise NotImplementedError(f"implementation={implementation!r}: {why}; 'xla' serves it")


def padded_centroids(c_RKD: Array, metric: Metric | None = None) -> tuple[Array, Array]:
    """A table in bf16 for 128 or 256 centroids, and the biases of its scores (`reference.table_of`)."""
    clusters = c_RKD.shape[1]
    more = (128 if clusters <= 128 else 256) - clusters
    c_RKD, bias_RK = reference.table_of(c_RKD, metric)
    # Above zero: the smallest float32 numbers, which have no room for a centroid's number, are
    # then never a score.
    bias_RK = bias_RK + 1e-30
    pad = lambda x, value: jnp.pad(  # noqa: E731
        x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2), constant_values=value
    )
    return pad(c_RKD, 0), pad(bias_RK, _NEVER)


def whole_eights(x_RTD: Array) -> Array:
    """Tokens padded to a multiple of 8, as the kernels read them; usually there is nothing to do."""
    return jnp.pad(x_RTD, ((0, 0), (0, -x_RTD.shape[1] % 8), (0, 0)))


def parts_for(rows: int, tokens: int, named: int | None = None) -> int:
    """The number of parts that the tokens of a row are split into: as named, or what fills the GPU best."""
    tiles = -(-tokens // TILE)
    if named is not None:
        if not 1 <= named <= tiles:  # a CTA without tokens would wait for them
            raise ValueError(f"parts={named}; accepted: 1 to {tiles}, the tiles of {tokens} tokens")
        return named

    def steps(parts: int) -> float:
        # Writing a CTA's sums and adding them costs about as much as half a tile.
        return -(-rows * parts // _NUM_SMS) * (-(-tiles // parts) + 0.5)

    return min(range(1, min(tiles, _NUM_SMS) + 1), key=steps)


def kmeans_sums(
    x_RTD: Float[Array, "R T D"],
    c_RKD: Float[Array, "R K D"],
    *,
    scores: bool = False,
    metric: Metric | None = None,
    implementation: str = "mosaic",
    parts: int | None = None,
    tuning: Tuning | None = None,
) -> Sums:
    """Assigns every token to its nearest centroid and sums the tokens of each cluster.

    id_t = argmax_k x_t . c_k - |c_k|^2 / 2, with c in bfloat16 and products in float32, or with a
    metric what is nearest by that (`reference.table_of`);
    total_k = sum of x_t with id_t = k, in float32. Tokens must be finite: one that is not makes
    sums of its row NaN. The same input gives the same bytes.

    "mosaic" compares scores to 16 bits, so that of two centroids as good as equally near either
    may be taken, always the same one.

    Args:
        x_RTD: tokens.
        c_RKD: centroids, finite.
        scores: whether ids and scores of the tokens are returned. The squared distance of a token is
            |x|^2 - 2 score, or |(x - centre) / size|^2 - 2 score.
        metric: by which distances are measured; None is |x - c|.
        implementation: "mosaic" (Hopper; bfloat16, D = 128, K <= 256), "triton" (Ampere and later;
            D 64, 128 or 256 besides) or "xla".
        parts: CTAs per row; None chooses.
        tuning: sizes for "mosaic"; None takes the measured ones.

    Raises:
        NotImplementedError: the kernel cannot cluster this; the message says why.
        ValueError: shapes that do not belong together, too many parts, or an unknown
            implementation.
    """
    check(x_RTD, c_RKD, implementation)
    if implementation == "xla":
        rounded = c_RKD if metric is not None else c_RKD.astype(jnp.bfloat16)
        total_RKD, number_RK, *more = reference.kmeans_sums(x_RTD, rounded, metric)
        return Sums(total_RKD, number_RK, *(more if scores else (None, None)))
    (rows, tokens, _), clusters = x_RTD.shape, c_RKD.shape[1]
    if implementation == "triton":
        from pallas_kernels.kmeans import triton

        c_RKD, bias_RK = padded_centroids(c_RKD, metric)
        ids_RT, score_RT = triton.assign(x_RTD, c_RKD, bias_RK, jnp.int32)
        sums = triton.sums(x_RTD, ids_RT, c_RKD.shape[1], parts_for(rows, tokens, parts))
        total_RKD, number_RK = (x.sum(axis=1)[:, :clusters] for x in sums)
        return Sums(total_RKD, number_RK, *((ids_RT, score_RT) if scores else (None, None)))
    from pallas_kernels.kmeans import mosaic_gpu

    total_RPKD, number_RPK, *more = mosaic_gpu.sums(
        whole_eights(x_RTD),
        *padded_centroids(c_RKD, metric),
        tokens=tokens,
        parts=parts_for(rows, tokens, parts),
        scores=scores,
        tuning=Tuning() if tuning is None else tuning,
    )
    total_RKD, number_RK = (x.sum(axis=1)[:, :clusters] for x in (total_RPKD, number_RPK))
    return Sums(total_RKD, number_RK, *([m[:, :tokens] for m in more] or (None, None)))


def assign(
    x_RTD: Float[Array, "R T D"],
    c_RKD: Float[Array, "R K D"],
    *,
    metric: Metric | None = None,
    implementation: str = "mosaic",
) -> UInt8[Array, "R T"]:
    """The nearest centroid of every token; "mosaic" finds it on the way to the sums of `kmeans_sums`.

    Arguments and errors are those of `kmeans_sums`.
    """
    how = dict(metric=metric, implementation=implementation)
    if implementation == "triton":
        check(x_RTD, c_RKD, implementation)
        from pallas_kernels.kmeans import triton

        ids_RT, _ = triton.assign(x_RTD, *padded_centroids(c_RKD, metric), jnp.uint8)
        return ids_RT
    ids_RT = kmeans_sums(x_RTD, c_RKD, scores=True, **how).ids_RT
    assert ids_RT is not None  # they were asked for
    return ids_RT.astype(jnp.uint8)
