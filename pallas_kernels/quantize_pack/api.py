"""Assignment of tokens to centroids and quantization of their residuals, in one pass or two.

Axes: R rows (batch and heads), T tokens, D head dim, K centroids, G groups, C code bytes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.kmeans.api import check, padded_centroids, parts_for, whole_eights
from pallas_kernels.kmeans.types import HEAD_DIM, Metric, Tuning
from pallas_kernels.quantize_pack import reference
from pallas_kernels.quantize_pack.types import Dithered, Integers, Midrise

__all__ = ["assign_and_pack", "assign_and_subtract", "pack_dithered", "supported"]


def supported(form: Integers | Midrise | Dithered, head_dim: int = HEAD_DIM) -> str | None:
    """The reason why the kernels cannot write this format, or None if they can."""
    accepted = (1, 2, 4) if isinstance(form, Midrise) else (2, 4)
    if form.bits not in accepted:
        return f"bits={form.bits}; the kernel writes {', '.join(map(str, accepted))}"
    if isinstance(form, Integers) and (form.group % 8 or head_dim % form.group):
        return f"group={form.group}; it must be a multiple of 8 that divides {head_dim}"
    return None


def assign_and_pack(
    x_RTD: Float[Array, "R T D"],
    c_RKD: Float[Array, "R K D"],
    form: Integers | Midrise,
    *,
    metric: Metric | None = None,
    implementation: str = "mosaic",
    parts: int | None = None,
    tuning: Tuning | None = None,
) -> tuple[Array, ...]:
    """Subtracts from every token its nearest centroid, in bfloat16, and packs the residual.

    Args:
        x_RTD: tokens, finite.
        c_RKD: centroids, finite; at most 256.
        form: `Integers` or `Midrise`, which say what is computed.
        metric: by which distances are measured; None is |x - c|.
        implementation: "mosaic" (Hopper; bfloat16, D = 128), "triton" (Ampere and later; D 64, 128
            or 256) or "xla".
        parts: for "mosaic", CTAs per row; None chooses.
        tuning: sizes for "mosaic"; None takes the measured ones.

    Returns:
        ids (R, T) and codes (R, T, C) in uint8, and for integers the bytes of e4m3 scales (R, T, G), and
        of zero points (R, T, G) if there are any; for mid-rise grids float32 (R, 3, T): least-squares
        scale, matching scale <r, r> / <r, l>, largest entry.

    Raises:
        NotImplementedError: the kernel cannot do this; the message says why.
        ValueError: shapes that do not belong together, too many parts, or an unknown
            implementation.
    """
    check(x_RTD, c_RKD, implementation)
    integers = isinstance(form, Integers)
    if implementation == "xla":
        ids_RT, r_RTD = reference.residual(x_RTD, c_RKD.astype(jnp.bfloat16), metric)
        return ids_RT, *(reference.integers if integers else reference.midrise)(r_RTD, form)
    _check_form(form, x_RTD.shape[2], implementation)
    if implementation == "triton":
        return _encoded_by_triton(x_RTD, c_RKD, form, metric)
    ids_RT, codes_RTC, scales = _encoded(x_RTD, c_RKD, form, metric, parts, tuning)
    scales = scales[:, :, : x_RTD.shape[1]]
    if not integers:
        return ids_RT, codes_RTC, scales
    scales_RTG = jnp.swapaxes(scales, 1, 2)
    return ids_RT, codes_RTC, *jnp.split(scales_RTG, 1 + form.zero_points, axis=2)


def assign_and_subtract(
    x_RTD: Float[Array, "R T D"],
    c_RKD: Float[Array, "R K D"],
    *,
    metric: Metric | None = None,
    implementation: str = "mosaic",
    parts: int | None = None,
    tuning: Tuning | None = None,
) -> tuple[UInt8[Array, "R T"], Float[Array, "R T D"]]:
    """ids of the nearest centroids and the residual in bfloat16.

    Arguments and errors are those of `assign_and_pack`.
    """
    check(x_RTD, c_RKD, implementation)
    if implementation == "xla":
        ids_RT, r_RTD = reference.residual(x_RTD, c_RKD.astype(jnp.bfloat16), metric)
        return ids_RT, r_RTD.astype(jnp.bfloat16)
    if implementation == "triton":
        return _encoded_by_triton(x_RTD, c_RKD, None, metric)
    return _encoded(x_RTD, c_RKD, None, metric, parts, tuning)


def pack_dithered(
    r_RTD: Float[Array, "R T D"],
    factor_RD: Float[Array, "R D"],
    form: Dithered,
    *,
    implementation: str = "mosaic",
    parts: int | None = None,
    tuning: Tuning | None = None,
) -> tuple[UInt8[Array, "R T C"], Float[Array, "R N T"]]:
    """Codes and scales of residuals whose channels are multiplied by a factor and whose levels are dithered.

    The factors depend on all tokens, so this is a pass of its own after `assign_and_subtract`.

    Args:
        r_RTD: residuals, finite.
        factor_RD: the factor of every channel, in float32; with it no value may be beyond 448.
        form: what is computed.
        implementation, parts, tuning: as for `assign_and_pack`.

    Returns:
        Codes in uint8; and in float32, in units of the multiplied channels, least-squares scale, matching
        scale, and the middle, rounded to e4m3, if there is one (`reference.dithered`).

    Raises:
        NotImplementedError, ValueError: as `assign_and_pack`.
    """
    check(r_RTD, factor_RD[:, None], implementation)
    if implementation == "xla":
        return reference.dithered(r_RTD, factor_RD, form)
    _check_form(form, r_RTD.shape[2], implementation)
    if implementation == "triton":
        from pallas_kernels.quantize_pack import triton

        return triton.pack_dithered(r_RTD, factor_RD, form)
    from pallas_kernels.quantize_pack import mosaic_gpu

    rows, tokens, _ = r_RTD.shape
    codes_RTC, scales_RNT = mosaic_gpu.pack_dithered(
        whole_eights(r_RTD),
        factor_RD,
        form,
        tokens=tokens,
        parts=parts_for(rows, tokens, parts),
        tuning=Tuning() if tuning is None else tuning,
    )
    return codes_RTC[:, :tokens], scales_RNT[:, :, :tokens]


def _check_form(form: Integers | Midrise | Dithered, head_dim: int, implementation: str) -> None:
    if (why := supported(form, head_dim)) is not None:
        raise NotImplementedError(f"implementation={implementation!r}: {why}; 'xla' serves it")


def _encoded_by_triton(x_RTD, c_RKD, form, metric):
    from pallas_kernels.kmeans.triton import assign
    from pallas_kernels.quantize_pack import triton

    ids_RT, _ = assign(x_RTD, *padded_centroids(c_RKD, metric), jnp.uint8)
    return ids_RT, *triton.encode(x_RTD, c_RKD.astype(jnp.bfloat16), ids_RT, form)


def _encoded(x_RTD, c_RKD, form, metric, parts, tuning):
    from pallas_kernels.quantize_pack import mosaic_gpu

    rows, tokens, _ = x_RTD.shape
    table_RKD, bias_RK = padded_centroids(c_RKD, metric)
    picked_RKD = None if metric is None else padded_centroids(c_RKD)[0]
    ids_RT, main_RT, *scales = mosaic_gpu.encode(
        whole_eights(x_RTD),
        table_RKD,
        bias_RK,
        form,
        picked_RKD,
        tokens=tokens,
        parts=parts_for(rows, tokens, parts),
        tuning=Tuning() if tuning is None else tuning,
    )
    return ids_RT[:, :tokens], main_RT[:, :tokens], *scales
