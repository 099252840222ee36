"""Transform coding of a span within a budget: its own principal axes, bits where the energy is."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from qvg_jax.codecs.base import Codec, Packed, Shape, State, check_span, per_element
from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.number_format import FormatLike
from qvg_jax.codecs.quantize.allocated import allocated_quantize
from qvg_jax.codecs.quantize.heads import heads_as_channels
from qvg_jax.codecs.smoothing.klt import klt_rotation
from qvg_jax.codecs.smoothing.kmeans import kmeans_smoothing
from qvg_jax.codecs.spec import factory

__all__ = ["transform_codec"]


@factory
def transform_codec(
    budget: float = 2.33,
    *,
    num_centroids: int = 0,
    iters: int = 5,
    rank: int | None = None,
    tokens_per_axis: int = 12,
    vector_bits: int = 6,
    max_bits: int = 8,
    min_bits: int = 0,
    scale_dtype: FormatLike = "e4m3",
    gain: float = 0.0,
    gain_axis: str = "channel",
    refine: int = 2,
    across_heads: bool = False,
) -> Codec:
    """Returns `klt_rotation` and `allocated_quantize` with as many code bits as a budget leaves.

    For spans of T tokens: R = min(D, T // 12) axes, and the largest number of code bytes per
    token such that codes, scales, axes, means, steps and bit counts together stay within `budget`
    bits per element. Short spans spend more of it on their axes, long ones nearly all on codes.
    Measured on captured K and V: at 1.6 and 2.33 bits 64 axes are best for 768 tokens, all of them from
    about 1,500 on; at 0.9 bits an axis wants four times the tokens (`tokens_per_axis=48`).

    `num_centroids` puts k-means (int8 centroids, every span by itself) in front, for tokens whose
    kinds do not lie along straight axes. It pays from about 3,000 tokens on: on captured K and V
    of 5,120 tokens, 64 centroids leave 13 and 8 % less error within the same budget.

    Decode, per element: unpack (two byte loads, shift-or, shift, mask, convert), a multiply-add
    and a multiplication, then D multiply-adds as one matrix product per span; see `klt_rotation`.

    Args:
        budget: bits per element, everything counted.
        num_centroids: clusters in front; 0 for none.
        iters: k-means iterations.
        rank: R, instead of the rule above.
        tokens_per_axis: tokens that pay for one more axis, in that rule.
        vector_bits: bits of an entry of a stored axis.
        across_heads: one budget for all heads (`heads_as_channels`), whose channels compete for it; such
            a cache cannot be divided by heads between devices.
        max_bits, min_bits, scale_dtype, gain, gain_axis, refine: as in `allocated_quantize`.

    Returns:
        A stateless codec; `bits_per_element` is at most `budget`, by less than 8 / D (8 / (H D) across heads).

    Raises:
        ValueError: an argument outside its range; on use, a span too small for the budget.
    """
    if not 0 < budget <= 16:
        raise ValueError(f"budget={budget} is not accepted: give more than 0, at most 16 bits")

    clusters = []
    if num_centroids:
        smoothing = kmeans_smoothing(
            num_centroids, iters, centroid_dtype="int8", warm_start=False, reseed=True
        )
        clusters = [smoothing]

    if tokens_per_axis < 1:
        raise ValueError(f"tokens_per_axis={tokens_per_axis} is not accepted: give 1 or more")

    def parts(rank: int | None, bits: float) -> Codec:
        quantize = allocated_quantize(
            bits,
            max_bits=max_bits,
            min_bits=min_bits,
            scale_dtype=scale_dtype,
            gain=gain,
            gain_axis=gain_axis,
            refine=refine,
        )
        if across_heads:
            quantize = heads_as_channels(quantize)
        return chain(*clusters, klt_rotation(rank, vector_bits), quantize)

    def fitted(h: int, t: int, d: int) -> Codec:
        r = min(d, max(1, t // tokens_per_axis)) if rank is None else rank
        c = h * d if across_heads else d  # channels that share a budget
        one = (1, c // d, t, d)
        largest = max_bits * c // 8  # code bytes of a token
        overhead = parts(r, 8 * largest / c).nbytes(one) - t * largest
        code_bytes = min(int(budget * c * t / 8 - overhead) // t, largest)
        fewest = max(1, -(-min_bits * c // 8))
        if code_bytes < fewest:
            least = 8 * (overhead + t * fewest) / (t * c)
            raise ValueError(
                f"budget={budget} bits leaves too few code bits for a span of {t} tokens x {d} "
                f"channels; accepted: {least:.3f} or more, or longer spans"
            )
        return parts(r, 8 * code_bytes / c)

    def codec_for(shape: Shape, dtype: Any = jnp.float32) -> Codec:
        check_span(shape, dtype)
        return fitted(shape[1] if across_heads else 1, shape[2], shape[3])

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> State:
        return codec_for(shape, dtype).init(shape, dtype)

    def encode(
        x_BHTD: Array, state: State, *, key: PRNGKeyArray | None = None
    ) -> tuple[Packed, State]:
        return codec_for(x_BHTD.shape, x_BHTD.dtype).encode(x_BHTD, state, key=key)

    def decode(packed: Packed, dtype: Any = jnp.bfloat16) -> Array:
        return any_parts.decode(packed, dtype)  # rank and bits are in the packed shapes

    def nbytes(shape: Shape) -> int:
        return codec_for(shape).nbytes(shape)

    any_parts = parts(rank, float(max_bits))
    first = f"kmeans{num_centroids} > " if num_centroids else ""
    name = f"{first}transform{budget:g}" + (f"-gain{gain:g}" if gain else "")
    name += "-heads" if across_heads else ""
    return Codec(
        init,
        encode,
        decode,
        per_element(nbytes),
        name,
        nbytes,
        any_parts.storage,
        any_parts.deficit,
    )
