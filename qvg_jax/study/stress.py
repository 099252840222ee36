"""Made-up K, V and Q with what breaks codecs: loud channels, heavy tails, a loud head, frames that repeat.

Axes: F latent frames, Y rows, X columns, T = F Y X tokens in that order, H heads, Q queries, D head
dim, J features, C coordinates of the content.
"""

import numpy as np
from jaxtyping import Float

from qvg_jax.errors import UserError
from qvg_jax.study.capture import Captured

__all__ = ["LARGEST_VALUE", "LOUD_HEAD", "stress"]

LARGEST_VALUE = 1440.0  # of V; e4m3 ends at 448
LOUD_HEAD = 7.0  # norm of the first head's keys over that of the others
_CONTRAST = (5.0, 13.0)  # of the loud channels of K: RMS over the median channel's
_LOUD_CHANNELS = 3
_COORDINATES = 4
_FEATURES = 64
_LOGITS = 3.0  # standard deviation of the logits over the keys


def stress(
    seed: int = 0,
    *,
    frames: int = 12,
    height: int = 16,
    width: int = 16,
    heads: int = 4,
    head_dim: int = 128,
    queries: int = 256,
    tails: bool = True,
) -> Captured:
    """Returns K and V of a made-up clip and queries of the frame that follows it.

    What a patch shows is a smooth random field over rows and columns, the same in all frames but for
    a fifth of the area, which moves. Cosines of random projections of it are the features that K, V
    and Q share, with other weights in each head; each also has noise of its own.
      - K: in every head 3 channels have 5 to 13 times the RMS of the median channel, four fifths of
        it constant over the tokens; the first head is 7 times as loud as the others.
      - V: token norms are log-normal; in every head 3 channels are heavy-tailed (Student's t with 2.5
        degrees of freedom, times 4), and one token in a thousand has a massive entry in one of
        them, as large as 1,440 (in the first head: exactly).
      - Q: of the next frame, along the keys of the same place; logits have a standard deviation of 3.
    These statistics were published of large video models; nothing else about the numbers is meant to
    be real.

    Args:
        seed: another clip and other heads for every seed; the same numbers on every machine.
        frames, height, width: F, Y and X of the history.
        heads: H.
        head_dim: D, at least 8.
        queries: Q, evenly taken from the next frame; at most Y X.
        tails: False leaves out the loud channels, the loud head and the tails of V.

    Returns:
        One layer, batch 1, no RoPE, float32.

    Raises:
        UserError: a size below 1 (head_dim below 8), or more queries than a frame has patches.

    Source of the statistics: arXiv 2602.02958 (channels of K, frames alike); reports of users who ran
    the released networks (V up to 1,440, keys of one head seven times as large).
    """
    sizes = dict(frames=frames, height=height, width=width, heads=heads, queries=queries)
    if min(sizes.values()) < 1 or head_dim < 8:
        sizes["head_dim"] = head_dim
        raise UserError(f"{sizes} is not accepted: give sizes of 1 or more, head_dim 8 or more")
    if queries > height * width:
        raise UserError(
            f"queries={queries} is not accepted: give at most {height * width}, the patches of a frame"
        )
    rng = np.random.default_rng([seed, 20])
    features_TJ = _features(rng, frames + 1, height, width)
    next_T = np.linspace(0, height * width, queries, endpoint=False).astype(int)
    next_T += frames * height * width
    history = frames * height * width
    k, v, q = [], [], []
    for head in range(heads):
        keys_TD = _noisy(rng, _mixed(rng, features_TJ, head_dim), 0.4)
        q_QD = _noisy(rng, keys_TD[next_T] - keys_TD.mean(0), 0.5)
        values_TD = _noisy(rng, _mixed(rng, features_TJ, head_dim), 0.4)
        if tails:
            keys_TD += _loud_channels(rng, keys_TD)
            values_TD = _heavy(rng, values_TD, exact=not head)
            keys_TD *= LOUD_HEAD if not head else 1.0
        keys_TD, values_TD = keys_TD[:history], values_TD[:history]
        logits_QT = q_QD @ (keys_TD - keys_TD.mean(0)).T / np.sqrt(head_dim)
        k.append(keys_TD)
        v.append(values_TD)
        q.append(q_QD * _LOGITS / logits_QT.std())
    k, v, q = (np.stack(x)[None, None].astype(np.float32) for x in (k, v, q))
    still = np.zeros((2, 1, history, 0), np.float32), np.zeros((2, 1, queries, 0), np.float32)
    return Captured(k, v, q, *still, layers=np.zeros(1, np.int64))


def _features(rng: np.random.Generator, frames: int, height: int, width: int) -> np.ndarray:
    """Returns (T, J): cosines of random projections of the content."""
    still_YXC = np.stack([_smooth(rng, height, width) for _ in range(_COORDINATES)], -1)
    moving_YXC = np.stack([_smooth(rng, height, width) for _ in range(_COORDINATES)], -1)
    area_YX = _smooth(rng, height, width)
    mask_YX1 = (area_YX >= np.quantile(area_YX, 0.8))[..., None]
    content = [np.where(mask_YX1, np.roll(moving_YXC, f, 1), still_YXC) for f in range(frames)]
    g_TC = np.stack(content).reshape(-1, _COORDINATES)
    w_CJ = rng.normal(0, 1.0, (_COORDINATES, _FEATURES))
    return np.cos(g_TC @ w_CJ + rng.uniform(0, 2 * np.pi, _FEATURES))


def _smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns a random field of mean 0 and deviation 1 whose spectrum falls with the frequency."""
    fy, fx = np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width
    amplitude = 1 / (1 + fy**2 + fx**2)
    spectrum = amplitude * np.exp(2j * np.pi * rng.uniform(size=(height, width)))
    field = np.fft.ifft2(spectrum).real
    field -= field.mean()
    return field / max(field.std(), 1e-9)


def _mixed(
    rng: np.random.Generator, features_TJ: np.ndarray, head_dim: int
) -> Float[np.ndarray, "T D"]:
    """Returns random mixtures of the features of which a few count most; RMS 1."""
    weight_J = np.exp(-np.arange(features_TJ.shape[1]) / 12)
    x_TD = features_TJ @ (weight_J[:, None] * rng.normal(size=(features_TJ.shape[1], head_dim)))
    return x_TD / np.sqrt(np.mean(x_TD**2))


def _noisy(rng: np.random.Generator, x_TD: np.ndarray, noise: float) -> np.ndarray:
    return x_TD + noise * rng.normal(size=x_TD.shape)


def _loud_channels(rng: np.random.Generator, keys_TD: np.ndarray) -> np.ndarray:
    """Returns what makes a few channels loud: most of it constant, the rest in step with the content."""
    tokens, dim = keys_TD.shape
    loud = rng.choice(dim, _LOUD_CHANNELS, replace=False)
    size = rng.uniform(*_CONTRAST, _LOUD_CHANNELS) * rng.choice([-1, 1], _LOUD_CHANNELS)
    size *= np.median(np.sqrt(np.mean(keys_TD**2, 0)))
    out = np.zeros((tokens, dim))
    out[:, loud] = size * (1 + 0.25 * keys_TD[:, loud])
    return out


def _heavy(rng: np.random.Generator, values_TD: np.ndarray, exact: bool) -> np.ndarray:
    """Returns values with log-normal norms, heavy-tailed channels and a few massive entries."""
    tokens, dim = values_TD.shape
    out = 8 * values_TD * np.exp(0.4 * rng.normal(size=(tokens, 1)))
    loud = rng.choice(dim, _LOUD_CHANNELS, replace=False)
    out[:, loud] *= 1 + np.abs(rng.standard_t(2.5, (tokens, _LOUD_CHANNELS))) * 3
    massive = rng.choice(tokens, max(1, tokens // 1000), replace=False)
    size = LARGEST_VALUE * rng.uniform(0.3, 1, len(massive))
    size[0] = LARGEST_VALUE if exact else size[0]
    out[massive, rng.choice(loud, len(massive))] = size * rng.choice([-1, 1], len(massive))
    return np.clip(out, -LARGEST_VALUE, LARGEST_VALUE)
