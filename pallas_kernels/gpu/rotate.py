"""RoPE in registers: a thread rotates the sixteen channels that it holds of a token.

The channels are 8 i .. 8 i + 7 and D / 2 + 8 i .. of lane i (`gpu.channels`), so that both channels of
every pair are in one thread, whether pairs are halves of a head apart or beside each other.

Source: Su et al., RoFormer (arXiv 2104.09864), section 3.2.
"""

from pallas_kernels.gpu.channels import past
from pallas_kernels.gpu.lanes import Halves, Lane, halves, load

__all__ = ["CosSin", "HalfCosSin", "cos_sin_halves", "load_cos_sin", "rotate", "rotate_halves"]

CosSin = list[list[Lane]]  # cosines and sines of a thread's eight pairs
HalfCosSin = tuple[list[Halves], ...]  # the same as `rotate_halves` reads them


def load_cos_sin(
    starts: list[Lane], token: Lane, lane: Lane, pairing: str | None, d: int
) -> CosSin:
    """Cosines and sines of a thread's channels in a token.

    Args:
        starts: addresses of the cosines and of the sines of the first token; empty without rotation,
            and then the result is empty.
        token, lane: the token, and the number of the thread among those that share it.
        pairing: "half" or "interleaved", as in `Rotation`.
        d: head dim.
    """
    cos_sin = []
    for start in starts:
        start = start + (token * (2 * d)).wide()
        if pairing == "half":
            start = start + (lane * 32).wide()
            words = load(start, 16) + load(past(start, 16), 16)
        else:
            start = start + (lane * 16).wide()
            words = load(start, 16) + load(past(start, d), 16)
        cos_sin.append([w.as_float() for w in words])
    return cos_sin


def rotate(x: list[Lane], cos_sin: CosSin, pairing: str | None) -> list[Lane]:
    """The sixteen channels of a thread, rotated."""
    (cos, sin), out = cos_sin, [None] * 16
    for j in range(8):
        first, second = (j, 8 + j) if pairing == "half" else (2 * j, 2 * j + 1)
        a, b, c, s = x[first], x[second], cos[j], sin[j]
        out[first] = a.fma(c, b * (s * -1.0))
        out[second] = a.fma(s, b * c)
    return out


def cos_sin_halves(cos_sin: CosSin, pairing: str | None) -> HalfCosSin:
    """Cosines and sines for `rotate_halves`; made once for all heads that share them."""
    cos, sin = cos_sin
    if pairing == "half":
        pairs = lambda t: [halves(a, b) for a, b in zip(t[0::2], t[1::2], strict=True)]  # noqa: E731
        s = pairs(sin)
        return pairs(cos), s, [h.minus() for h in s]
    return [halves(c, c) for c in cos], [halves(s * -1.0, s) for s in sin]


def rotate_halves(x: list[Halves], cos_sin: HalfCosSin, pairing: str | None) -> list[Halves]:
    """The sixteen channels of a thread as eight pairs of float16, rotated."""
    if pairing == "half":
        low, high = x[:4], x[4:]
        four = tuple(zip(low, high, *cos_sin, strict=True))
        return [a.fma(c, b * m) for a, b, c, s, m in four] + [
            a.fma(s, b * c) for a, b, c, s, m in four
        ]
    return [a.fma(c, a.swapped() * s) for a, c, s in zip(x, *cos_sin, strict=True)]
