"""What the GPU kernels are told of codecs: their declared storage, in the kernels' own words.

A codec says what its bytes stand for (`qvg_jax.codecs.storage`). Here that becomes a `Scheme` and the
arrays of an `Encoded`, or the name of the part that the kernels do not read.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.dequantize import Encoded, Scheme, supported
from qvg_jax.cache.slots import Float8Bytes
from qvg_jax.codecs.base import Codec, IdentityPacked
from qvg_jax.codecs.storage import Centroids, Levels, Storage, Values

__all__ = ["E4M3", "encoded", "halves", "scheme_of"]

E4M3 = jnp.float8_e4m3fn


def scheme_of(codec: Codec, head_dim: int, joined: int = 1) -> Scheme | None | str:
    """The scheme by which kernels decode a codec's bytes, None for plain bf16, or a reason why they cannot.

    Args:
        codec: of keys or values; its `storage` is what it declares.
        head_dim: channels of a head.
        joined: 2 for a codec that takes two heads for one vector; `halves` makes two of it again.
    """
    storage = codec.storage
    if storage is None:
        return f"{codec.name}: no storage is declared"
    if storage.heads != joined:
        return f"{storage.heads} heads in one vector, not {joined}"
    parts = _known_parts(storage)
    if isinstance(parts, str):
        return parts
    centroids, codes = parts
    if isinstance(codes, Values):
        if joined > 1:
            return "plain values of two heads in one vector"
        if codes.dtype != "bf16":
            return f"plain values in {codes.dtype}"
        token: Any = jax.ShapeDtypeStruct((1, 1, head_dim), jnp.bfloat16)
        return supported(token, None)
    width = joined * head_dim
    group = width if codes.group is None else codes.group
    groups = width // group
    if joined > 1 and groups > 1 and groups % joined:
        return f"{groups} scales for two heads"
    stages = 0 if centroids is None else centroids.stages
    scheme = Scheme(
        bits=codes.bits,
        group=min(group, head_dim),
        offset=codes.offset,
        stages=stages,
        dithered=codes.dithered,
        zero_points=codes.zero_points,
        deviations=codes.deviations,
    )
    return supported(_forms(scheme, head_dim, centroids), scheme) or scheme


def _known_parts(storage: Storage) -> tuple[Centroids | None, Levels | Values] | str:
    """Returns centroids and codes of a declaration, or the first part that kernels do not read."""
    centroids = None
    for smoothing in storage.smoothings:
        if isinstance(smoothing, str):
            return f"{smoothing} in front of the codes; the kernels read k-means there"
        centroids = smoothing
    if len(storage.smoothings) > 1:
        return f"{len(storage.smoothings)} k-means in a row; the kernels read one, of any stages"
    codes = storage.codes
    if isinstance(codes, str):
        return f"{codes}; the kernels read equally spaced levels"
    if isinstance(codes, Values):
        behind = f"plain values in {codes.dtype} behind k-means"
        return (None, codes) if centroids is None else behind
    if codes.scale_dtype != "e4m3":
        return f"{codes.scale_dtype} scales; the kernels read e4m3"
    return centroids, codes


def _forms(scheme: Scheme, head_dim: int, centroids: Centroids | None) -> Encoded:
    """Shapes of the arrays of one token, which `supported` checks."""
    form: Any = jax.ShapeDtypeStruct
    ids = None
    if centroids is not None:
        small = centroids.num_centroids <= 256
        ids = form((1, scheme.stages, 1), jnp.uint8 if small else jnp.uint16)
    return Encoded(
        codes_RTC=form((1, 1, head_dim * scheme.bits // 8), jnp.uint8),
        scales_RTG=form((1, 1, max(1, head_dim // scheme.group)), jnp.uint8),
        ids_RST=ids,
        centroids_RSKD=None,
    )


def encoded(packed: Any) -> Encoded | Array:
    """A packed span's arrays as kernels read them: leading axes flattened into rows, float8 as bytes."""
    *before, last = packed if type(packed) is tuple else (packed,)
    kmeans = before[0] if before else None
    flat = lambda x, keep: x.reshape(-1, *x.shape[x.ndim - keep :])  # noqa: E731
    if isinstance(last, IdentityPacked):
        return flat(last.values_BHTD, 2)
    scales, zeros, exponents, deviations = (
        _array(last, name) for name in ("scales", "zeros", "exponents", "deviations")
    )
    steps = None if kmeans is None else kmeans.steps_BHS
    return Encoded(
        codes_RTC=flat(last.codes_BHTC, 2),
        scales_RTG=flat(_bytes(scales), 2),
        ids_RST=None if kmeans is None else flat(kmeans.ids_BHST, 2),
        centroids_RSKD=None if kmeans is None else flat(_bytes(kmeans.centroids_BHSKD), 3),
        exponents_R=None if exponents is None else exponents.reshape(-1),
        steps_RS=None if steps is None else flat(steps, 1 if steps.dtype == jnp.int8 else 2),
        zeros_RTG=None if zeros is None else flat(_bytes(zeros), 2),
        deviations_RD=None if deviations is None else flat(deviations, 1),
    )


def halves(packed: Any) -> Encoded:
    """A packed span of vectors that join two heads, as kernels read it: one row for each head.

    Each row of `encoded` becomes two: the first half of its channels, then the second half.

    It copies, so it is for one span and not for all slots.
    """
    rows: Any = encoded(packed)

    def split(x, axis):  # [R, ..., 2 n, ...] -> [2 R, ..., n, ...]
        apart = x.reshape(*x.shape[:axis], 2, x.shape[axis] // 2, *x.shape[axis + 1 :])
        return jnp.moveaxis(apart, axis, 1).reshape(
            -1, *apart.shape[1:axis], *apart.shape[axis + 1 :]
        )

    def both(x):
        return None if x is None else jnp.repeat(x, 2, axis=0)

    def of_groups(x):
        return split(x, 2) if x is not None and x.shape[2] > 1 else both(x)

    steps, tables, deviations = rows.steps_RS, rows.centroids_RSKD, rows.deviations_RD
    return Encoded(
        codes_RTC=split(rows.codes_RTC, 2),
        scales_RTG=of_groups(rows.scales_RTG),
        ids_RST=both(rows.ids_RST),
        centroids_RSKD=None if tables is None else split(tables, 3),
        exponents_R=both(rows.exponents_R),
        steps_RS=split(steps, 2) if steps is not None and steps.ndim == 3 else both(steps),
        zeros_RTG=of_groups(rows.zeros_RTG),
        deviations_RD=None if deviations is None else split(deviations, 1),
    )


def _array(packed: Any, name: str) -> Any:
    """The array of a packed form whose name, without its axes, is `name`; None if there is none."""
    is_record = dataclasses.is_dataclass(packed)
    fields = [f.name for f in dataclasses.fields(packed)] if is_record else packed._fields
    fields = [field for field in fields if field.rpartition("_")[0] == name]
    return getattr(packed, fields[0]) if fields else None


def _bytes(x: Any) -> Array:
    """The array itself, or the bytes of a float8 array, whether it lies in a slot or not."""
    if isinstance(x, Float8Bytes):
        return x.bytes_x
    return lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == E4M3 else x
