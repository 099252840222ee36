"""Encoding of a span by GPU kernels: k-means and the quantizer behind it, as `Storage` declares them.

Every Lloyd iteration is one kernel, which reads x once; the last assignment, the residual, its scales and
codes are another. Between them XLA handles what is as small as the table of centroids.

The result differs from that of XLA: nearest centroids are found with centroids rounded to bfloat16 and scores
compared to 16 bits, so a token nearly as near to two of them may go to the other; the residual is
relative to the stored centroids rounded to bfloat16 (as decoding kernels read them), and between
stages it is bfloat16. The objective agrees to a part in a thousand.

Axes: B batch, H heads, R both flattened, T tokens, D head dim, K centroids, S stages.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qvg_jax.backends import on_several_devices
from qvg_jax.codecs.base import Packed, State
from qvg_jax.codecs.quantize.grid import GridPacked
from qvg_jax.codecs.quantize.integer import IntegerPacked
from qvg_jax.codecs.quantize.scales import span_exponent, store_scale, times_power_of_two
from qvg_jax.codecs.smoothing.kmeans import LARGEST, KMeansPacked, KMeansState, start_tokens
from qvg_jax.codecs.smoothing.lloyd import restarted
from qvg_jax.codecs.smoothing.tables import store_table
from qvg_jax.codecs.storage import (
    Centroids,
    LeastSquaresFit,
    Levels,
    Lloyd,
    Storage,
    Values,
)

__all__ = ["KernelEncoding", "kernel_encoding"]

E4M3 = jnp.dtype(jnp.float8_e4m3fn)


def kernel_encoding(storage: Storage | None, x_BHTD: Array, kernels: str) -> "KernelEncoding | str":
    """Returns what encodes x in this form by kernels, or why they, "mosaic" or "triton", cannot."""
    from pallas_kernels import kmeans, quantize_pack

    parts = _known_parts(storage)
    if isinstance(parts, str):
        return parts
    encoding = KernelEncoding(*parts, kernels)
    why = (
        kmeans.supported(x_BHTD, encoding.centroids.num_centroids, kernels)
        or quantize_pack.supported(encoding.form, x_BHTD.shape[3])
        or on_several_devices(x_BHTD)
    )
    return encoding if why is None else why


def _known_parts(storage: Storage | None) -> tuple[Centroids, Levels] | str:
    """Returns the centroids and levels of a form that kernels write, or which part they do not know."""
    known = "the kernels know one kmeans_smoothing before symmetric integers or a mid-rise grid"
    if storage is None or not storage.chained:
        return f"the codec is not a chain; {known}"
    if len(storage.smoothings) != 1:
        return f"{len(storage.smoothings)} smoothings before the codes; {known}"
    centroids, codes = storage.smoothings[0], storage.codes
    if isinstance(centroids, str):
        return f"{centroids} before the codes; {known}"
    if isinstance(codes, str):
        return f"{codes}; {known}"
    if centroids.fit.equalize:
        return f"channels made equal for distances; {known}"
    if isinstance(codes, Values):
        return f"plain values in {codes.dtype}; {known}"
    if codes.zero_points:
        return f"zero points; {known}"
    if codes.scale_dtype != "e4m3":
        return f"{codes.scale_dtype} scales; the kernels write e4m3"
    if codes.fit is None:
        return f"the way in which scales and codes are chosen; {known}"
    if centroids.dtype in ("f16", "f32"):
        return f"centroid_dtype={centroids.dtype}; the kernels read bf16, int8 or e4m3"
    return centroids, codes


@dataclasses.dataclass(frozen=True)
class KernelEncoding:
    """The encoding of a chain of k-means and levels by kernels, in the order in which it happens.

    `first_sums` is the first iteration, and tells whether the span can go on this way (`usual`);
    `encode` does the rest.

    Attributes:
        centroids, levels: what is stored, and how it is chosen.
        kernels: "mosaic" or "triton".
    """

    centroids: Centroids
    levels: Levels
    kernels: str

    @property
    def form(self) -> Any:
        """The kernels' own description of levels and their fit."""
        from pallas_kernels.quantize_pack import Integers, Midrise

        bits, fit = self.levels.bits, self.levels.fit
        if isinstance(fit, LeastSquaresFit):
            return Midrise(bits, fit.ratio, fit.refine, recode=not fit.gain)
        assert self.levels.group is not None  # integers have a scale per group
        return Integers(bits, self.levels.group)

    @property
    def fit(self) -> Lloyd:
        return self.centroids.fit

    def first_sums(self, x_BHTD: Array, state: State) -> tuple[Array, Any]:
        """Returns the first stage's first centroids, and the sums of the tokens nearest to each of them."""
        c_BHKD = self._start(x_BHTD, state, 0)
        return c_BHKD, self._sums(x_BHTD, c_BHKD, self.fit.reseed)

    @staticmethod
    def usual(first: tuple[Array, Any]) -> Array:
        """Whether all tokens are finite and not too large to take part.

        It shows in the sums of the first iteration, so that no pass looks for it.
        """
        return jnp.all(jnp.abs(first[1].total_RKD) <= LARGEST)

    def encode(self, x_BHTD: Array, state: State, first: tuple[Array, Any]) -> tuple[Packed, State]:
        """Returns the packed form and the state of the chain, from the result of `first_sums`."""
        from pallas_kernels import quantize_pack

        heads = lambda x: x.reshape(*x_BHTD.shape[:2], *x.shape[1:])  # noqa: E731
        (c_BHKD, sums), r_BHTD, codes = first, x_BHTD, []
        ids, tables, learned = [], [], []
        for stage in range(self.centroids.stages):
            if stage:
                c_BHKD = self._start(r_BHTD, state, stage)
                sums = self._sums(r_BHTD, c_BHKD, self.fit.reseed)
            c_BHKD = self._clustered(r_BHTD, sums, c_BHKD, state)
            codes_BHKD, steps, c_BHKD = store_table(c_BHKD, self.centroids.dtype)
            args, by = (_rows(r_BHTD), _rows(c_BHKD)), self.kernels
            if stage < self.centroids.stages - 1:
                ids_RT, r_RTD = quantize_pack.assign_and_subtract(*args, implementation=by)
                r_BHTD = heads(r_RTD)
            else:
                ids_RT, *codes = quantize_pack.assign_and_pack(*args, self.form, implementation=by)
            ids.append(heads(ids_RT))
            tables.append((codes_BHKD, steps))
            learned.append(c_BHKD)
        of_stages = lambda *parts: jnp.stack(parts, axis=2)  # noqa: E731
        kmeans_packed = KMeansPacked(of_stages(*ids), *jax.tree.map(of_stages, *tables))
        if self.fit.warm_start:
            warm = jnp.ones_like(state[0].warm)
            state = (KMeansState(of_stages(*learned), warm), state[1])
        return (kmeans_packed, self._collected(*map(heads, codes))), state

    def _start(self, x_BHTD: Array, state: State, stage: int) -> Array:
        """Returns the first centroids of a stage: some of the tokens, or the previous span's centroids."""
        start = start_tokens(x_BHTD.shape[2], self.centroids.num_centroids)
        c_BHKD = x_BHTD[:, :, start].astype(jnp.float32)
        if not self.fit.warm_start:
            return c_BHKD
        previous_BHSKD, warm = state[0]
        return jnp.where(warm, previous_BHSKD[:, :, stage].astype(jnp.float32), c_BHKD)

    def _sums(self, x_BHTD: Array, c_BHKD: Array, scores: bool) -> Any:
        from pallas_kernels import kmeans

        heads = lambda x: x.reshape(*x_BHTD.shape[:2], *x.shape[1:])  # noqa: E731
        args = (_rows(x_BHTD), _rows(c_BHKD))
        out = kmeans.kmeans_sums(*args, scores=scores, implementation=self.kernels)
        return jax.tree.map(heads, out)

    def _clustered(self, x_BHTD: Array, sums: Any, c_BHKD: Array, state: State) -> Array:
        """Returns the centroids after all iterations, of which `sums` was the first."""
        n = self.fit.cold_iters
        if self.fit.warm_start and self.fit.iters != n:
            n = jnp.where(state[0].warm, self.fit.iters, n)
        c_BHKD = _moved(sums, c_BHKD)
        if self.fit.reseed:
            c_BHKD = _respread(x_BHTD, sums, c_BHKD, n)
        step = lambda _, c: _moved(self._sums(x_BHTD, c, False), c)  # noqa: E731
        if isinstance(n, int):  # a loop whose length is data waits for the host in every step
            for i in range(1, n):
                c_BHKD = step(i, c_BHKD)
            return c_BHKD
        return lax.fori_loop(1, n, step, c_BHKD)

    def _collected(self, codes_BHTC: Array, scales: Array) -> IntegerPacked | GridPacked:
        """Returns the quantizer's packed form of the codes and scales that `assign_and_pack` gives."""
        if not isinstance(self.levels.fit, LeastSquaresFit):
            return IntegerPacked(codes_BHTC, lax.bitcast_convert_type(scales, E4M3), None)
        lsq_BHT, match_BHT, largest_BHT = (scales[:, :, i] for i in range(3))
        gain = self.levels.fit.gain
        scale_BHT = lsq_BHT ** (1 - gain) * match_BHT**gain if gain else lsq_BHT
        exponent_BH = span_exponent(largest_BHT)
        scale_BHT1 = times_power_of_two(scale_BHT, -exponent_BH)[..., None]
        stored_BHT1, exponents_BH, _ = store_scale(scale_BHT1, exponent_BH, E4M3)
        head_dim = codes_BHTC.shape[-1] * 8 // self.levels.bits
        return GridPacked(codes_BHTC, stored_BHT1, exponents_BH, head_dim)


def _rows(x_BH: Array) -> Array:
    return x_BH.reshape(-1, *x_BH.shape[2:])


def _moved(sums: Any, c_BHKD: Array) -> Array:
    """Returns the mean of every cluster's tokens, or the old centroid of a cluster without tokens."""
    mean_BHKD = sums.total_RKD / jnp.maximum(sums.number_RK, 1)[..., None]
    return jnp.where(sums.number_RK[..., None] > 0, mean_BHKD, c_BHKD)


def _respread(x_BHTD: Array, sums: Any, c_BHKD: Array, n: int | Array) -> Array:
    """Moves centroids that attract at most one token to badly served tokens, if iterations follow."""
    spare_BHK = (sums.number_RK <= 1) & (jnp.asarray(n) > 1)

    def some() -> Array:
        square_BHT = jnp.sum(jnp.square(x_BHTD.astype(jnp.float32)), axis=-1)
        distance_BHT = jnp.maximum(square_BHT - 2 * sums.score_RT, 0)
        return restarted(x_BHTD, c_BHKD, spare_BHK, distance_BHT)

    return lax.cond(jnp.any(spare_BHK), some, lambda: c_BHKD)
