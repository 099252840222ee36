"""The codec against vectors of the official QVG kernels (bf16 input, run on an H100).

Sizes, bits, groups and iterations come from the files. Tolerances are those of the folder's
README: the original divides approximately and measures distances in bf16, so equality is counted,
and k-means is held to its objective.
"""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qvg_jax.codecs.compose import chain
from qvg_jax.codecs.quantize import IntegerPacked, residual_quantize, unpack
from qvg_jax.codecs.smoothing import KMeansPacked, KMeansState, kmeans_smoothing
from qvg_jax.codecs.smoothing import lloyd as lloyd_module
from qvg_jax.codecs.smoothing.lloyd import assign, lloyd, rows

SUBJECT = "qvg"
run_assign = jax.jit(assign)

SCALES = {"e4m3": ml_dtypes.float8_e4m3fn, "bf16": ml_dtypes.bfloat16}
MODES = {"sym": "symmetric", "asym": "asymmetric"}


def bf16(bits):
    return bits.view(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def kernels(folder):
    """The arrays, with config.json's sizes checked against them."""
    arrays, c = folder.arrays("official_kernels"), folder.config
    b, h, k, d = c["batch"], c["heads"], c["num_centroids"], c["head_dim"]
    assert arrays["x_bf16"].shape == (b, h, c["tokens"], d)
    assert arrays["init_bf16"].shape == (b * h, k, d)
    return arrays


def cases(arrays, pattern):
    """Matches of `pattern` among the array names; at least one."""
    found = [m for m in (re.fullmatch(pattern, name) for name in arrays) if m]
    assert found, f"no array is called like {pattern}"
    return found


def per_head(array, shape):
    """[B*H, ...] to [B, H, ...]."""
    return array.reshape(*shape[:2], *array.shape[1:])


def rel_l2(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def steps(stored):
    """Scale bits as integers in which neighbouring numbers of one sign differ by one."""
    bits = np.asarray(stored).view(f"u{stored.dtype.itemsize}").astype(np.int64)
    return np.where(bits >> (8 * stored.dtype.itemsize - 1), -(bits & (bits.max() >> 1)), bits)


def reconstruct(codes, offset, scales, zeros):
    """(code - offset) * scale + zero, in numpy."""
    scales = np.asarray(scales, np.float32)[..., None]
    x = (np.asarray(codes, np.float32).reshape(*scales.shape[:-1], -1) - offset) * scales
    x = x if zeros is None else x + np.asarray(zeros, np.float32)[..., None]
    return x.reshape(codes.shape)


def check_codes_and_scales(what, bits, ours, codes, scales, zeros=None):
    """README: how close a float32 evaluation comes to the kernels."""
    assert ours.codes_BHTC.shape == codes.shape and ours.codes_BHTC.dtype == codes.dtype, what
    ours_scales = np.asarray(ours.scales_BHTG)
    groups = (*scales.shape, -1)
    mine, theirs = (
        np.asarray(unpack(jnp.asarray(c), bits)).astype(int).reshape(groups)
        for c in (ours.codes_BHTC, codes)
    )
    # A scale of zero divides 0 by 0 in the original; here it means zero.
    defined = scales.astype(np.float32) != 0
    if zeros is None:
        assert (mine[~defined] == 2 ** (bits - 1) - 1).all(), what
    # A scale one e4m3 step off moves codes by more than one; with equal scales one is the limit.
    same_scale = defined & (ours_scales == scales)
    assert np.abs(mine[same_scale] - theirs[same_scale]).max() <= 1, what
    mine, theirs = mine[defined], theirs[defined]
    in_bytes = (mine == theirs).reshape(-1, 8 // bits).all(-1)
    assert np.abs(steps(ours_scales) - steps(scales)).max() <= 1, what
    if bits == 2:
        assert (mine == theirs).mean() >= 0.999, (what, (mine == theirs).mean())
        assert (ours_scales == scales).mean() >= 0.999, (what, (ours_scales == scales).mean())
    else:
        assert in_bytes.mean() >= 0.985, (what, in_bytes.mean())
        assert (ours_scales == scales).mean() >= 0.97, (what, (ours_scales == scales).mean())
    if zeros is not None:
        np.testing.assert_array_equal(np.asarray(ours.zeros_BHTG), zeros, err_msg=what)


def test_quantize_and_pack(kernels):
    r_BHTD = jnp.asarray(bf16(kernels["r_bf16"]))
    for match in cases(kernels, r"(qp_b(\d+)_g(\d+)_(sym|asym)_(e4m3|bf16))_codes"):
        name, bits, group, mode, scale_dtype = match.groups()
        bits, group = int(bits), int(group)
        codec = residual_quantize(bits, group, MODES[mode], scale_dtype)
        packed, _ = jax.jit(codec.encode)(r_BHTD, codec.init(r_BHTD.shape))
        stored = SCALES[scale_dtype]
        codes, scales = kernels[f"{name}_codes"], kernels[f"{name}_scales"].view(stored)
        zeros = kernels[f"{name}_zeros"].view(stored) if mode == "asym" else None
        assert packed.scales_BHTG.dtype == stored and packed.exponents_BH is None, name
        check_codes_and_scales(name, bits, packed, codes, scales, zeros)
        # Relative reconstruction error equal to 0.3 %.
        offset = 2 ** (bits - 1) - 1 if mode == "sym" else 0
        ours, theirs = (
            rel_l2(reconstruct(unpack(jnp.asarray(c), bits), offset, *metadata), r_BHTD)
            for c, *metadata in (packed[:3], (codes, scales, zeros))
        )
        assert abs(ours / theirs - 1) <= 0.003, (name, ours, theirs)


def test_kmeans_objective(kernels):
    """The objective after the same iterations from the same start: at most 1.005 of theirs."""
    x_BHTD = jnp.asarray(bf16(kernels["x_bf16"]))
    x = np.asarray(x_BHTD, np.float64)
    start_BHKD = jnp.asarray(per_head(bf16(kernels["init_bf16"]), x.shape))
    for match in cases(kernels, r"km(\d+)_ids"):
        name = f"km{match[1]}"
        ran = int(kernels[f"{name}_n"])
        assert 1 <= ran <= int(match[1])
        if ran == 1:  # made from the start we have: about 95 % of bf16 assignments agree
            agree = np.asarray(run_assign(x_BHTD, start_BHKD)[0]) == per_head(
                kernels[match[0]], x.shape
            )
            assert agree.mean() >= 0.9, (name, agree.mean())
        ids = per_head(kernels[f"{name}_ids"], x.shape).astype(np.int64)
        cent = per_head(kernels[f"{name}_cent"], x.shape).astype(np.float64)
        theirs = ((x - np.take_along_axis(cent, ids[..., None], axis=2)) ** 2).sum()

        # What the codec does with them: round, assign once more, subtract what is stored.
        state = KMeansState(start_BHKD[:, :, None], jnp.ones((), bool))
        smoothing = kmeans_smoothing(start_BHKD.shape[2], ran)
        node, residual, _ = jax.jit(smoothing.encode)(x_BHTD, state)
        ours = (np.asarray(residual, np.float64) ** 2).sum()
        assert ours <= 1.005 * theirs, (name, ours / theirs)
        # A run that stopped early had converged: going on must not make it worse.
        full = jax.jit(lloyd)(x_BHTD, start_BHKD, int(match[1]))
        _, distance_BHT = run_assign(x_BHTD, full)
        assert float(distance_BHT.sum()) <= 1.005 * theirs, name


def test_kmeans_update(kernels):
    """Sizes and centroids follow from the assignments they were made with."""
    x_BHTD = jnp.asarray(bf16(kernels["x_bf16"]))
    start = per_head(bf16(kernels["init_bf16"]), x_BHTD.shape)
    for match in cases(kernels, r"(km\d+)_ids"):
        ids_BHT = per_head(kernels[f"{match[1]}_ids"], x_BHTD.shape).astype(np.int32)
        sizes = per_head(kernels[f"{match[1]}_sizes"], x_BHTD.shape)
        cent = per_head(kernels[f"{match[1]}_cent"], x_BHTD.shape)
        for sums in (lloyd_module._sums_scatter, lloyd_module._sums_onehot):
            total, count = jax.jit(sums, static_argnums=2)(
                x_BHTD, jnp.asarray(ids_BHT), sizes.shape[-1]
            )
            np.testing.assert_array_equal(count, sizes)
            mean = np.asarray(total) / np.maximum(sizes, 1)[..., None]
            full = sizes > 0
            # bf16 centroids: 2^-8 relative
            np.testing.assert_allclose(mean[full], cent[full], rtol=2.0**-8, atol=2.0**-8)
        if int(kernels[f"{match[1]}_n"]) == 1:  # an empty cluster keeps its first centroid
            np.testing.assert_array_equal(cent[~full], start[~full].astype(np.float32))


def five(kernels, shape):
    """The official 5-iteration run as packed k-means: what `resid` and `e2e_*` were made with."""
    ids_BHT = per_head(kernels["km5_ids"], shape)
    cent_BHKD = per_head(kernels["km5_cent"], shape).astype(ml_dtypes.bfloat16)
    assert (cent_BHKD.astype(np.float32) == per_head(kernels["km5_cent"], shape)).all()
    return KMeansPacked(jnp.asarray(ids_BHT)[:, :, None], jnp.asarray(cent_BHKD)[:, :, None])


def test_residual(kernels):
    x_BHTD = jnp.asarray(bf16(kernels["x_bf16"]))
    node = five(kernels, x_BHTD.shape)
    picked = rows(node.centroids_BHSKD[:, :, 0], node.ids_BHST[:, :, 0]).astype(jnp.float32)
    ours = x_BHTD.astype(jnp.float32) - picked
    # The original rounds the residual to bf16; ours stays float32.
    np.testing.assert_array_equal(ours.astype(jnp.bfloat16).astype(jnp.float32), kernels["resid"])


def test_end_to_end(kernels):
    x_BHTD = jnp.asarray(bf16(kernels["x_bf16"]))
    node = five(kernels, x_BHTD.shape)
    start_BHSKD = jnp.asarray(per_head(bf16(kernels["init_bf16"]), x_BHTD.shape))[:, :, None]
    for match in cases(kernels, r"(e2e_b(\d+)_g(\d+))_codes"):
        name, bits, group = match[1], int(match[2]), int(match[3])
        codes = kernels[f"{name}_codes"]
        scales = kernels[f"{name}_scales"].view(SCALES["e4m3"])
        recon = bf16(kernels[f"{name}_recon_bf16"])
        quantizer = residual_quantize(bits, group)
        smoothing = kmeans_smoothing(start_BHSKD.shape[3], int(kernels["km5_n"]))
        codec = chain(smoothing, quantizer)

        # Decoding their bytes gives their tensor: float32 sum, one rounding to bf16 (measured:
        # equal in every bit; a fused multiply-add elsewhere may move a rounding tie).
        theirs = (node, IntegerPacked(jnp.asarray(codes), jnp.asarray(scales), None))
        decoded = np.asarray(codec.decode(theirs, jnp.bfloat16))
        assert (decoded == recon).mean() >= 0.999, name
        assert np.abs(steps(decoded) - steps(recon)).max() <= 1, name

        # Quantizing their residual gives their bytes.
        resid = jnp.asarray(kernels["resid"])
        packed, _ = jax.jit(quantizer.encode)(resid, quantizer.init(resid.shape))
        check_codes_and_scales(name, bits, packed, codes, scales)

        # The whole way from the same start is at least as good.
        state = (KMeansState(start_BHSKD, jnp.ones((), bool)), codec.init(x_BHTD.shape)[1])
        packed, _ = jax.jit(codec.encode)(x_BHTD, state)
        error, reference = rel_l2(codec.decode(packed), x_BHTD), rel_l2(recon, x_BHTD)
        assert error <= 1.003 * reference, (name, error, reference)


@pytest.mark.parametrize("preset", ["qvg", "rtn"])
def test_codes_are_as_small_as_the_kernels(kernels, preset):
    """Bytes per token of our formats and of the official arrays."""
    shape = kernels["x_bf16"].shape
    if preset == "qvg":
        for match in cases(kernels, r"(e2e_b(\d+)_g(\d+))_codes"):
            codec = residual_quantize(int(match[2]), int(match[3]))
            theirs = kernels[match[0]].nbytes + kernels[f"{match[1]}_scales"].nbytes
            assert codec.nbytes(shape) == theirs, match[0]
    else:
        for match in cases(kernels, r"(qp_b(\d+)_g(\d+)_(sym|asym)_(e4m3|bf16))_codes"):
            codec = residual_quantize(int(match[2]), int(match[3]), MODES[match[4]], match[5])
            theirs = kernels[match[0]].nbytes + kernels[f"{match[1]}_scales"].nbytes
            theirs += kernels[f"{match[1]}_zeros"].nbytes if match[4] == "asym" else 0
            assert codec.nbytes(shape) == theirs, match[0]
