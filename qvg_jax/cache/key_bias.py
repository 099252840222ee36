"""What compressed keys take from, or leave to, the exact ones, and how attention gives it back.

A logit s q.k of a key k that was stored as k_hat is off by noise, and softmax takes its exponential,
which is convex: right on average is not right on average any more. Which way it is off depends on
what the codec does with its error. Per channel let v be the variance of what is quantized and v_hat
that of its reconstruction. For normal channels, averaged over them,
    E exp(s q.k) = exp(s^2 |q|^2 v / 2),   E exp(s q.k_hat) = exp(s^2 |q|^2 v_hat / 2),
so a compressed key gets exp(-s^2 |q|^2 (v - v_hat) / 2) times its weight, and adding
    b = s^2 |q|^2 (v - v_hat) / 2
to its logit undoes that on average. With E the share of energy that least squares loses, 1 - E = rho:

1. Noise that knows nothing of the key, k_hat = k + e: v_hat - v is the error's variance, step^2 / 12
   for rounding to a fine uniform grid (Sheppard's correction). b is negative: compressed keys steal
   attention. This is the case, and with a second-order Taylor expansion in place of the exponential the correction, of
   Tuncer, Becker & Pfeil, "Quantized Keys Steal Attention: Bias Correction for KV-Cache Compression in
   Video Diffusion" (arXiv 2605.26266). Here: `residual_quantize`, so QVG and RTN, whose three levels at two bits are no
   fine grid: for normal values in groups of 64 the model says about twice what is true.
2. Conditional means and least squares, E[k | k_hat] = k_hat: the error is orthogonal to what is stored,
   v - v_hat = E v. By Jensen E[exp(s q.k) | k_hat] > exp(s q.k_hat): compressed keys *lose*
   attention, and b is positive. Here: gain "lsq", as in the keys of `midrise`; centroids alone.
3. Gain p in between, x_hat = rho^-p x_lsq: v_hat = rho^(1 - 2p) v. Gain 1 ("match") has the sign of 1,
   with v (1 / rho - 1); gain 1/2 keeps the energy, v_hat = v: nothing to correct, as the keys of
   `midrise-k1v3`.

The quantity v - v_hat, one number per token, is what a codec's `deficit(packed)` computes from the
scales it stores anyway. It is a model: channels are not normal, queries do not point everywhere
alike, and channels of `klt` without any bits have a variance that nothing stored tells, so theirs is
left out.

A constant `offset` is no correction of anything: it moves attention between the compressed region,
whose values are noisy too, and the exact one. What both do in the loop is in BENCHMARKS.md.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from qvg_jax.codecs.base import Codec, Packed

__all__ = ["KeyBias", "LogitBias", "logit_bias"]


@dataclasses.dataclass(frozen=True)
class KeyBias:
    """What attention adds to the logits of compressed keys: factor * b + offset.

    Attributes:
        factor: of the derived correction b, see the module; 1 is what the derivation says.
        offset: a constant; negative moves attention to the uncompressed tokens.

    Raises:
        ValueError: a number that is not finite.
    """

    factor: float = 0.0
    offset: float = 0.0

    def __post_init__(self):
        for name in ("factor", "offset"):
            value = getattr(self, name)
            known = isinstance(value, int | float) and not isinstance(value, bool)
            if not known or not math.isfinite(value):
                raise ValueError(f"key_bias {name}={value!r} is not accepted: give a finite number")

    def check(self, codec: Codec) -> None:
        """Raises ValueError if the factor asks for a variance that the codec does not tell."""
        if self.factor and codec.deficit is None:
            raise ValueError(
                f"key_bias factor={self.factor}: key codec {codec.name} does not tell the variance "
                "that it loses; accepted: factor=0, with any offset"
            )


class LogitBias(NamedTuple):
    """The bias of one span: half_BHQ * deficit_BHT + offset, the product only if there is one."""

    half_BHQ: Array | None  # factor s^2 |q|^2 / 2
    deficit_BHT: Array | None  # v - v_hat
    offset: float

    def added(self, s_BHQT: Float[Array, "B H Q T"], first: Array | int = 0) -> Array:
        """Logits of the span's keys `first` to `first` + T, with their bias."""
        if self.deficit_BHT is not None:
            t = s_BHQT.shape[3]
            token_T = first + jnp.arange(t, dtype=jnp.int32)
            deficit_BHT = jnp.take(self.deficit_BHT, token_T, axis=2, mode="clip")
            s_BHQT += self.half_BHQ[..., None] * deficit_BHT[:, :, None]
        return s_BHQT + self.offset


def logit_bias(
    bias: KeyBias | None,
    codec: Codec,
    read_packed: Callable[[], Packed],
    q_BHQD: Float[Array, "B H Q D"],
    scale: Float[Array, ""],
) -> LogitBias | None:
    """The bias for the keys of one span; None where nothing is added.

    Args:
        bias: of the cache.
        codec: of the keys.
        read_packed: reads the span; called only if its deficit is needed.
        q_BHQD: queries; rotated or not, as a rotation keeps their norms.
        scale: s, the factor of the logits.
    """
    if bias is None or bias == KeyBias():
        return None
    if not bias.factor:
        return LogitBias(None, None, bias.offset)
    square_BHQ = jnp.sum(jnp.square(q_BHQD.astype(jnp.float32)), axis=3)
    half_BHQ = 0.5 * bias.factor * scale * scale * square_BHQ
    return LogitBias(half_BHQ, codec.deficit(read_packed()), bias.offset)
