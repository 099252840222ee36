"""Composition: `chain` makes one codec of smoothings and a codec, and chooses what encodes it.

Plain XLA encodes every chain. The kernels of `pallas_kernels` encode k-means and the quantizer behind
it together, see `kernel_encoding`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from qvg_jax.backends import Candidate, no_hopper, no_triton, resolve
from qvg_jax.codecs.arguments import FIRST
from qvg_jax.codecs.base import (
    Codec,
    Packed,
    Shape,
    Smoothing,
    State,
    check_span,
    per_element,
)
from qvg_jax.codecs.kernel_encoding import KernelEncoding, kernel_encoding
from qvg_jax.codecs.spec import FACTORIES, Spec, factory
from qvg_jax.codecs.storage import Storage
from qvg_jax.errors import wrong_kind

__all__ = ["ENCODERS", "chain", "encoded_by", "labelled", "missing_for"]

ENCODERS = ("xla", "mosaic", "triton")


@factory
def chain(*transforms: Smoothing | Codec, encoder: str | None = None) -> Codec:
    """Returns the codec that applies smoothings in order, then one codec to the residual they leave.

    With smoothings s1 .. sn and codec q,
    r0 = x, (node_i, r_i) = s_i.encode(r_{i-1}), packed = (node_1, ..., node_n, q.encode(r_n));
    decoding runs backwards, in float32, with one rounding to the requested dtype at the end.

    Args:
        *transforms: any number of `Smoothing`s followed by exactly one `Codec` (which may itself
            be a chain).
        encoder: what encodes: "xla", anywhere; "mosaic", kernels for Hopper GPUs, and "triton",
            those for NVIDIA GPUs from Ampere on, for one `kmeans_smoothing` before any codec (XLA
            encodes residuals for which there is no kernel); None is the first of "mosaic", "triton" and
            "xla" that serves, "triton" where jax_triton is installed.

    Returns:
        A codec whose `packed` and `state` are tuples with one entry per transform. Its encode
        takes `implementation`, which is for one call what `encoder` is for all.

    Raises:
        ValueError: no transform, the last one is not a `Codec`, or an earlier one is.
            On use: a state of another codec, or an unknown implementation.
        NotImplementedError: on use, a named implementation cannot encode this; it says why.
    """
    accepted = "any number of smoothings, then one codec, e.g. chain(kmeans_smoothing(256), "
    accepted += "residual_quantize(bits=2, group=64))"
    if not transforms:
        raise ValueError(f"chain() got no transforms; accepted: {accepted}")
    *before, last = transforms
    smoothings: list[Smoothing] = []
    for i, t in enumerate(before):
        if not isinstance(t, Smoothing):
            what = getattr(t, "name", repr(t))
            raise ValueError(f"transforms[{i}]={what} is not a smoothing; accepted: {accepted}")
        smoothings.append(t)
    if not isinstance(last, Codec):
        what = getattr(last, "name", repr(last))
        raise ValueError(f"the last transform, {what}, is not a codec; accepted: {accepted}")
    if encoder is not None:
        _check_encoder(encoder)

    def init(shape: Shape, dtype: Any = jnp.bfloat16) -> State:
        check_span(shape, dtype)
        return tuple(t.init(shape, dtype) for t in transforms)

    storage = _storage(smoothings, last)

    def encode(
        x_BHTD: Array,
        state: State,
        *,
        key: PRNGKeyArray | None = None,
        implementation: str | None = None,
    ):
        check_span(x_BHTD.shape, x_BHTD.dtype)
        if not isinstance(state, tuple) or len(state) != len(transforms):
            raise ValueError(
                f"state has {len(state) if isinstance(state, tuple) else type(state).__name__}"
                f" entries for {len(transforms)} transforms; call init(x_BHTD.shape, x_BHTD.dtype)"
            )
        kernels = _kernels(implementation or encoder, storage, last, x_BHTD)
        if kernels is None:
            return by_xla(x_BHTD, state, key)
        _check_state(state, jax.eval_shape(lambda: init(x_BHTD.shape, x_BHTD.dtype)))
        return kernels.encode(x_BHTD, state, key)

    def by_xla(x_BHTD: Array, state: State, key: PRNGKeyArray | None):
        keys = [None if key is None else jax.random.fold_in(key, i) for i in range(len(state))]
        residual_BHTD, nodes, states = x_BHTD, [], []
        for t, s, k in zip(smoothings, state[:-1], keys[:-1], strict=True):
            node, residual_BHTD, s = t.encode(residual_BHTD, s, key=k)
            nodes.append(node)
            states.append(s)
        node, s = last.encode(residual_BHTD, state[-1], key=keys[-1])
        return (*nodes, node), (*states, s)

    def decode(packed: Packed, dtype: Any = jnp.bfloat16) -> Array:
        if not isinstance(packed, tuple | list) or len(packed) != len(transforms):
            other = f", not of {len(packed)}" if isinstance(packed, tuple | list) else ""
            raise wrong_kind("packed", packed, f"a tuple of {len(transforms)}{other}, {FIRST}")
        if not smoothings:
            return last.decode(packed[0], dtype)
        x_BHTD = last.decode(packed[-1], jnp.float32)
        for t, node in zip(reversed(smoothings), reversed(packed[:-1]), strict=True):
            x_BHTD = t.decode(node, x_BHTD)
        return x_BHTD.astype(dtype)

    def nbytes(shape: Shape) -> int:
        check_span(shape)
        return sum(t.nbytes(shape) for t in transforms)

    name = " > ".join(t.name for t in transforms)
    deficit, of_last = None, last.deficit
    if of_last is not None and all(t.isometric for t in smoothings):
        deficit = lambda packed: of_last(packed[-1])  # noqa: E731
    return Codec(init, encode, decode, per_element(nbytes), name, nbytes, storage, deficit)


def _storage(smoothings: list[Smoothing], last: Codec) -> Storage | None:
    """Returns the storage of a chain, from what its parts declare."""
    if last.storage is None:
        return None
    before = tuple(s.storage or f"the smoothing {s.name!r}" for s in smoothings)
    codes = "a chain inside the chain" if last.storage.chained else last.storage.codes
    return Storage(codes, before, chained=True, heads=last.storage.heads)


def encoded_by(codec: Codec, encoder: str) -> Codec:
    """Returns the same codec with another `encoder` of its chain, which a cache then compresses with.

    Args:
        codec: one that `chain` made, or the codec of a preset that is a chain.
        encoder: "xla", "mosaic" or "triton", see `chain`.

    Raises:
        ValueError: another encoder, or a codec that is not a chain.
    """
    _check_encoder(encoder)
    spec = codec.spec
    if spec is not None and spec.factory == "preset":
        chosen = encoded_by(spec["codec"], encoder)
        return labelled(spec["name"], chosen, f"{spec.text}:encoder={encoder}")
    if spec is None or spec.factory != "chain":
        raise ValueError(f"codec={codec.name!r} has no encoders to choose from; accepted: a chain")
    return chain(*spec["transforms"], encoder=encoder)


def labelled(name: str, codec: Codec, text: str) -> Codec:
    """Returns the same codec under the name of a preset, written as `text`.

    Args:
        name: what reports call it. Codecs of different names are different values.
        codec: any codec; of one that has a label, what is below it.
        text: how `presets.parse` reads it, such as "qvg:group=32".
    """
    if codec.spec is not None and codec.spec.factory == "preset":
        codec = codec.spec["codec"]
    named = dataclasses.replace(codec, name=name)
    object.__setattr__(named, "spec", Spec("preset", (("name", name), ("codec", codec)), text))
    return named


FACTORIES["preset"] = labelled


def _check_encoder(name: str) -> None:
    if name not in ENCODERS:
        raise ValueError(f"encoder={name!r} is not accepted: give one of {ENCODERS}")


def missing_for(codec: Codec | None) -> str | None:
    """The reason why this machine has not what a codec names as its encoder, or None."""
    spec = None if codec is None else codec.spec
    while spec is not None and spec.factory == "preset":
        spec = spec["codec"].spec
    named = spec["encoder"] if spec is not None and spec.factory == "chain" else None
    why = {"mosaic": no_hopper, "triton": no_triton}.get(named, lambda: None)()
    return None if why is None else f"encoder={named!r}: {why}; 'xla' encodes anywhere"


def _check_state(state: State, like: State) -> None:
    """Raises ValueError for the state of a codec with other settings, which kernels would not notice."""
    found, want = (jax.tree.map(jnp.shape, x) for x in (state, like))
    if found != want:
        raise ValueError(
            f"state has arrays of shapes {found}, and these settings have {want}; "
            "accepted: init(x_BHTD.shape, x_BHTD.dtype), or the state of the span before"
        )


class _Encoding(NamedTuple):
    """What decides who encodes a span."""

    storage: Storage | None
    quantizer: Codec
    x_BHTD: Array

    def without(self, kernels: str) -> str | None:
        """The reason why kernels of this kind cannot encode the span, or None if they can."""
        found = kernel_encoding(*self, kernels)
        return found if isinstance(found, str) else None


# In order of preference.
CANDIDATES = (
    Candidate("mosaic", lambda call: no_hopper() or call.without("mosaic")),
    Candidate("triton", lambda call: no_triton() or call.without("triton")),
    Candidate("xla", lambda call: None),
)


def _kernels(
    name: str | None, storage: Storage | None, quantizer: Codec, x_BHTD: Array
) -> KernelEncoding | None:
    """Returns the kernels that encode x, None for XLA; a named implementation is never replaced."""
    call = _Encoding(storage, quantizer, x_BHTD)
    chosen = resolve(CANDIDATES, call, implementation=name).chosen
    if chosen.implementation == "xla":
        return None
    found = kernel_encoding(*call, chosen.implementation)
    assert not isinstance(found, str)
    return found
