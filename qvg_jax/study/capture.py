"""K, V and Q of a running model as one file, to try codecs on: what `qvg capture` writes.

Letters: L captured layers, B batch, H key-value heads, T tokens of history, Q query tokens, D head dim.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Float, Int

from qvg_jax.errors import UserError
from qvg_jax.files import replacing
from qvg_jax.reading.arrays import read_npz

__all__ = ["Captured", "Recorder", "load_captured", "save_captured"]


@dataclasses.dataclass(frozen=True)
class Captured:
    """K and V of a history and queries that look at it.

    K and Q are before RoPE. Where the model rotates, `turn_k` and `turn_q` hold cosine and sine of
    every token's angles, and channel j turns together with channel j + D/2 (`pairing` "half") or
    channel 2 j with 2 j + 1 ("interleaved"); (2, B, T, 0) is no rotation. `own_k` and `own_v` are those of the
    block that asks, of as many tokens as there are queries; None in files that do not have them.
    """

    k_LBHTD: Float[np.ndarray, "L B H T D"]
    v_LBHTD: Float[np.ndarray, "L B H T D"]
    q_LBHQD: Float[np.ndarray, "L B Hq Q D"]
    turn_k: Float[np.ndarray, "2 B T R"]
    turn_q: Float[np.ndarray, "2 B Q R"]
    layers: Int[np.ndarray, "L"]
    pairing: str = "half"
    own_k_LBHQD: Float[np.ndarray, "L B H Q D"] | None = None
    own_v_LBHQD: Float[np.ndarray, "L B H Q D"] | None = None

    def __post_init__(self):
        k, q = self.k_LBHTD.shape, self.q_LBHQD.shape
        for own in (self.own_k_LBHQD, self.own_v_LBHQD):
            want = (*k[:3], q[-2], *k[4:])
            if own is not None and (own.shape != want or not np.isfinite(own).all()):
                raise ValueError(f"own K or V has shape {own.shape}; accepted: {want}, all finite")
        if (self.own_k_LBHQD is None) != (self.own_v_LBHQD is None):
            raise ValueError("own K without own V, or the other way round; accepted: both or none")
        if len(k) != 5 or self.v_LBHTD.shape != k:
            raise ValueError(f"K {k} and V {self.v_LBHTD.shape} must be the same (L, B, H, T, D)")
        if len(q) != 5 or (q[:2], q[4]) != (k[:2], k[4]) or q[2] % k[2]:
            raise ValueError(f"Q has shape {q}; accepted with K {k}: {k[:2]}, n {k[2]}, Q, {k[4]}")
        for name, turn, tokens in (("turn_k", self.turn_k, k[3]), ("turn_q", self.turn_q, q[3])):
            if turn.shape[:3] != (2, k[1], tokens) or turn.shape[3] not in (0, k[4] // 2):
                want = (2, k[1], tokens, k[4] // 2)
                raise ValueError(
                    f"{name} has shape {turn.shape}; accepted: {want}, or 0 at the end"
                )
        if self.pairing not in ("half", "interleaved"):
            raise ValueError(f"pairing={self.pairing!r}; accepted: 'half' or 'interleaved'")
        for name in ("k_LBHTD", "v_LBHTD", "q_LBHQD"):
            _check_values(name[0].upper(), getattr(self, name))
        for name in ("turn_k", "turn_q", "layers"):
            x = getattr(self, name)
            if x.dtype.kind not in "fiu" or not np.isfinite(x).all():
                raise ValueError(f"{name} of dtype {x.dtype} is not accepted: give finite numbers")


def _check_values(name: str, x: np.ndarray) -> None:
    """Raises ValueError where nothing can be measured: no values, not floats, not finite, all zero."""
    if not x.size:
        raise ValueError(f"{name} of shape {x.shape} is empty; accepted: at least one of each axis")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} is of dtype {x.dtype}; accepted: bfloat16, float16, float32 or float64"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{name} has NaN or infinity in it; accepted: numbers")
    if not x.any():
        raise ValueError(f"{name} is zero everywhere; accepted: values that a model has made")


class Recorder:
    """Notes the queries, and the block's keys and values, that a model's attention sees, from inside jit and scan.

        recorder = Recorder()
        model(..., attend=recorder.listening(attend))     # attend(layer, q, k, v, ...)
        queries = recorder.queries()                       # {layer: q of the last call}

    A host callback for every call, so for capturing and not for running.
    """

    def __init__(self):
        self._seen: dict[int, tuple[np.ndarray, ...]] = {}

    def listening(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        """`attend` with q, k and v noted under its first argument, the layer's number."""

        def noted(layer, q, *args, **kwargs):
            io_callback(self._keep, None, layer, q, *args[:2], ordered=True)
            return attend(layer, q, *args, **kwargs)

        return noted

    def _keep(self, layer, *qkv) -> None:
        self._seen[int(layer)] = tuple(np.asarray(x) for x in qkv)

    def queries(self) -> dict[int, np.ndarray]:
        """The last query of every layer; waits for what is still running."""
        return {layer: qkv[0] for layer, qkv in self.blocks().items()}

    def blocks(self) -> dict[int, tuple[np.ndarray, ...]]:
        """The last q, k and v of every layer; waits for what is still running."""
        jax.effects_barrier()
        return dict(self._seen)


def save_captured(path: str | os.PathLike, captured: Captured) -> None:
    """Writes an .npz of float32 arrays that appears whole or not at all."""
    arrays = {
        field.name: np.asarray(getattr(captured, field.name))
        for field in dataclasses.fields(captured)
        if getattr(captured, field.name) is not None
    }
    arrays = {k: v.astype(np.float32) if v.dtype.kind in "fV" else v for k, v in arrays.items()}
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_captured(path: str | os.PathLike) -> Captured:
    """Reads what `save_captured` wrote, or an .npz with just k, v and q of shape (L, B, H, T, D).

    Raises:
        UserError: a missing or torn file, missing arrays, shapes that do not fit together, or
            values that nothing can be measured on: NaN, no queries, zeros only.
    """
    names = [field.name for field in dataclasses.fields(Captured)]
    arrays = read_npz(path, ["k", "v", "q", *names])
    for short, name in (("k", "k_LBHTD"), ("v", "v_LBHTD"), ("q", "q_LBHQD")):
        if name not in arrays and short not in arrays:
            raise UserError(f"{os.fspath(path)}: has no {short!r}; accepted: arrays k, v and q")
        arrays.setdefault(name, arrays.pop(short, None))
    k, q = arrays["k_LBHTD"], arrays["q_LBHQD"]
    if k.ndim != 5 or q.ndim != 5 or not k.size:
        raise UserError(
            f"{os.fspath(path)}: K {k.shape} and Q {q.shape}; accepted: five axes, (L, B, H, T, D), "
            "none of them empty"
        )
    arrays.setdefault("turn_k", np.zeros((2, k.shape[1], k.shape[3], 0), np.float32))
    arrays.setdefault("turn_q", np.zeros((2, k.shape[1], q.shape[3], 0), np.float32))
    arrays.setdefault("layers", np.arange(len(k)))
    arrays["pairing"] = str(arrays.get("pairing", "half"))
    try:
        return Captured(**{name: arrays.get(name) for name in names})  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from error


def rotated(x_BHTD: jax.Array, turn: jax.Array, pairing: str) -> jax.Array:
    """x rotated by the angles whose cosine and sine `turn` holds; x itself where it holds none."""
    if not turn.shape[-1]:
        return x_BHTD
    cos, sin = (t[:, None] for t in turn)
    half = pairing == "half"
    x1, x2 = jnp.split(x_BHTD, 2, -1) if half else (x_BHTD[..., ::2], x_BHTD[..., 1::2])
    y = (x1 * cos - x2 * sin, x1 * sin + x2 * cos)
    return jnp.concatenate(y, -1) if half else jnp.stack(y, -1).reshape(x_BHTD.shape)
