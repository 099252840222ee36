"""What the GPU kernels must know of codecs and ropes: formats of bytes, pairs of channels.

Kernels read codes and tables; codecs and ropes are functions. Which format a codec writes, and how
a rope pairs its channels, is found by trying: the reference decoder of the kernels must give what
the codec's own `decode` gives.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, use_abstract_mesh
from jaxtyping import Array

from pallas_kernels.dequantize import (
    Encoded,
    Rotation,
    Scheme,
    Spans,
    Tokens,
    decode_keys,
    supported,
)
from pallas_kernels.dequantize.reference import decoded
from qvg_jax.cache.rope import Rope
from qvg_jax.cache.slots import Float8Bytes
from qvg_jax.codecs.base import Codec, IdentityPacked
from qvg_jax.codecs.quantize.grid import GridPacked
from qvg_jax.codecs.quantize.integer import IntegerPacked
from qvg_jax.codecs.smoothing.kmeans import KMeansPacked

__all__ = ["E4M3", "encoded", "halves", "pairing_of", "scheme_of"]

E4M3 = jnp.float8_e4m3fn


@functools.lru_cache(maxsize=64)
def scheme_of(codec: Codec, head_dim: int, joined: int = 1) -> Scheme | None | str:
    """How the codec's bytes decode; None for plain bf16, a reason if the kernels cannot.

    Args:
        codec: of keys or values.
        head_dim: channels of a head.
        joined: 2 for a codec that takes two heads for one vector; `halves` makes two of it again.
    """
    try:
        shape = (1, joined, 256, head_dim)
        span = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        form = jax.eval_shape(lambda x: codec.encode(x, codec.init(shape, x.dtype))[0], span)
    except (TypeError, ValueError) as error:  # TypeError: it wants another number of heads
        return str(error)
    parts = _parts(form)
    if isinstance(parts, str):
        return parts
    kmeans, last = parts
    if isinstance(last, IdentityPacked):
        values = last.values_BHTD
        if joined > 1:
            return "plain values of two heads in one vector"
        return None if values.dtype == jnp.bfloat16 else f"values are stored in {values.dtype}"
    if last.codes_BHTC.shape[1] != 1:
        return "it takes every head for itself"
    if last.scales_BHTG.dtype != E4M3:
        return f"scales are stored in {last.scales_BHTG.dtype}; the kernels read e4m3"
    if getattr(last, "zeros_BHTG", None) is not None:
        return "it has zero points"
    bits = 8 * last.codes_BHTC.shape[-1] // (joined * head_dim)
    stages = 0 if kmeans is None else kmeans.ids_BHST.shape[2]
    groups = last.scales_BHTG.shape[-1]
    if joined > 1 and groups > 1 and groups % 2:
        return f"{groups} scales for two heads"
    group = min(joined * head_dim // groups, head_dim)
    for offset in (2 ** max(bits - 1, 0) - 1, (2**bits - 1) / 2):
        scheme = Scheme(bits=bits, group=group, offset=offset, stages=stages)
        source = jax.eval_shape(encoded if joined == 1 else halves, form)
        if (why := supported(source, scheme)) is not None:
            return why
        if _agrees(codec, form, scheme):
            return scheme
    return "its codes do not stand for equally spaced levels"


@contextmanager
def _at_once() -> Iterator[None]:
    """Computes what is inside now, without a mesh: it is not part of the program that is traced, which
    may be one for a single device of several (`jax.shard_map`), where nothing can be computed."""
    with use_abstract_mesh(AbstractMesh((), ())), jax.ensure_compile_time_eval():
        yield


def _agrees(codec: Codec, form: Any, scheme: Scheme) -> bool:
    """Whether random bytes mean the same to the codec and to the kernels' reference."""
    rng = np.random.default_rng(0)

    def fill(x: Any) -> Array:
        if x.dtype == E4M3:
            return jnp.asarray(rng.uniform(0.5, 2.0, x.shape), jnp.float32).astype(E4M3)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(x.shape), jnp.float32).astype(x.dtype)
        low, high = (-2, 2) if x.dtype == jnp.int8 else (0, 255)
        return jnp.asarray(rng.integers(low, high, x.shape)).astype(x.dtype)

    with _at_once():
        packed = jax.tree.map(fill, form)
        if (kmeans := _parts(packed)[0]) is not None:
            ids = kmeans.ids_BHST % kmeans.centroids_BHSKD.shape[3]
            at = next(i for i, node in enumerate(packed) if node is kmeans)
            packed = (*packed[:at], kmeans._replace(ids_BHST=ids), *packed[at + 1 :])
        theirs = codec.decode(packed, jnp.float32)[0]
        source = encoded(packed) if len(theirs) == 1 else halves(packed)
        ours = decoded(Spans(source, scheme, 0, len(theirs)))
        return bool(jnp.allclose(ours, theirs, rtol=1e-5, atol=1e-5))


def _parts(packed: Any) -> tuple[KMeansPacked | None, Any] | str:
    """The one or two nodes of a packed span that the kernels know."""
    nodes = packed if type(packed) is tuple else (packed,)
    *before, last = nodes
    known = isinstance(last, IntegerPacked | GridPacked) and all(
        isinstance(b, KMeansPacked) for b in before
    )
    if isinstance(last, IdentityPacked) and not before:
        return None, last
    if not known or len(before) > 1:
        names = " > ".join(type(n).__name__ for n in nodes)
        return f"{names}; the kernels read k-means (once) and integer or grid codes"
    return (before[0] if before else None), last


def encoded(packed: Any) -> Encoded | Array:
    """Arrays with all leading axes in one; float8 as bytes."""
    kmeans, last = _parts(packed)
    flat = lambda x, keep: x.reshape(-1, *x.shape[x.ndim - keep :])  # noqa: E731
    if isinstance(last, IdentityPacked):
        return flat(last.values_BHTD, 2)
    exponents = getattr(last, "exponents_BH", None)
    steps = None if kmeans is None else kmeans.steps_BHS
    return Encoded(
        codes_RTC=flat(last.codes_BHTC, 2),
        scales_RTG=flat(_bytes(last.scales_BHTG), 2),
        ids_RST=None if kmeans is None else flat(kmeans.ids_BHST, 2),
        centroids_RSKD=None if kmeans is None else flat(_bytes(kmeans.centroids_BHSKD), 3),
        exponents_R=None if exponents is None else exponents.reshape(-1),
        steps_RS=None if steps is None else flat(steps, 1 if steps.dtype == jnp.int8 else 2),
    )


def halves(packed: Any) -> Encoded:
    """As `encoded`, each row's vectors as those of two rows: their first channels, then the others.

    It copies, so it is for one span and not for all slots.
    """
    rows = encoded(packed)

    def split(x, axis):  # [R, ..., 2 n, ...] -> [2 R, ..., n, ...]
        apart = x.reshape(*x.shape[:axis], 2, x.shape[axis] // 2, *x.shape[axis + 1 :])
        return jnp.moveaxis(apart, axis, 1).reshape(
            -1, *apart.shape[1:axis], *apart.shape[axis + 1 :]
        )

    def both(x):
        return None if x is None else jnp.repeat(x, 2, axis=0)

    scales, steps, tables = rows.scales_RTG, rows.steps_RS, rows.centroids_RSKD
    return Encoded(
        codes_RTC=split(rows.codes_RTC, 2),
        scales_RTG=split(scales, 2) if scales.shape[2] > 1 else both(scales),
        ids_RST=both(rows.ids_RST),
        centroids_RSKD=None if tables is None else split(tables, 3),
        exponents_R=both(rows.exponents_R),
        steps_RS=split(steps, 2) if steps is not None and steps.ndim == 3 else both(steps),
    )


def _bytes(x: Any) -> Array:
    """The array, or the bytes of a float8 one, in a slot or not."""
    if isinstance(x, Float8Bytes):
        return x.bytes_x
    return lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == E4M3 else x


@functools.lru_cache(maxsize=64)
def pairing_of(rope: Rope, head_dim: int, pos_dims: int) -> str | None:
    """Which channels the rope turns together, or None if its tables are something else."""
    form = jax.eval_shape(rope.table, jax.ShapeDtypeStruct((1, 4, pos_dims), jnp.float32))
    want = jax.ShapeDtypeStruct((1, 4, head_dim // 2), jnp.float32)
    if (
        not isinstance(form, tuple)
        or [(f.shape, f.dtype) for f in form] != [(want.shape, want.dtype)] * 2
    ):
        return None
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    with _at_once():
        x, tables = draw(1, 1, 4, head_dim), (draw(1, 4, head_dim // 2), draw(1, 4, head_dim // 2))
        theirs = rope.rotate(x, jax.tree.unflatten(jax.tree.structure(form), tables))[0]
        for pairing in ("half", "interleaved"):
            ours = decode_keys(
                Tokens(x[0].astype(jnp.float32), 0, 1), valid=4, dtype=jnp.bfloat16,
                rotation=Rotation(tables, pairing), implementation="reference",
            )  # fmt: skip
            if bool(jnp.allclose(ours[:, :4].astype(jnp.float32), theirs, rtol=1e-2, atol=2e-2)):
                return pairing
    return None
