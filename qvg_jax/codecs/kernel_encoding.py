"""Encoding of a span by GPU kernels: k-means and the quantizer behind it, as `Storage` declares them.

Every Lloyd iteration is one kernel, which reads x once; the last assignment, the residual, its scales and
codes are another, if kernels write such codes. Dithered levels need the deviations of the residual's
channels, so there one kernel leaves the residual, in bfloat16, XLA measures its channels, and another kernel packs
it. If kernels do not write such codes, the last assignment is one more iteration, and XLA encodes the residual
with the codec's own `encode`. Between them XLA handles what is as small as the table of centroids, and
where channels are made equal for distances, their means and sizes.

The result differs from that of XLA: nearest centroids are found with centroids rounded to bfloat16 and scores
compared to 16 bits, so a token nearly as near to two of them may go to the other; the residual is
relative to the stored centroids rounded to bfloat16 (as decoding kernels read them; XLA subtracts them as
they are), and between stages it is bfloat16. The objective agrees to a part in a thousand. An entry that is not a
number, infinite or beyond 1e15 counts as zero.

Axes: B batch, H heads, R both flattened, T tokens, D head dim, K centroids, S stages.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from qvg_jax.backends import on_several_devices
from qvg_jax.codecs.base import Codec, Packed, State
from qvg_jax.codecs.quantize.dithered import DitheredPacked, channel_sizes
from qvg_jax.codecs.quantize.grid import GridPacked
from qvg_jax.codecs.quantize.integer import IntegerPacked
from qvg_jax.codecs.quantize.scales import (
    SCALE_SHIFT,
    gained,
    span_exponent,
    store_scale,
    times_power_of_two,
)
from qvg_jax.codecs.smoothing.kmeans import (
    LARGEST,
    KMeansPacked,
    KMeansState,
    deviations,
    start_tokens,
    subsample_tokens,
)
from qvg_jax.codecs.smoothing.lloyd import restarted, rows
from qvg_jax.codecs.smoothing.tables import store_table
from qvg_jax.codecs.storage import (
    Centroids,
    DitheredFit,
    LeastSquaresFit,
    Levels,
    Lloyd,
    Storage,
)

__all__ = ["KernelEncoding", "kernel_encoding"]

E4M3 = jnp.dtype(jnp.float8_e4m3fn)

# Tokens from which the sizes of channels are taken for distances, at least, where a span has twice as many.
_SIZES_FROM = 3072


def kernel_encoding(
    storage: Storage | None, quantizer: Codec, x_BHTD: Array, kernels: str
) -> "KernelEncoding | str":
    """Returns what encodes x in this form by kernels, or why they cannot.

    Args:
        storage: what the chain declares.
        quantizer: the chain's last codec, which encodes residuals that kernels do not pack.
        x_BHTD: the span.
        kernels: "mosaic" or "triton".
    """
    from pallas_kernels import kmeans

    centroids = _centroids(storage)
    if isinstance(centroids, str):
        return centroids
    why = kmeans.supported(x_BHTD, centroids.num_centroids, kernels) or on_several_devices(x_BHTD)
    if why is not None:
        return why
    assert storage is not None  # it has centroids
    levels = storage.codes if isinstance(storage.codes, Levels) else None
    return KernelEncoding(centroids, levels, kernels, quantizer, x_BHTD.shape[3])


def _centroids(storage: Storage | None) -> Centroids | str:
    """Returns the centroids of a form whose k-means is the kernels', or why it is not."""
    known = "the kernels know one kmeans_smoothing before a codec"
    if storage is None or not storage.chained:
        return f"the codec is not a chain; {known}"
    if len(storage.smoothings) != 1:
        return f"{len(storage.smoothings)} smoothings before the codes; {known}"
    centroids = storage.smoothings[0]
    if isinstance(centroids, str):
        return f"{centroids} before the codes; {known}"
    if centroids.dtype in ("f16", "f32"):
        return f"centroid_dtype={centroids.dtype}; the kernels read bf16, int8 or e4m3"
    return centroids


class Clustered(NamedTuple):
    """A stage's centroids, sums over all tokens that were taken on the way, and by what distances are measured."""

    c_BHKD: Array
    sums: Any
    metric: Any


@dataclasses.dataclass(frozen=True)
class KernelEncoding:
    """The encoding of a chain of k-means and levels by kernels.

    Attributes:
        centroids, levels: what is stored, and how it is chosen; no levels if it is not `Levels`.
        kernels: "mosaic" or "triton".
        quantizer: the codec of the residual.
        head_dim: channels of a head.
    """

    centroids: Centroids
    levels: Levels | None
    kernels: str
    quantizer: Codec
    head_dim: int

    @property
    def form(self) -> Any:
        """The kernels' own description of levels and their fit; None if they do not pack such codes."""
        from pallas_kernels.quantize_pack import Dithered, Integers, Midrise, supported

        if self.levels is None or self.levels.fit is None:
            return None
        bits, fit, zero_points = self.levels.bits, self.levels.fit, self.levels.zero_points
        if isinstance(fit, LeastSquaresFit):
            form = Midrise(bits, fit.ratio, fit.refine, recode=not fit.gain)
        elif isinstance(fit, DitheredFit):
            form = Dithered(bits, fit.reach, zero_points)
        else:
            assert self.levels.group is not None  # integers have a scale per group
            form = Integers(bits, self.levels.group, zero_points)
        return form if supported(form, self.head_dim) is None else None

    @property
    def fit(self) -> Lloyd:
        return self.centroids.fit

    def encode(
        self, x_BHTD: Array, state: State, key: PRNGKeyArray | None = None
    ) -> tuple[Packed, State]:
        """Returns the packed form and the state of the chain.

        Entries that would turn the means of a cluster into NaN show in the sums of the first iteration, so
        no pass looks for them; a span that has some is encoded once more without them, by the same kernels.
        Finite ones whose sum is small again, as two opposite ones of one cluster, are encoded as they are.
        """

        def from_start(x_BHTD: Array, first: Clustered) -> tuple[Packed, State]:
            return self._encoded(x_BHTD, state, first, key)

        def without_bad_entries() -> tuple[Packed, State]:
            known_BHTD = jnp.where(jnp.abs(x_BHTD) <= LARGEST, x_BHTD, 0)
            return from_start(known_BHTD, self._clustered(known_BHTD, state, 0))

        first = self._clustered(x_BHTD, state, 0)
        usual = jnp.all(jnp.abs(first.sums.total_RKD) <= LARGEST)
        return lax.cond(usual, lambda: from_start(x_BHTD, first), without_bad_entries)

    def _encoded(self, x_BHTD: Array, state: State, first: Clustered, key: PRNGKeyArray | None):
        """Returns the packed form and the state, from the centroids of the first stage."""
        from pallas_kernels import kmeans, quantize_pack

        heads = lambda x: x.reshape(*x_BHTD.shape[:2], *x.shape[1:])  # noqa: E731
        r_BHTD, codes, form = x_BHTD, [], self.form
        in_one_pass = form is not None and not isinstance(form, quantize_pack.Dithered)
        ids, tables, learned = [], [], []
        for stage in range(self.centroids.stages):
            found = self._clustered(r_BHTD, state, stage) if stage else first
            codes_BHKD, steps, c_BHKD = store_table(found.c_BHKD, self.centroids.dtype)
            args, how = (_rows(r_BHTD), _rows(c_BHKD)), self._how(found.metric)
            last = stage == self.centroids.stages - 1
            if last and form is None:  # XLA encodes the residual, and gets it as it is
                ids_RT = kmeans.assign(*args, **how)
                picked_BHTD = rows(c_BHKD, heads(ids_RT)).astype(jnp.float32)
                r_BHTD = r_BHTD.astype(jnp.float32) - picked_BHTD
            elif last and in_one_pass:
                ids_RT, *codes = quantize_pack.assign_and_pack(*args, form, **how)
            else:
                ids_RT, r_RTD = quantize_pack.assign_and_subtract(*args, **how)
                r_BHTD = heads(r_RTD)
            ids.append(heads(ids_RT))
            tables.append((codes_BHKD, steps))
            learned.append(c_BHKD)
        of_stages = lambda *parts: jnp.stack(parts, axis=2)  # noqa: E731
        kmeans_packed = KMeansPacked(of_stages(*ids), *jax.tree.map(of_stages, *tables))
        if self.fit.warm_start:
            warm = jnp.ones_like(state[0].warm)
            state = (KMeansState(of_stages(*learned), warm), state[1])
        if in_one_pass:
            return (kmeans_packed, self._collected(*map(heads, codes))), state
        if form is not None:
            return (kmeans_packed, self._dithered(r_BHTD, form)), state
        key = None if key is None else jax.random.fold_in(key, 1)
        packed, after = self.quantizer.encode(r_BHTD, state[1], key=key)
        return (kmeans_packed, packed), (state[0], after)

    def _start(self, x_BHTD: Array, state: State, stage: int) -> Array:
        """Returns the first centroids of a stage: some of the tokens, or the previous span's centroids."""
        start = start_tokens(x_BHTD.shape[2], self.centroids.num_centroids)
        c_BHKD = x_BHTD[:, :, start].astype(jnp.float32)
        if not self.fit.warm_start:
            return c_BHKD
        previous_BHSKD, warm = state[0]
        return jnp.where(warm, previous_BHSKD[:, :, stage].astype(jnp.float32), c_BHKD)

    def _metric(self, x_BHTD: Array) -> Any:
        """Returns means and sizes of the channels of all rows, or None if they are not made equal.

        They are those of some of many tokens: nothing is stored that depends on it but centroids, and what those
        leave of the energy changes by 0.3 % at most. Two passes over all tokens take as long as an iteration.
        """
        from pallas_kernels.kmeans import Metric

        if not self.fit.equalize:
            return None
        tokens = x_BHTD.shape[2]
        some_t = subsample_tokens(tokens, _SIZES_FROM // 8, tokens)
        x_BHTD = x_BHTD if some_t is None else x_BHTD[:, :, some_t]
        used_BHT = jnp.ones(x_BHTD.shape[:3], bool)
        centre_BH1D, size_BH1D = deviations(x_BHTD, used_BHT)
        size_BH1D = jnp.maximum(
            size_BH1D, 1 / LARGEST
        )  # what kernels divide by stays in float32's range
        return Metric(_rows(centre_BH1D)[:, 0], _rows(size_BH1D)[:, 0])

    def _how(self, metric: Any) -> dict[str, Any]:
        return dict(implementation=self.kernels) | ({} if metric is None else dict(metric=metric))

    def _sums(self, x_BHTD: Array, c_BHKD: Array, metric: Any, scores: bool) -> Any:
        from pallas_kernels import kmeans

        args = (_rows(x_BHTD), _rows(c_BHKD))
        out = kmeans.kmeans_sums(*args, scores=scores, **self._how(metric))
        return jax.tree.map(lambda x: x.reshape(*x_BHTD.shape[:2], *x.shape[1:]), out)

    def _clustered(self, x_BHTD: Array, state: State, stage: int) -> Clustered:
        """Returns the centroids of a stage after all its iterations."""
        fit, few_BHtD = self.fit, x_BHTD
        some_t = subsample_tokens(x_BHTD.shape[2], self.centroids.num_centroids, fit.subsample)
        if some_t is not None:
            few_BHtD = x_BHTD[:, :, some_t]
        metric, n = self._metric(few_BHtD), fit.cold_iters
        if fit.warm_start and fit.iters != n:
            n = jnp.where(state[0].warm, fit.iters, n)

        def step(x_BHTD: Array, c_BHKD: Array, first: bool = False) -> tuple[Array, Any]:
            # Later iterations need no scores. With them the program has one kernel of k-means and not two,
            # each of which takes seconds to compile; writing scores is 3 % of a pass's traffic.
            sums = self._sums(x_BHTD, c_BHKD, metric, fit.reseed)
            c_BHKD = _moved(sums, c_BHKD)
            if first and fit.reseed:
                c_BHKD = _respread(x_BHTD, sums, c_BHKD, n, metric)
            return c_BHKD, sums

        def steps(c_BHKD: Array, n: int | Array) -> Array:
            if isinstance(n, int):  # a loop whose length is data waits for the host in every step
                for _ in range(1, n):
                    c_BHKD, _ = step(few_BHtD, c_BHKD)
                return c_BHKD
            return lax.fori_loop(1, n, lambda _, c: step(few_BHtD, c)[0], c_BHKD)

        c_BHKD = self._start(few_BHtD, state, stage)
        if some_t is None:
            c_BHKD, sums = step(x_BHTD, c_BHKD, first=True)
            return Clustered(steps(c_BHKD, n), sums, metric)
        first = lambda c: step(few_BHtD, c, first=True)[0]  # noqa: E731
        if isinstance(n, int):
            c_BHKD = first(c_BHKD) if n > 1 else c_BHKD
        else:
            c_BHKD = lax.cond(n > 1, first, lambda c: c, c_BHKD)
        return Clustered(*step(x_BHTD, steps(c_BHKD, n - 1)), metric)

    def _collected(
        self, codes_BHTC: Array, scales: Array, zeros_BHTG: Array | None = None
    ) -> IntegerPacked | GridPacked:
        """Returns the quantizer's packed form of the codes and scales that `assign_and_pack` gives."""
        if not isinstance(self.levels.fit, LeastSquaresFit):
            read = lambda x: None if x is None else lax.bitcast_convert_type(x, E4M3)  # noqa: E731
            return IntegerPacked(codes_BHTC, read(scales), read(zeros_BHTG))
        lsq_BHT, match_BHT, largest_BHT = (scales[:, :, i] for i in range(3))
        gain = self.levels.fit.gain
        scale_BHT = gained(lsq_BHT, match_BHT, gain) if gain else lsq_BHT
        exponent_BH = span_exponent(largest_BHT)
        scale_BHT1 = times_power_of_two(scale_BHT, -exponent_BH)[..., None]
        stored_BHT1, exponents_BH, _ = store_scale(scale_BHT1, exponent_BH, E4M3)
        head_dim = codes_BHTC.shape[-1] * 8 // self.levels.bits
        return GridPacked(codes_BHTC, stored_BHT1, exponents_BH, head_dim)

    def _dithered(self, r_BHTD: Array, form: Any) -> DitheredPacked:
        """Returns the packed form of a residual on dithered levels."""
        from pallas_kernels.quantize_pack import pack_dithered

        w_BHD, exponent_BH = channel_sizes(r_BHTD)
        # A channel of next to nothing is read as nothing, and has no factor that is a number.
        divisor_BHD = jnp.where(w_BHD > 2.0**-100, w_BHD, 1).astype(jnp.float32)
        # The power of two takes every value to the range of e4m3's.
        factor_BHD = times_power_of_two(1 / divisor_BHD, SCALE_SHIFT - exponent_BH)
        codes_RTC, scales_RNT = pack_dithered(
            _rows(r_BHTD), _rows(factor_BHD), form, implementation=self.kernels
        )

        def stored(scale_RT: Array) -> tuple[Array, Any, Array]:
            scale_BHT1 = scale_RT.reshape(*r_BHTD.shape[:3], 1) * 2.0**-SCALE_SHIFT
            return store_scale(scale_BHT1, exponent_BH, E4M3)

        lsq_RT, match_RT, *middle_RT = (scales_RNT[:, i] for i in range(scales_RNT.shape[1]))
        gain = self.levels.fit.gain
        scales_BHT1, exponents_BH, _ = stored(gained(lsq_RT, match_RT, gain))
        zeros_BHT1 = stored(middle_RT[0])[0] if middle_RT else None
        codes_BHTC = codes_RTC.reshape(*r_BHTD.shape[:3], -1)
        return DitheredPacked(codes_BHTC, scales_BHT1, zeros_BHT1, exponents_BH, w_BHD)


def _rows(x_BH: Array) -> Array:
    return x_BH.reshape(-1, *x_BH.shape[2:])


def _moved(sums: Any, c_BHKD: Array) -> Array:
    """Returns the mean of every cluster's tokens, or the old centroid of a cluster without tokens."""
    mean_BHKD = sums.total_RKD / jnp.maximum(sums.number_RK, 1)[..., None]
    return jnp.where(sums.number_RK[..., None] > 0, mean_BHKD, c_BHKD)


def _respread(x_BHTD: Array, sums: Any, c_BHKD: Array, n: int | Array, metric: Any = None) -> Array:
    """Moves centroids that attract at most one token to badly served tokens, if iterations follow."""
    spare_BHK = (sums.number_RK <= 1) & (jnp.asarray(n) > 1)

    def some() -> Array:
        away_BHTD = x_BHTD.astype(jnp.float32)
        if metric is not None:
            centre, size = (x.reshape(*x_BHTD.shape[:2], 1, -1) for x in metric)
            away_BHTD = (away_BHTD - centre) / size
        square_BHT = jnp.sum(jnp.square(away_BHTD), axis=-1)
        distance_BHT = jnp.maximum(square_BHT - 2 * sums.score_RT, 0)
        return restarted(x_BHTD, c_BHKD, spare_BHK, distance_BHT)

    return lax.cond(jnp.any(spare_BHK), some, lambda: c_BHKD)
