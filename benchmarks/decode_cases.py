"""Cases of the decoding benchmark: spans of several formats, decoded by kernels and by XLA."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.attention_cases import Row, inputs, noise
from pallas_kernels.dequantize import (
    Encoded,
    Rotation,
    Scheme,
    Spans,
    decode_keys,
    decode_values,
)
from pallas_kernels.dequantize.types import Tuning
from qvg_jax.attention.stored import decoded_span
from qvg_jax.cache.view import CacheView
from qvg_jax.codecs import presets

__all__ = ["DECODERS"]

E4M3 = jnp.float8_e4m3fn
FORMS = {
    "group 64": Scheme(bits=2, group=64, offset=1.0, stages=1),
    "group 128": Scheme(bits=2, group=128, offset=1.5, stages=1),
    "dithered": Scheme(2, 128, 2 - 1 / 128, 1, dithered=True, deviations=True),
}
# Codecs whose spans have these forms.
CODECS = {
    "group 64": lambda: presets.get("qvg"),
    "group 128": lambda: presets.pair("midrise")[0],
    "dithered": lambda: presets.pair("dither")[0],
}
# Other sizes than their own: heads and tokens of a CTA.
SIZES = {
    "mosaic": ((1, 64), (4, 64), (1, 128), (2, 32), (4, 32)),
    "triton": ((1, 32), (2, 32), (4, 16), (2, 64), (4, 64)),
}


def _bytes(shape: tuple[int, ...], seed: int) -> jax.Array:
    return (noise(shape, seed, jnp.float32) * 40 + 128).astype(jnp.uint8)


Case = tuple[str, Callable, tuple, int]  # name, function, its arguments, bytes read and written


def _kernel_decoding(heads: int, tokens: int, variants: bool, by: str) -> Iterator[Case]:
    """Yields the cases of decoding a span by kernels, with `variants` also in other sizes of a CTA."""
    sizes: dict[str, Tuning | None] = {"": None}
    for h, t in SIZES[by] if variants else ():
        sizes[f", {h} heads, {t} tokens"] = Tuning(heads=h, tokens=t)
    rotation = Rotation(tuple(noise((1, tokens, 64), i, jnp.float32) for i in (1, 2)))
    for form, scheme in FORMS.items():
        source = Encoded(
            codes_RTC=_bytes((heads, tokens, 32), 4),
            scales_RTG=_bytes((heads, tokens, 128 // scheme.group), 5) // 4,
            ids_RST=_bytes((heads, 1, tokens), 6),
            centroids_RSKD=noise((heads, 1, 256, 128), 7),
            deviations_RD=noise((heads, 128), 8) if scheme.deviations else None,
        )
        read = sum(a.nbytes for a in jax.tree.leaves(source))
        here = dict(valid=tokens, scale_n=jnp.ones((heads,), jnp.float32), implementation=by)
        for dtype in (jnp.bfloat16, E4M3) if by == "mosaic" else (jnp.bfloat16,):
            name = "bf16" if dtype == jnp.bfloat16 else "e4m3"
            for what, decode, how in (
                ("values", decode_values, {}),
                ("keys, rotated", decode_keys, dict(rotation=rotation)),
            ):
                for size, tuning in (sizes if how else {"": None}).items():
                    more = here | how | (dict(tuning=tuning) if tuning else {})
                    run = lambda s, f=decode, c=scheme, d=dtype, m=more: f(  # noqa: E731
                        Spans(s, c, 0, heads), dtype=d, **m
                    )
                    written = heads * tokens * 128 * jnp.dtype(dtype).itemsize
                    yield f"{what} to {name}, {form}{size}", run, (source,), read + written


def _xla_decoding(heads: int, tokens: int, variants: bool) -> Iterator[Case]:
    """Yields the cases of decoding a span by XLA as it is done for cuDNN, which has no variants."""
    place = (jnp.int32(0), jnp.int32(0))  # layer and slot

    def values(view: CacheView) -> jax.Array:
        return decoded_span(view, *place, jnp.bfloat16)[1]

    def keys(view: CacheView) -> jax.Array:
        k, table = decoded_span(view, *place, jnp.bfloat16)[0], view.span_table(place[1])
        return view.keys(*lax.optimization_barrier((k, table)))

    for form, codec in CODECS.items():
        _, view, *_ = inputs(Row(form, heads, 1, tokens, 1), codec())
        read = sum(a.nbytes for a in jax.tree.leaves(view.cache.span_k))
        for what, run in (("values", values), ("keys, rotated", keys)):
            yield f"{what} to bf16, {form}", run, (view,), read + heads * tokens * 128 * 2


# Each yields the cases of (heads, tokens, whether other sizes of kernels are wanted).
DECODERS = {
    "mosaic": functools.partial(_kernel_decoding, by="mosaic"),
    "triton": functools.partial(_kernel_decoding, by="triton"),
    "xla": _xla_decoding,
}
