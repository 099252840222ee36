"""Decoding spans of keys and values into a workspace for attention.

Axes: R rows of the stored arrays, n rows decoded, T tokens, W tokens of the workspace (T rounded up
to `PAD`), D head dim.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dequantize import reference
from pallas_kernels.dequantize.dither import FINE
from pallas_kernels.dequantize.types import (
    HEAD_DIMS,
    Encoded,
    Rotation,
    Scheme,
    Source,
    Spans,
    Tokens,
    Tuning,
    Window,
    width_of,
)
from pallas_kernels.gpu.triton_launch import missing

__all__ = ["append_keys", "append_values", "decode_keys", "decode_values", "supported"]

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn))


def supported(stored: Encoded | Array, scheme: Scheme | None) -> str | None:
    """The reason why the kernels cannot decode these rows, or None if they can."""
    width, packed = width_of(stored, scheme), isinstance(stored, Encoded)
    if width not in HEAD_DIMS:
        return f"head_dim={width}; it must be 64, 128 or 256"
    if not packed:
        return None if stored.dtype == jnp.bfloat16 else f"dtype={stored.dtype}; it reads bfloat16"
    if scheme.bits not in (1, 2, 3, 4, 8):
        return f"bits={scheme.bits}; the kernel reads 1, 2, 3, 4 or 8"
    if scheme.group % 8 or width % scheme.group:
        return f"group={scheme.group}; it must be a multiple of 8 that divides {width}"
    if scheme.dithered and (scheme.bits not in (2, 3, 4) or (2 * FINE * scheme.offset) % 1):
        return f"bits={scheme.bits}, offset={scheme.offset} with a dither; the kernel reads 2, 3, 4"
    if not scheme.dithered and (2 * scheme.offset) % 1:
        return f"offset={scheme.offset}; it must be a multiple of a half"
    if scheme.stages and stored.ids_RST.dtype != jnp.uint8:
        return f"ids of {stored.ids_RST.dtype}; the kernel reads uint8 (at most 256 centroids)"
    return None


def decode_keys(
    source: Source,
    *,
    valid: Int[Array, ""] | int,
    dtype: Any,
    scale_n: Float[Array, "n"] | None = None,
    rotation: Rotation | None = None,
    room: int = 0,
    width: int | None = None,
    implementation: str = "mosaic",
    tuning: Tuning | None = None,
) -> Float[Array, "n W D"]:
    """A workspace of keys, decoded and rotated, in bf16 or e4m3.

    x_t = R(position_t) k_t, zero for t >= valid. In e4m3 the result is x / scale, and within every 16
    tokens the order is that of `reference.key_row_of_token`.

    Args:
        source: the rows; several spans are laid one behind the other.
        valid: tokens that count, from the first token of the first span on; may be traced.
        dtype: bfloat16 or float8_e4m3fn.
        scale_n: for e4m3, the value of each row that becomes 1.
        rotation: RoPE of the keys, or None.
        room: tokens for which the workspace has room behind the decoded ones, for `append_keys`; its
            contents are undefined.
        width: tokens of the workspace, of which all are written, zeros behind the valid ones. None
            is the next multiple of `PAD`, up to which only the tiles with valid tokens are written.
            For "triton" and "reference", in bfloat16 and in place of room.
        implementation: "mosaic", "triton" (bfloat16) or "reference"; the kernels know head_dim 64,
            128 and 256.
        tuning: sizes of the kernels; None takes their own. For "triton" tokens are a power of two.

    Raises:
        NotImplementedError: the kernel cannot read this format, or jax_triton is not installed.
        ValueError: an unknown implementation, e4m3 without scales, several spans whose tokens are
            not a multiple of 16 without a width, or a width that holds fewer tokens than are decoded.
    """
    source, rotation = _checked(source, dtype, scale_n, rotation, room, implementation, width)
    valid = jnp.asarray(valid, jnp.int32)
    if implementation == "triton":
        return _kernels(implementation).decode_keys(source, valid, rotation, width, tuning)
    if implementation == "reference":
        return reference.decode_keys(source, valid, dtype, scale_n, rotation, room, width)
    return _kernels(implementation).decode_keys(
        source, valid, dtype, scale_n, rotation, room=room, tuning=tuning
    )


def decode_values(
    source: Source,
    *,
    valid: Int[Array, ""] | int,
    dtype: Any,
    scale_n: Float[Array, "n"] | None = None,
    room: int = 0,
    width: int | None = None,
    implementation: str = "mosaic",
) -> Float[Array, "n W D"] | Float[Array, "n D W"]:
    """A workspace of values: bf16 (n, W, D), or e4m3 / scale, transposed to (n, D, W).

    An 8-bit matrix product reads its right operand along the summed axis, here the tokens; hence
    the transposition. Arguments and errors are those of `decode_keys`.
    """
    source, _ = _checked(source, dtype, scale_n, None, room, implementation, width)
    valid = jnp.asarray(valid, jnp.int32)
    if implementation == "triton":
        return _kernels(implementation).decode_values(source, valid, width)
    if implementation == "reference":
        return reference.decode_values(source, valid, dtype, scale_n, room, width)
    return _kernels(implementation).decode_values(source, valid, dtype, scale_n, room=room)


def append_keys(
    workspace: Float[Array, "n W D"],
    at: Int[Array, ""] | int,
    tokens: Tokens,
    *,
    valid: Int[Array, ""] | int,
    scale_n: Float[Array, "n"] | None = None,
    rotation: Rotation | None = None,
    implementation: str = "mosaic",
) -> Float[Array, "n W D"]:
    """A workspace of `decode_keys` with new keys from token `at` on, in place.

    The valid tokens are written, then zeros to the next multiple of `PAD`. The argument `workspace` must
    not be used any more.

    Args:
        workspace: keys of earlier tokens.
        at: a multiple of 16; may be traced.
        tokens: the new keys.
        valid: new tokens that count; may be traced.
        scale_n: for e4m3, the value of each row that becomes 1, as in the workspace.
        rotation: RoPE of the new keys, or None.
        implementation: "mosaic" or "reference".

    Raises:
        NotImplementedError: the implementation cannot append these tokens.
        ValueError: an unknown implementation, e4m3 without scales, or a source other than `Tokens`.
    """
    dtype = workspace.dtype
    tokens, rotation = _checked_tokens(tokens, dtype, scale_n, rotation, implementation)
    valid, at = jnp.asarray(valid, jnp.int32), jnp.asarray(at, jnp.int32)
    if implementation == "reference":
        x = reference.decode_keys(tokens, valid, dtype, scale_n, rotation)
        return reference.laid_into(workspace, x, at, valid, 1)
    return _kernels(implementation).decode_keys(
        tokens, valid, dtype, scale_n, rotation, into=(workspace, at)
    )


def append_values(
    workspace: Float[Array, "n W D"] | Float[Array, "n D W"],
    at: Int[Array, ""] | int,
    tokens: Tokens,
    *,
    valid: Int[Array, ""] | int,
    scale_n: Float[Array, "n"] | None = None,
    implementation: str = "mosaic",
) -> Float[Array, "n W D"] | Float[Array, "n D W"]:
    """A workspace of `decode_values` with new values from token `at` on, in place.

    Arguments and errors are those of `append_keys`.
    """
    dtype = workspace.dtype
    tokens, _ = _checked_tokens(tokens, dtype, scale_n, None, implementation)
    valid, at = jnp.asarray(valid, jnp.int32), jnp.asarray(at, jnp.int32)
    if implementation == "reference":
        x = reference.decode_values(tokens, valid, dtype, scale_n)
        return reference.laid_into(workspace, x, at, valid, 1 if dtype == jnp.bfloat16 else 2)
    return _kernels(implementation).decode_values(
        tokens, valid, dtype, scale_n, into=(workspace, at)
    )


def _kernels(implementation: str) -> Any:
    """The module of an implementation, imported when it is first asked for.

    Mosaic takes long to import, and Triton is not always installed.
    """
    if implementation == "triton":
        if (why := missing()) is not None:
            raise NotImplementedError(f"implementation='triton': {why}")
        from pallas_kernels.dequantize import triton

        return triton
    from pallas_kernels.dequantize import mosaic_gpu

    return mosaic_gpu


def _checked(
    source: Source,
    dtype: Any,
    scale_n: Array | None,
    rotation: Rotation | None,
    room: int,
    implementation: str,
    width: int | None = None,
) -> tuple[Source, Rotation | None]:
    """The source and the rotation with indices as int32 arrays; raises what `decode_keys` documents."""
    if implementation not in ("reference", "mosaic", "triton"):
        raise ValueError(
            f"implementation={implementation!r}; accepted: 'reference', 'mosaic', 'triton'"
        )
    dtype = jnp.dtype(dtype)
    if dtype not in _DTYPES:
        raise NotImplementedError(f"dtype={dtype}: the workspace is bfloat16 or float8_e4m3fn")
    if dtype != jnp.bfloat16 and scale_n is None:
        raise ValueError(f"scale_n=None with dtype={dtype}; accepted: a scale for every row")
    if implementation == "triton" and dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"implementation='triton': dtype={dtype}; the kernel writes bfloat16"
        )
    if implementation != "reference" and (why := supported(source.stored, source.scheme)):
        raise NotImplementedError(
            f"implementation={implementation!r}: {why}; 'reference' serves it"
        )
    source = _with_arrays(source)
    spans = source.first_row.ndim
    if spans > (1 if isinstance(source, Spans) else 0):
        raise ValueError(
            f"{source.first_row.shape=}; accepted: one first row, or of `Spans` one for every span"
        )
    if source.row_n is not None and source.row_n.shape != (source.rows,):
        raise ValueError(f"{source.row_n.shape=}; accepted: ({source.rows},), a row for each")
    if width is not None:
        _check_width(
            width, max(1, source.first_row.size) * source.tokens, dtype, room, implementation
        )
    elif spans and source.tokens % 16:
        raise ValueError(
            f"spans of {source.tokens} tokens; several at once must have a multiple of 16"
        )
    if implementation == "triton":
        if source.window is not None or source.row_n is not None or room:
            raise NotImplementedError(
                "implementation='triton': it decodes whole spans, of rows one after another, and "
                "leaves room by a width"
            )
        if not isinstance(source.stored, Encoded) and source.stored.ndim == 4:
            raise NotImplementedError("implementation='triton': it decodes rows, not (B, T, H, D)")
    if rotation is not None:
        first = jnp.asarray(rotation.first, jnp.int32)
        rotation = dataclasses.replace(rotation, first=first)
    return source, rotation


def _check_width(width: int, tokens: int, dtype: Any, room: int, implementation: str) -> None:
    if implementation == "mosaic" or dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"width={width} with implementation={implementation!r}, dtype={dtype}; 'triton' and "
            "'reference' serve it, in bfloat16"
        )
    if width < tokens or room:
        raise ValueError(f"{width=}, {room=}; accepted: no room, and at least {tokens} tokens")


def _checked_tokens(
    tokens: Tokens,
    dtype: Any,
    scale_n: Array | None,
    rotation: Rotation | None,
    implementation: str,
) -> tuple[Tokens, Rotation | None]:
    if not isinstance(tokens, Tokens):
        raise ValueError(f"tokens: {type(tokens).__name__}; accepted: Tokens")
    if implementation == "triton":
        raise NotImplementedError("implementation='triton': it writes no workspace in place")
    return _checked(tokens, dtype, scale_n, rotation, 0, implementation)


def _with_arrays(source: Source) -> Source:
    """The same source with its indices as int32 arrays."""
    number = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
    if isinstance(source, Window):
        return dataclasses.replace(source, of=_with_arrays(source.of), start=number(source.start))
    arrays = dict(first_row=number(source.first_row))
    if source.row_n is not None:
        arrays |= dict(row_n=number(source.row_n))
    return dataclasses.replace(source, **arrays)
