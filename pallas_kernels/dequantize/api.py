"""Decoding spans of keys and values into a workspace for attention.

Axes: R rows of the stored arrays, n rows decoded, T tokens, W tokens of the workspace (T rounded up
to `PAD`), D head dim, B batch.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dequantize import mosaic_gpu, reference
from pallas_kernels.dequantize.types import HEAD_DIMS, Encoded, Scheme, width_of
from pallas_kernels.gpu.triton_launch import missing

__all__ = ["decode_keys", "decode_values", "supported"]

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn))


def supported(source: Encoded | Array, scheme: Scheme | None) -> str | None:
    """Why kernels cannot decode this, or None if they can."""
    width, packed = width_of(source, scheme), isinstance(source, Encoded)
    if width not in HEAD_DIMS:
        return f"head_dim={width}; it must be 64, 128 or 256"
    if not packed:
        return None if source.dtype == jnp.bfloat16 else f"dtype={source.dtype}; it reads bfloat16"
    if scheme.bits not in (1, 2, 3, 4, 8):
        return f"bits={scheme.bits}; the kernel reads 1, 2, 3, 4 or 8"
    if scheme.group % 8 or width % scheme.group:
        return f"group={scheme.group}; it must be a multiple of 8 that divides {width}"
    if (2 * scheme.offset) % 1:
        return f"offset={scheme.offset}; it must be a multiple of a half"
    if scheme.stages and source.ids_RST.dtype != jnp.uint8:
        return f"ids of {source.ids_RST.dtype}; the kernel reads uint8 (at most 256 centroids)"
    return None


def _kernels(implementation: str) -> Any:
    """The module that decodes; Triton's needs what is not always installed."""
    if implementation == "triton":
        if (why := missing()) is not None:
            raise NotImplementedError(f"implementation='triton': {why}")
        from pallas_kernels.dequantize import triton

        return triton
    return mosaic_gpu if implementation == "mosaic" else reference


def _checked(source, scheme, dtype, implementation):
    if implementation not in ("reference", "mosaic", "triton"):
        raise ValueError(
            f"implementation={implementation!r}; accepted: 'reference', 'mosaic', 'triton'"
        )
    if jnp.dtype(dtype) not in _DTYPES:
        raise NotImplementedError(f"dtype={dtype}: the workspace is bfloat16 or float8_e4m3fn")
    if implementation == "reference":
        return
    if implementation == "triton" and jnp.dtype(dtype) != jnp.bfloat16:
        raise NotImplementedError(
            f"implementation='triton': dtype={jnp.dtype(dtype)}; the kernel writes bfloat16"
        )
    if (why := supported(source, scheme)) is not None:
        raise NotImplementedError(
            f"implementation={implementation!r}: {why}; 'reference' serves it"
        )


def _checked_spans(
    source: Any, first_row: Array, window: Any, room: int, into: Any, implementation: str
) -> None:
    packed = isinstance(source, Encoded)
    if first_row.ndim > 1:
        raise ValueError(f"{first_row.shape=}; accepted: one first row, or one for every span")
    if window is not None and (packed or first_row.ndim):
        raise ValueError("window: it belongs to plain tokens of one span")
    if into is not None and (packed or window is not None or room):
        raise ValueError("into: it takes plain tokens, all of them, and has its own room")
    tokens = (source.codes_RTC if packed else source).shape[1]
    if first_row.ndim and tokens % 16:
        raise ValueError(f"spans of {tokens} tokens; several at once must have a multiple of 16")
    if implementation == "triton" and (first_row.ndim or window is not None or room or into):
        raise NotImplementedError("implementation='triton': it decodes whole spans one at a time")
    if implementation == "triton" and not packed and source.ndim == 4:
        raise NotImplementedError("implementation='triton': it decodes rows, not (B, T, H, D)")


def decode_keys(
    source: Encoded | Float[Array, "R T D"] | Float[Array, "B T H D"],
    scheme: Scheme | None,
    *,
    first_row: Int[Array, ""] | Int[Array, "N"],
    rows: int,
    valid: Int[Array, ""],
    dtype: Any,
    unit_n: Float[Array, "n"],
    tables: tuple[Float[Array, "S T D/2"], Float[Array, "S T D/2"]] | None = None,
    first_table: Int[Array, ""] | Int[Array, "N"] | int = 0,
    batch: int = 1,
    pairing: str = "half",
    window: tuple[Int[Array, ""], int] | None = None,
    room: int = 0,
    into: tuple[Array, Int[Array, ""]] | None = None,
    implementation: str = "mosaic",
    tuning: mosaic_gpu.Tuning | None = None,
) -> Float[Array, "n W D"]:
    """Rows of packed or plain keys, rotated, in bf16 or e4m3.

    x_t = R(position_t) k_t, zero for t >= valid. In e4m3 the result is x / unit, and within every 16
    tokens the order is that of `reference.key_row_of_token`.

    Several spans are laid one behind the other, and `valid` counts from the first token of the first.

    Args:
        source: packed keys, or bf16 keys as they are: rows, or tokens with their heads (row b H + h
            is head h of b).
        scheme: how codes become numbers; None with plain keys.
        first_row: first row that is decoded, or that of each of several spans; may be traced.
        rows: how many.
        valid: tokens that count.
        dtype: bfloat16 or float8_e4m3fn.
        unit_n: for e4m3, the value of each row that becomes 1.
        tables: cosine and sine of every token, float32; None for no rotation.
        first_table: which leading index of the tables is the first batch row's, of each span.
        batch: batch rows among `rows`; each has a table.
        pairing: "half" turns channel j with j + D / 2, "interleaved" 2 j with 2 j + 1.
        window: of plain tokens, where to begin and how many to take; None for all. It may reach
            beyond the last one.
        room: tokens for which the workspace has room behind the decoded ones; what is there is not
            said.
        into: (workspace, at): an earlier result whose tokens from `at` on, a multiple of 16, plain
            ones take: the valid ones, then zeros to the next multiple of `PAD`. It is the result,
            and the workspace must not be used any more.
        implementation: "mosaic", "triton" (bfloat16) or "reference"; kernels know head_dim 64, 128
            and 256.
        tuning: of "mosaic"; None takes the measured one.

    Raises:
        NotImplementedError: the kernel cannot read this format, or jax_triton is not installed.
        ValueError: an unknown implementation; several spans whose tokens are not a multiple of 16;
            a window of packed tokens.
    """
    _checked(source, scheme, dtype, implementation)
    first_row, valid, first_table = (
        jnp.asarray(i, jnp.int32) for i in (first_row, valid, first_table)
    )
    _checked_spans(source, first_row, window, room, into, implementation)
    if implementation != "reference":
        more = dict(window=window, tuning=tuning, room=room, into=into)
        more = more if implementation == "mosaic" else {}
        return _kernels(implementation).decode_keys(
            source,
            scheme,
            first_row,
            rows,
            valid,
            dtype,
            unit_n,
            tables,
            first_table,
            batch,
            pairing,
            **more,
        )
    if tables is not None:
        tables = reference.table_rows(tables, first_table, batch)
    if window is not None:
        source, *tables = (reference.cut(x, window) for x in (source, *(tables or ())))
    x = reference.decode_keys(
        source, scheme, first_row, rows, valid, dtype, unit_n, tables or None, pairing, room
    )
    return x if into is None else reference.laid_into(into[0], x, into[1], valid, 1)


def decode_values(
    source: Encoded | Float[Array, "R T D"] | Float[Array, "B T H D"],
    scheme: Scheme | None,
    *,
    first_row: Int[Array, ""] | Int[Array, "N"],
    rows: int,
    valid: Int[Array, ""],
    dtype: Any,
    unit_n: Float[Array, "n"],
    window: tuple[Int[Array, ""], int] | None = None,
    room: int = 0,
    into: tuple[Array, Int[Array, ""]] | None = None,
    implementation: str = "mosaic",
) -> Float[Array, "n W D"] | Float[Array, "n D W"]:
    """Rows of packed or plain values: bf16 (n, W, D), or e4m3 / unit, transposed to (n, D, W).

    An 8-bit matrix product reads its right operand along the summed axis, here the tokens; hence
    the transposition. Arguments and errors as in `decode_keys`.
    """
    _checked(source, scheme, dtype, implementation)
    first_row, valid = (jnp.asarray(i, jnp.int32) for i in (first_row, valid))
    _checked_spans(source, first_row, window, room, into, implementation)
    more = dict(room=room)
    if implementation == "mosaic":
        more |= dict(window=window, into=into)
    elif implementation == "triton":
        more = {}
    elif window is not None:
        source = reference.cut(source, window)
    x = _kernels(implementation).decode_values(
        source, scheme, first_row, rows, valid, dtype, unit_n, **more
    )
    if implementation == "reference" and into is not None:
        return reference.laid_into(into[0], x, into[1], valid, 1 if dtype == jnp.bfloat16 else 2)
    return x
