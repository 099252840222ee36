"""Assignment of tokens to centroids and quantization of their residuals, in one pass.

Axes: R rows (batch and heads), T tokens, D head dim, K centroids, G groups, C code bytes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.kmeans.api import check, padded_centroids, parts_for, whole_eights
from pallas_kernels.kmeans.types import HEAD_DIM, Tuning
from pallas_kernels.quantize_pack import reference
from pallas_kernels.quantize_pack.types import Integers, Midrise

__all__ = ["assign_and_pack", "assign_and_subtract", "supported"]


def supported(form: Integers | Midrise, head_dim: int = HEAD_DIM) -> str | None:
    """The reason why the kernels cannot write this format, or None if they can."""
    accepted = (2, 4) if isinstance(form, Integers) else (1, 2, 4)
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
    implementation: str = "mosaic",
    parts: int | None = None,
    tuning: Tuning | None = None,
) -> tuple[UInt8[Array, "R T"], UInt8[Array, "R T C"], Array]:
    """Subtracts from every token its nearest centroid, in bfloat16, and packs the residual.

    Args:
        x_RTD: tokens, finite.
        c_RKD: centroids, finite; at most 256.
        form: `Integers` or `Midrise`, which say what is computed.
        implementation: "mosaic" (Hopper; bfloat16, D = 128), "triton" (Ampere and later; D 64, 128
            or 256) or "xla".
        parts: for "mosaic", CTAs per row; None chooses.
        tuning: sizes for "mosaic"; None takes the measured ones.

    Returns:
        ids, codes, and the bytes of e4m3 scales (R, T, G) for integers; or for mid-rise grids
        float32 (R, 3, T): least-squares scale, matching scale <r, r> / <r, l>, largest entry.

    Raises:
        NotImplementedError: the kernel cannot do this; the message says why.
        ValueError: shapes that do not belong together, too many parts, or an unknown
            implementation.
    """
    check(x_RTD, c_RKD, implementation)
    integers = isinstance(form, Integers)
    if implementation == "xla":
        ids_RT, r_RTD = reference.residual(x_RTD, c_RKD.astype(jnp.bfloat16))
        return ids_RT, *(reference.integers if integers else reference.midrise)(r_RTD, form)
    if (why := supported(form, x_RTD.shape[2])) is not None:
        raise NotImplementedError(f"implementation={implementation!r}: {why}; 'xla' serves it")
    if implementation == "triton":
        return _encoded_by_triton(x_RTD, c_RKD, form)
    ids_RT, codes_RTC, scales = _encoded(x_RTD, c_RKD, form, parts, tuning)
    scales = scales[:, :, : x_RTD.shape[1]]
    return ids_RT, codes_RTC, jnp.swapaxes(scales, 1, 2) if integers else scales


def assign_and_subtract(
    x_RTD: Float[Array, "R T D"],
    c_RKD: Float[Array, "R K D"],
    *,
    implementation: str = "mosaic",
    parts: int | None = None,
    tuning: Tuning | None = None,
) -> tuple[UInt8[Array, "R T"], Float[Array, "R T D"]]:
    """ids of the nearest centroids and the residual in bfloat16.

    Arguments and errors are those of `assign_and_pack`.
    """
    check(x_RTD, c_RKD, implementation)
    if implementation == "xla":
        ids_RT, r_RTD = reference.residual(x_RTD, c_RKD.astype(jnp.bfloat16))
        return ids_RT, r_RTD.astype(jnp.bfloat16)
    if implementation == "triton":
        return _encoded_by_triton(x_RTD, c_RKD, None)
    return _encoded(x_RTD, c_RKD, None, parts, tuning)


def _encoded_by_triton(x_RTD, c_RKD, form):
    from pallas_kernels.kmeans.triton import assign
    from pallas_kernels.quantize_pack import triton

    c_RKD, bias_RK = padded_centroids(c_RKD)
    ids_RT, _ = assign(x_RTD, c_RKD, bias_RK, jnp.uint8)
    return ids_RT, *triton.encode(x_RTD, c_RKD, ids_RT, form)


def _encoded(x_RTD, c_RKD, form, parts, tuning):
    from pallas_kernels.quantize_pack import mosaic_gpu

    (rows, tokens, _), (c_RKD, bias_RK) = x_RTD.shape, padded_centroids(c_RKD)
    parts = parts_for(rows, tokens, parts)
    tuning = Tuning() if tuning is None else tuning
    ids_RT, main_RT, *scales = mosaic_gpu.encode(
        whole_eights(x_RTD), c_RKD, bias_RK, form, tokens=tokens, parts=parts, tuning=tuning
    )
    return ids_RT[:, :tokens], main_RT[:, :tokens], *scales
