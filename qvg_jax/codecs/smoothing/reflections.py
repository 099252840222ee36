"""Orthogonal matrices as a few coarsely stored reflections: exactly orthogonal, half the bytes.

Axes: B batch, H heads, D head dim, R reflections.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from qvg_jax.codecs.quantize.bitstream import pack_bits, packed_bits_width, unpack_bits

__all__ = ["Reflections", "reflections_nbytes", "reflections_of", "rotation_of"]

_HIGHEST = lax.Precision.HIGHEST


class Reflections(NamedTuple):
    """R Householder vectors v_i = e_i + step_i * code_i, the codes only below the diagonal."""

    codes_BHC: UInt8[Array, "B H C"]
    step_BHR: Float[Array, "B H R"]


def _below(d: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and columns of the entries below the diagonal of a (D, R) matrix, column by column."""
    column, row = np.nonzero(np.tril(np.ones((d, r), bool), -1).T)
    return row, column


def reflections_nbytes(d: int, r: int, bits: int) -> int:
    """Returns the bytes of the reflections of one matrix: R (D - (R + 1) / 2) codes and R steps."""
    return packed_bits_width(len(_below(d, r)[0]), bits) + 2 * r


def reflections_of(a_BHDR: Float[Array, "B H D R"], bits: int) -> Reflections:
    """Returns reflections whose product's first R columns are, up to sign, the given orthonormal ones.

    Householder's QR: reflection i turns what earlier ones made of column i into +-e_i. Each vector
    is rounded before it is applied, so that later ones work on what decoding will see. Scaling a
    vector does not change its reflection; entry i is set to 1 and not stored.

    Args:
        a_BHDR: orthonormal columns, R < D.
        bits: bits of a stored entry, 2 to 8.

    Returns:
        The stored form: symmetric integers with a bfloat16 step per reflection.
    """
    d, r = a_BHDR.shape[2:]
    top = 2 ** (bits - 1) - 1
    row_D = jnp.arange(d, dtype=jnp.int32)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m_BHDR, codes_BHRD, step_BHR = carry
        column_BHD = lax.dynamic_index_in_dim(m_BHDR, i, axis=3, keepdims=False)
        column_BHD = jnp.where((row_D >= i)[None, None], column_BHD, 0)
        head_BH1 = lax.dynamic_index_in_dim(column_BHD, i, axis=2)
        norm_BH1 = jnp.sqrt(jnp.sum(column_BHD * column_BHD, axis=2, keepdims=True))
        head_BH1 += jnp.where(head_BH1 < 0, -norm_BH1, norm_BH1)
        below_BHD = jnp.where((row_D > i)[None, None], column_BHD, 0)
        below_BHD /= jnp.where(head_BH1 == 0, 1, head_BH1)
        step_BH1 = (jnp.max(jnp.abs(below_BHD), axis=2, keepdims=True) / top).astype(jnp.bfloat16)
        unit_BH1 = step_BH1.astype(jnp.float32)
        codes_BHD = jnp.round(below_BHD / jnp.where(unit_BH1 > 0, unit_BH1, 1))
        codes_BHD = jnp.clip(codes_BHD, -top, top)
        v_BHD = codes_BHD * unit_BH1 + (row_D == i).astype(jnp.float32)[None, None]
        along_BHR = jnp.einsum("bhd,bhdr->bhr", v_BHD, m_BHDR, precision=_HIGHEST)
        along_BHR *= 2 / jnp.sum(v_BHD * v_BHD, axis=2, keepdims=True)
        m_BHDR -= v_BHD[..., None] * along_BHR[:, :, None]
        codes_BHRD = lax.dynamic_update_index_in_dim(codes_BHRD, codes_BHD, i, axis=2)
        step_BHR = lax.dynamic_update_index_in_dim(step_BHR, step_BH1[..., 0], i, axis=2)
        return m_BHDR, codes_BHRD, step_BHR

    zeros_BHRD = jnp.zeros_like(jnp.swapaxes(a_BHDR, 2, 3), jnp.float32)
    carry = (a_BHDR.astype(jnp.float32), zeros_BHRD, zeros_BHRD[..., 0].astype(jnp.bfloat16))
    _, codes_BHRD, step_BHR = lax.fori_loop(0, r, step, carry)
    row, column = _below(d, r)
    flat_BHC = codes_BHRD.reshape(*codes_BHRD.shape[:2], r * d)[:, :, column * d + row]
    return Reflections(pack_bits((flat_BHC + top).astype(jnp.uint8), bits), step_BHR)


def rotation_of(stored: Reflections, d: int, bits: int) -> Float[Array, "B H D D"]:
    """Returns the product of the reflections, H_1 H_2 ... H_R with H_i = I - 2 v_i v_i^T / |v_i|^2.

    In compact form I - V T V^T with T^-1 = strictly upper part of V^T V plus half its diagonal
    (Schreiber & Van Loan's WY form; Puglisi 1992). About R D (R + D) multiply-adds per matrix.

    Args:
        stored: from `reflections_of`.
        d: head dim.
        bits: as given there.

    Returns:
        Orthogonal matrices, float32.
    """
    r = stored.step_BHR.shape[2]
    row, column = _below(d, r)
    codes_BHC = unpack_bits(stored.codes_BHC, bits, len(row)).astype(jnp.float32)
    codes_BHC -= 2 ** (bits - 1) - 1
    place = np.full((d, r), len(row))
    place[row, column] = np.arange(len(row))
    codes_BHC = jnp.pad(codes_BHC, ((0, 0), (0, 0), (0, 1)))  # the last one: everything not stored
    v_BHDR = codes_BHC[:, :, place] * stored.step_BHR.astype(jnp.float32)[:, :, None]
    v_BHDR += jnp.eye(d, r, dtype=jnp.float32)[None, None]
    gram_BHRR = jnp.einsum("bhdr,bhds->bhrs", v_BHDR, v_BHDR, precision=_HIGHEST)
    keep_RR = jnp.asarray(np.triu(np.ones((r, r)), 1) + np.eye(r) / 2, jnp.float32)
    inverse_BHRR = gram_BHRR * keep_RR[None, None]
    t_BHRR = _inverse_of_upper(inverse_BHRR)
    tv_BHRD = jnp.einsum("bhrs,bhds->bhrd", t_BHRR, v_BHDR, precision=_HIGHEST)
    vtv_BHDD = jnp.einsum("bhdr,bhre->bhde", v_BHDR, tv_BHRD, precision=_HIGHEST)
    return jnp.eye(d, dtype=jnp.float32)[None, None] - vtv_BHDD


def _inverse_of_upper(a_BHRR: Float[Array, "B H R R"]) -> Float[Array, "B H R R"]:
    """Returns the inverse of upper triangular matrices, blocks of 1, 2, 4, ... at a time.

    ((A, B), (0, C)) has the inverse ((A', -A' B C'), (0, C')). With the inverses of all diagonal blocks
    in one matrix, every doubling is two products. XLA's triangular solver takes its rows one by one:
    on two CPU cores 20 ms for three matrices of R = 32, at every read of a span, and this 0.1.
    """
    r = a_BHRR.shape[3]
    row_RR, column_RR = np.indices((r, r))
    diagonal = jnp.asarray(row_RR == column_RR)[None, None]
    inverse = jnp.where(diagonal, 1 / jnp.where(diagonal, a_BHRR, 1), 0)
    size = 1
    while size < r:
        pair = row_RR // (2 * size) == column_RR // (2 * size)
        corner = pair & (row_RR // size % 2 == 0) & (column_RR // size % 2 == 1)
        b_BHRR = jnp.where(jnp.asarray(corner)[None, None], a_BHRR, 0)
        b_BHRR = jnp.matmul(inverse, b_BHRR, precision=_HIGHEST)
        inverse -= jnp.matmul(b_BHRR, inverse, precision=_HIGHEST)
        size *= 2
    return inverse
