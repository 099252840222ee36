"""Semantic-aware smoothing: subtract from every token the centroid of the cluster it belongs to.

Keys (or values) of one head are clustered over the tokens of a span. Similar tokens share a
centroid, so what is left of each is small and quantizes well; S stages repeat this on the residual
(progressive residual quantization). Source: Quant VideoGen, arXiv 2602.02958, sections on
semantic-aware smoothing and progressive residual quantization.

Axes: B batch, H heads, T tokens, D head dim, K centroids, S stages.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int8, PRNGKeyArray, UInt

from qvg_jax.codecs.base import EmptyState, Shape, Smoothing, check_span
from qvg_jax.codecs.number_format import FormatLike, dtype_of
from qvg_jax.codecs.smoothing.lloyd import assign, lloyd, rows
from qvg_jax.codecs.smoothing.tables import load_table, store_table, table_format, table_nbytes
from qvg_jax.codecs.spec import factory
from qvg_jax.codecs.storage import Centroids, Lloyd

__all__ = [
    "LARGEST",
    "KMeansPacked",
    "KMeansState",
    "deviations",
    "kmeans_smoothing",
    "start_tokens",
    "subsample_tokens",
]

# Tokens with a non-finite or larger entry do not take part in the clustering: one of them would
# turn the mean of its cluster, and then every distance, into NaN.
LARGEST = 1e15


# A centroid is the mean of at least so many tokens on average, however few take part.
_LEAST_EACH = 8


class KMeansPacked(NamedTuple):
    """The stored part of `kmeans_smoothing`: per stage, the cluster of every token and the centroids.

    Centroids in int8 or e4m3 come with steps (bfloat16, per channel) or exponents (int8).
    """

    ids_BHST: UInt[Array, "B H S T"]
    centroids_BHSKD: Float[Array, "B H S K D"] | Int8[Array, "B H S K D"]
    steps_BHS: Float[Array, "B H S D"] | Int8[Array, "B H S"] | None = None


class KMeansState(NamedTuple):
    """The state of `kmeans_smoothing`: the previous span's centroids, and whether there was a span."""

    centroids_BHSKD: Float[Array, "B H S K D"]
    warm: Bool[Array, ""]


def start_tokens(tokens: int, num_centroids: int) -> np.ndarray:
    """Returns the tokens that become the first centroids: the K with the smallest frac(t / golden ratio).

    They are spread as evenly as a stride of T / K but with three different gaps, so that they do
    not fall on the same pixels of every frame as a constant stride may. Measured on captured K
    and V of a trained model (T = 512 to 2560, K = 64 and 256, after 2 iterations): 0.5 to 8 %
    lower objective than the constant stride, within 1 % of a random draw on average.

    Args:
        tokens: T.
        num_centroids: K <= T.

    Returns:
        K different token indices, ascending; the same on every machine (integer arithmetic).
    """
    fraction_T = np.arange(tokens, dtype=np.uint64) * np.uint64(2654435769) % np.uint64(2**32)
    return np.sort(np.argsort(fraction_T, kind="stable")[:num_centroids]).astype(np.int32)


def subsample_tokens(tokens: int, num_centroids: int, subsample: int) -> np.ndarray | None:
    """Returns the tokens from which centroids are learned, ascending; None where all of them take part.

    Of every n consecutive tokens it is one, another one in each n so that rows and columns of frames are hit
    evenly (multiples of sqrt(2) modulo 1). n is `subsample`, or less where that left fewer than 8 tokens for
    a centroid. Their number is a multiple of 8, as kernels read them.

    Args:
        tokens: T.
        num_centroids: K <= T.
        subsample: how many tokens there are for each that takes part.
    """
    n = max(1, min(subsample, tokens // (_LEAST_EACH * num_centroids)))
    if n == 1:
        return None
    of_n = np.arange(tokens // n // 8 * 8, dtype=np.uint64)
    fraction = of_n * np.uint64(0x6A09E667) % np.uint64(2**32)
    return (of_n * np.uint64(n) + (fraction * np.uint64(n) >> np.uint64(32))).astype(np.int32)


@factory
def kmeans_smoothing(
    num_centroids: int = 256,
    iters: int = 2,
    stages: int = 1,
    *,
    cold_iters: int | None = None,
    centroid_dtype: FormatLike = "bf16",
    warm_start: bool = True,
    reseed: bool = False,
    equalize: bool = False,
    subsample: int = 1,
) -> Smoothing:
    """Subtracts from every token its nearest centroid; S stages repeat it on the residual.

    r_0 = x; per stage s: C_s = k-means(r_{s-1}), id_t = argmin_k ||r_t - C_sk||,
    r_s = r_{s-1} - C_s[id]. Decoding: x = r_S + sum_s C_s[id_s].

    The centroids are rounded to `centroid_dtype` before the final assignment and the subtraction,
    so the residual contains their rounding and the round trip hides no error. The start is
    deterministic (`start_tokens`); from the second span on it is the previous span's centroids.
    Cold and warm start are one program: a flag in the state picks start and iterations.

    A token with a NaN, an infinity or an entry beyond 1e15 does not move any centroid; it gets
    the centroid nearest to the origin, and its residual keeps the bad entry. Kernels, which encode on
    GPUs where nothing else is said, take zeros in place of such entries, and the rest of the token as it is.

    Differs from the paper: distances accumulate in float32, not bfloat16; one more assignment
    follows the last update (0.5 to 1 % lower objective); a fixed number of iterations, with no
    test for convergence.

    Args:
        num_centroids: K, per head and stage.
        iters: Lloyd iterations of a span that starts warm (or of every span if `cold_iters` is
            None).
        stages: S.
        cold_iters: iterations of the first span; default `iters`. It happens once per cache.
        centroid_dtype: storage of the centroids: bfloat16, float16, float32; "int8" with a bfloat16
            step per channel; or "e4m3" with one power of two per head and stage. In a span of 5,120
            tokens 256 centroids take 0.8 bits per element in bfloat16 and half of that in a byte,
            for a residual that grows by less than one part in a hundred.
        warm_start: start from the previous span's centroids. If False the codec keeps no state.
        reseed: let a centroid that attracts at most one token in the first iteration restart at a
            badly served token, see `lloyd`. Matters when few tokens share a centroid or when the
            content moved on since the previous span.
        equalize: measure distances in channels that are divided by their mean absolute deviation over
            the span, so that ids do not depend on the size of channels and no loud one decides
            alone. What is stored has the same form.
        subsample: n: all iterations but the last look at one token in n (`subsample_tokens`), and take as
            much less time. At 1 they look at all. Channels' deviations, too, are those of these tokens.

    Returns:
        A `Smoothing` that stores ids (uint8 for K <= 256, uint16 above; S x T per head) and
        centroids (S x K x D per head).

    Raises:
        ValueError: an argument outside its range; on use, K > T.

    Source:
        arXiv 2602.02958: semantic-aware smoothing, progressive residual quantization, centroid
        caching.
    """
    if not 1 <= num_centroids <= 2**16:
        raise ValueError(f"num_centroids={num_centroids} is not accepted: give 1 to 65536")
    cold_iters = iters if cold_iters is None else cold_iters
    for name, value, least in (
        ("iters", iters, 1),
        ("cold_iters", cold_iters, 1),
        ("subsample", subsample, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} is not accepted: give {least} or more")
    if stages < 1:
        raise ValueError(f"stages={stages} is not accepted: give 1 or more")
    form = table_format(centroid_dtype)
    state_dtype = dtype_of("f32" if form in ("int8", "e4m3") else form)
    id_dtype = jnp.dtype(jnp.uint8 if num_centroids <= 256 else jnp.uint16)

    def check(shape: Shape, dtype: Any = jnp.float32) -> None:
        check_span(shape, dtype)
        if shape[2] < num_centroids:
            raise ValueError(
                f"num_centroids={num_centroids} is more than the {shape[2]} tokens of the span, "
                f"shape={tuple(shape)}; accepted: 1 to {shape[2]}"
            )

    def check_state(state: Any, shape: Shape) -> None:
        found = state.centroids_BHSKD.shape if isinstance(state, KMeansState) else None
        want = (*shape[:2], stages, num_centroids, shape[3])
        if found != want:
            raise ValueError(
                f"state has centroids of shape {found}, and a span of shape {tuple(shape)} takes {want}; "
                "accepted: init(x_BHTD.shape, x_BHTD.dtype), or the state of the span before"
            )

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> KMeansState | EmptyState:
        check(shape, dtype)
        if not warm_start:
            return EmptyState()
        b, h, _, d = shape
        zeros = jnp.zeros((b, h, stages, num_centroids, d), state_dtype)
        return KMeansState(zeros, jnp.zeros((), bool))

    def encode(
        x_BHTD: Array, state: KMeansState | EmptyState, *, key: PRNGKeyArray | None = None
    ) -> tuple[KMeansPacked, Array, KMeansState | EmptyState]:
        del key  # the start is deterministic
        check(x_BHTD.shape, x_BHTD.dtype)
        some_t = subsample_tokens(x_BHTD.shape[2], num_centroids, subsample)
        if warm_start:
            check_state(state, x_BHTD.shape)
        start = start_tokens(x_BHTD.shape[2] if some_t is None else len(some_t), num_centroids)
        residual_BHTD, ids, tables, learned = x_BHTD, [], [], []
        for s in range(stages):
            used_BHT = jnp.all(jnp.abs(residual_BHTD) <= LARGEST, axis=-1)
            tokens_BHTD = jnp.where(used_BHT[..., None], residual_BHTD, 0)
            few_BHtD, used_BHt = tokens_BHTD, used_BHT
            if some_t is not None:
                few_BHtD, used_BHt = tokens_BHTD[:, :, some_t], used_BHT[:, :, some_t]
            c_BHKD, n = few_BHtD[:, :, start].astype(jnp.float32), cold_iters
            if warm_start:
                previous_BHKD = state.centroids_BHSKD[:, :, s].astype(jnp.float32)
                c_BHKD = jnp.where(state.warm, previous_BHKD, c_BHKD)
                n = iters if iters == cold_iters else jnp.where(state.warm, iters, cold_iters)
            if equalize:
                _, size_BH1D = deviations(few_BHtD, used_BHt)
                tokens_BHTD = tokens_BHTD.astype(jnp.float32) / size_BH1D
                c_BHKD = c_BHKD / size_BH1D
            how = dict(used_BHT=used_BHT, reseed=reseed, some_t=some_t)
            c_BHKD = lloyd(tokens_BHTD, c_BHKD, n, **how)
            c_BHKD = c_BHKD * size_BH1D if equalize else c_BHKD
            codes_BHKD, steps, c_BHKD = store_table(c_BHKD, form)
            ids_BHT, _ = assign(tokens_BHTD, c_BHKD / size_BH1D if equalize else c_BHKD)
            picked_BHTD = rows(c_BHKD, ids_BHT).astype(jnp.float32)
            residual_BHTD = residual_BHTD.astype(jnp.float32) - picked_BHTD
            ids.append(ids_BHT.astype(id_dtype))
            tables.append((codes_BHKD, steps))
            learned.append(c_BHKD)
        stages_of = lambda *parts: jnp.stack(parts, axis=2)  # noqa: E731
        packed = KMeansPacked(stages_of(*ids), *jax.tree.map(stages_of, *tables))
        if warm_start:
            state = KMeansState(stages_of(*learned), jnp.ones_like(state.warm))
        return packed, residual_BHTD, state

    def decode(packed: KMeansPacked, residual_BHTD: Array) -> Array:
        x_BHTD = residual_BHTD.astype(jnp.float32)
        for s in range(stages):
            steps = None if packed.steps_BHS is None else packed.steps_BHS[:, :, s]
            table_BHKD = load_table(packed.centroids_BHSKD[:, :, s], steps, form)
            ids_BHT = packed.ids_BHST[:, :, s]
            x_BHTD = x_BHTD + rows(table_BHKD, ids_BHT).astype(jnp.float32)
        return x_BHTD

    def nbytes(shape: Shape) -> int:
        check(shape)
        b, h, t, d = shape
        per_head = t * id_dtype.itemsize + table_nbytes(form, num_centroids, d)
        return b * h * stages * per_head

    fit = Lloyd(iters, cold_iters, warm_start, reseed, equalize, subsample)
    storage = Centroids(num_centroids, stages, form, fit)
    name = f"kmeans{num_centroids}" + (f"x{stages}" if stages > 1 else "")
    return Smoothing(init, encode, decode, nbytes, name, storage)


def deviations(
    x_BHTD: Array, used_BHT: Array
) -> tuple[Float[Array, "B H 1 D"], Float[Array, "B H 1 D"]]:
    """Returns each channel's mean and its mean absolute deviation over the used tokens; 1 for a constant channel."""
    used_BHT1 = used_BHT[..., None]
    share_BH11 = 1 / jnp.maximum(jnp.sum(used_BHT1, axis=2, keepdims=True), 1)
    x_BHTD = x_BHTD.astype(jnp.float32)  # zero where a token is not used
    mean_BH1D = jnp.sum(x_BHTD * share_BH11, axis=2, keepdims=True)
    away_BHTD = jnp.where(used_BHT1, jnp.abs(x_BHTD - mean_BH1D), 0)
    size_BH1D = jnp.sum(away_BHTD * share_BH11, axis=2, keepdims=True)
    return mean_BH1D, jnp.where(size_BH1D > 0, size_BH1D, 1)
