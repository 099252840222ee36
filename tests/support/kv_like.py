"""Tokens that look like the keys and values of a video model.

Axes: F latent frames, Y rows, X columns, T = F Y X tokens in that order, D head dim.
"""

import numpy as np
from jaxtyping import Float

__all__ = ["kv_like"]

_KINDS = ("key", "value")
_NOISE = {"key": 0.6, "value": 0.38}
_LEADING = {"key": (0.6, 0.66), "value": (0.46, 0.5)}  # before noise: of four directions
_FREQUENCY = {"key": 0.9, "value": 1.1}  # of the features: lower ones make fewer directions matter
_LATENTS = 3  # what a token depends on beside noise: content of low dimension, spread over channels
_FEATURES = 48  # random Fourier features of the content


def kv_like(
    kind: str = "value",
    seed: int = 0,
    *,
    frames: int = 20,
    height: int = 16,
    width: int = 16,
    head_dim: int = 128,
    noise: float | None = None,
) -> Float[np.ndarray, "T D"]:
    """One head's keys (before RoPE) or values of a made-up clip.

    x_t = A cos(W g_t + b) + noise, with g_t a random field that is smooth over frames, rows and
    columns, and decaying weights A. Keys add a constant to a few channels; values are scaled by a
    second smooth field. Constants are set so that over seeds, for 5,120 tokens:
      - the 4 leading principal directions hold 42 to 56 % of the energy around the mean,
      - 256 clusters leave 8 to 17 % of the energy,
      - keys have 3 channels with an RMS 5 to 13 times the median channel's; values have none, and
        token norms that differ by 3 to 6 times between the 5th and the 95th percentile,
      - tokens at the same place in successive frames are alike (cosine 0.65 to 0.9 around the mean).
    These are statistics that have been published of large video models; nothing else about the
    numbers is meant to be real.

    Args:
        kind: "key" or "value".
        seed: a different head and clip for every seed.
        frames, height, width: F, Y, X.
        head_dim: D, at least 8.
        noise: RMS of the independent part, in units of the smooth part's; None is what gives the
            statistics above.

    Returns:
        float32 tokens.

    Raises:
        ValueError: an unknown kind or a size below 1 (head dim below 8).

    Source of the statistics: arXiv 2602.02958, figures on the distribution of K and V.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is not accepted: give 'key' or 'value'")
    if min(frames, height, width) < 1 or head_dim < 8:
        sizes = dict(frames=frames, height=height, width=width, head_dim=head_dim)
        raise ValueError(f"{sizes} is not accepted: give sizes of 1 or more, head_dim 8 or more")
    rng = np.random.default_rng([seed, _KINDS.index(kind)])
    grid = (frames, height, width)
    g_TL = np.stack([_smooth(rng, grid) for _ in range(_LATENTS)], axis=-1)
    w_LJ = rng.normal(0, _FREQUENCY[kind], (_LATENTS, _FEATURES))
    features_TJ = np.cos(g_TL @ w_LJ + rng.uniform(0, 2 * np.pi, _FEATURES))
    a_JD = rng.normal(0, 1, (_FEATURES, head_dim))
    x_TD = _with_leading_share(features_TJ @ a_JD, rng.uniform(*_LEADING[kind]))
    x_TD /= np.sqrt(np.mean(x_TD**2))
    noise = _NOISE[kind] if noise is None else noise
    x_TD += noise * rng.normal(0, 1, x_TD.shape)
    if kind == "key":
        loud = rng.choice(head_dim, 3, replace=False)
        x_TD[:, loud] += rng.choice([-1, 1], 3) * rng.uniform(6, 12, 3)
    else:
        x_TD *= np.exp(0.42 * _smooth(rng, grid))[:, None]
    return x_TD.astype(np.float32)


def _with_leading_share(x_TD: np.ndarray, share: float) -> np.ndarray:
    """The same tokens around their mean, with that share of the energy in four directions."""
    x_TD = x_TD - x_TD.mean(0)
    w, u_DD = np.linalg.eigh(x_TD.T @ x_TD)
    lead, rest = w[-4:].sum(), w[:-4].sum()
    factor_D = np.ones(len(w))
    if min(lead, rest) > 0:
        factor_D[-4:] = np.sqrt(share / (1 - share) * rest / lead)
    return (x_TD @ u_DD * factor_D) @ u_DD.T


def _smooth(rng: np.random.Generator, grid: tuple[int, int, int]) -> Float[np.ndarray, "T"]:
    """A Gaussian field with mean 0 and variance 1, correlated over a third of the picture."""
    field = rng.normal(0, 1, grid)
    for axis, length in enumerate((8.0, grid[1] / 6, grid[2] / 6)):
        frequency = np.fft.fftfreq(grid[axis]) * length * 2 * np.pi
        shape = [1, 1, 1]
        shape[axis] = -1
        blur = np.exp(-(frequency**2) / 2).reshape(shape)
        field = np.fft.ifft(np.fft.fft(field, axis=axis) * blur, axis=axis).real
    field -= field.mean()
    return (field / max(field.std(), 1e-9)).ravel()
