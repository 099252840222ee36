"""What reads a cache: the implementations of `attend` in order of preference, and `explain`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from qvg_jax.attention import xla
from qvg_jax.attention.features import PLAIN, Features, features_of
from qvg_jax.backends import Candidate, Choice, no_hopper, no_triton, resolve
from qvg_jax.cache.arguments import check_cache
from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.cache.operations import KVCache
from qvg_jax.cache.view import CacheView
from qvg_jax.codecs.arguments import check_array
from qvg_jax.codecs.base import Codec
from qvg_jax.codecs.storage import Centroids, Levels, Storage

__all__ = ["CANDIDATES", "Explanation", "choose", "explain", "wants_bf16"]

ALIASES = {"mosaic_fp8": ("mosaic", "fp8")}  # names of earlier releases


class _Call(NamedTuple):
    """The parts of a call of `attend` that decide which implementation serves it."""

    view: CacheView
    q_BTHD: Array
    features: Features = PLAIN
    reads_new: bool = True  # whether there are new keys and values


def _no_kernels(
    call: _Call, no_device: Callable[[], str | None], fp8: bool, decoding: str
) -> str | None:
    """The reason why kernels do not serve a call, or None if they do.

    `no_device()` is the reason why they cannot run here. It is asked before they are imported, as
    Mosaic takes long.
    """
    plain = dataclasses.replace(call.features, return_lse=False)
    asked = [*plain.names(), *([] if call.reads_new else ["k=None"])]
    if asked:
        return f"{', '.join(asked)}: the kernels attend plainly, and to all of a new block"
    if call.view.cache.layout.key_bias is not None:
        return "the cache has a key_bias, which the kernels do not add"
    if (why := no_device()) is not None:
        return why
    from qvg_jax.attention import kernels

    why = kernels.unsupported(call.view, call.q_BTHD, fp8)
    if why is None and decoding == "kernels":
        why = kernels.undecodable(call.view)
    return why


def _no_cudnn(call: _Call) -> str | None:
    from qvg_jax.attention import cudnn

    return cudnn.unsupported(call.view, call.q_BTHD, call.features)


def _no_triton_for_cudnn(call: _Call) -> str | None:
    """The reason why cuDNN does not attend to spans that Triton decodes, or None if it does."""
    from qvg_jax.attention import cudnn

    return _no_cudnn(call) or no_triton() or cudnn.undecodable(call.view, call.q_BTHD)


def _too_fine(call: _Call) -> str | None:
    """The reason why products in e4m3 would show beside the error of the codes; None if they would not.

    They add some 1.5 % to the attention output's error. Codes of two bits with at most one stage of
    k-means have 2.8 % and more of their own (pallas_kernels/README.md).
    """
    lay = call.view.cache.layout
    if not lay.max_spans:
        return "the cache has no compressed spans; products in fp8 would be its largest error"
    return wants_bf16(lay.key_codec, lay.value_codec)


def wants_bf16(key_codec: Codec, value_codec: Codec) -> str | None:
    """The reason why a cache with these codecs is read in bf16 where nothing is named; None for fp8."""
    for name, codec in (("key", key_codec), ("value", value_codec)):
        if (why := _finer_than_two_bits(codec.storage)) is not None:
            return f"{name} codec {codec.name} has {why}; its error is not larger than that of fp8"
    return None


def _finer_than_two_bits(storage: Storage | None) -> str | None:
    """The part of a codec's form that makes it finer than two bits and one stage; None if none does."""
    if storage is None or not isinstance(storage.codes, Levels):
        return "no codes of two bits"
    stages = sum(s.stages for s in storage.smoothings if isinstance(s, Centroids))
    if storage.codes.bits > 2:
        return f"codes of {storage.codes.bits} bits"
    return f"{stages} stages of k-means" if stages > 1 else None


def _mosaic(precision: str, decoding: str, named: bool | None) -> Candidate:
    def why_not(call: _Call) -> str | None:
        return _no_kernels(call, lambda: no_hopper(), precision == "fp8", decoding)

    why_name = _too_fine if precision == "fp8" else None
    return Candidate("mosaic", why_not, precision, decoding, named, why_name)


# In order of preference, which is the order of their speed (docs/benchmarks/attention.md). Who names "mosaic"
# or "triton" has spans decoded by them, or an error; who names "cudnn" by Triton where it can; who names
# nothing may get the attention of Mosaic and the decoding of XLA.
CANDIDATES = (
    _mosaic("fp8", "kernels", None),
    _mosaic("bf16", "kernels", None),
    _mosaic("bf16", "xla", False),
    Candidate("cudnn", _no_triton_for_cudnn, "bf16", "kernels"),
    Candidate("cudnn", _no_cudnn, "bf16", "xla"),
    Candidate(
        "triton", lambda call: _no_kernels(call, lambda: no_triton(), False, "kernels"), "bf16",
        "kernels",
    ),
    Candidate("xla", lambda call: xla.unsupported(call.view, call.features), None, "xla"),
)  # fmt: skip


def choose(
    view: CacheView,
    q_BTHD: Array,
    implementation: str | None,
    precision: str | None,
    features: Features = PLAIN,
    reads_new: bool = True,
) -> Choice:
    """The choice for a call of `attend`, whose docstring has the names and errors."""
    if implementation in ALIASES:
        implementation, implied = ALIASES[implementation]
        if precision not in (None, implied):
            raise ValueError(
                f"precision={precision!r} beside implementation='mosaic_fp8' is not accepted: give "
                "implementation='mosaic'"
            )
        precision = implied
    names = dict(implementation=implementation, precision=precision)
    return resolve(CANDIDATES, _Call(view, q_BTHD, features, reads_new), **names)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What would serve a call of `attend`, and why nothing else would.

    Attributes:
        implementation: "mosaic", "cudnn", "triton" or "xla".
        precision: "bf16" or "fp8", of the matrix products; None is that of the queries.
        decoding: "kernels" or "xla", by which compressed spans are decoded; for "cudnn" kernels are Triton's.
        others: why each other way does not run: the reason why it cannot, or that it must be named.
        heads: how heads differ in what they read; None if all of them read the whole cache.
    """

    implementation: str
    precision: str | None
    decoding: str | None
    others: dict[str, str]
    heads: str | None = None

    @property
    def runs(self) -> str:
        """What would serve the call, in words: such as "mosaic in fp8, spans decoded by kernels"."""
        return str(Candidate(self.implementation, lambda _: None, self.precision, self.decoding))

    def __str__(self) -> str:
        lines = [f"runs: {self.runs}", *(f"not {k}: {v}" for k, v in self.others.items())]
        return "\n".join(lines if self.heads is None else [lines[0], self.heads, *lines[1:]])


def explain(
    cache: KVCache | CacheView,
    q_BTHD: Float[Array, "B T Hq D"] | jax.ShapeDtypeStruct,
    *,
    implementation: str | None = None,
    precision: str | None = None,
    **features: Any,
) -> Explanation:
    """Says what `attend` would run for a cache and queries, and why the others would not.

        print(qvg.explain(view, q))

    Nothing is computed.

    Args:
        cache: the cache, or the view of it that `attend` would be given.
        q_BTHD: the queries, or their shape and dtype.
        implementation, precision: as in `attend`.
        **features: causal, mask, lengths, softcap, sink_logits and return_lse, as in `attend`.

    Returns:
        The explanation; `str` gives a line for each way.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attend` would.
    """
    check_cache(cache, or_view=True)
    check_array(q_BTHD, "q", "(B, T, Hq, D), or its ShapeDtypeStruct")
    view = cache if isinstance(cache, CacheView) else cache.view(rope=False)
    if isinstance(q_BTHD, jax.ShapeDtypeStruct):
        q_BTHD = jax.eval_shape(lambda: jax.numpy.zeros(q_BTHD.shape, q_BTHD.dtype))
    asked = features_of(q_BTHD.shape[:3], **features)
    chosen = choose(view, q_BTHD, implementation, precision, asked).chosen
    others = {}
    for candidate in CANDIDATES:
        if candidate == chosen:
            continue
        call = _Call(view, q_BTHD, asked)
        after = CANDIDATES.index(candidate) > CANDIDATES.index(chosen)
        why, unnamed = candidate.why_not(call), candidate.refuses(call, named=False)
        if why is None:
            why = "it serves the call if it is named"
            if unnamed is not None:
                why += f": {unnamed}"
            elif after and candidate.named is not True:
                why = "it serves the call, and comes later"
        others[str(candidate)] = why
    heads = _of_heads(view.cache.layout.history)
    return Explanation(chosen.implementation, chosen.precision, chosen.decoding, others, heads)


def _of_heads(history: HeadHistory | None) -> str | None:
    """Returns how heads differ in what they read, and how many programs that takes."""
    if history is None:
        return None
    *most, last = map(str, sorted(set(history.counts)))
    counts = f"{', '.join(most)} or {last}" if most else last
    return (
        f"heads: {history.full} of {history.layers * history.heads} have a history, by layer {counts} of "
        f"{history.heads}; programs: {len(most) + 1}, one for each of these numbers"
    )
