"""attend through cuDNN: XLA or kernels decode and rotate some keys and values, cuDNN attends to them.

The keys of a call lie in one workspace of bounded size: the new block with the first tokens of sink and
window, or more tokens of those, or a few spans. `flash` merges the results of the calls.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qvg_jax.attention.cudnn_workspaces import MEASURED, Keys, Reader, Workspaces, behind, joined
from qvg_jax.attention.features import PLAIN, Features
from qvg_jax.attention.flash import BACKENDS, Softmax, no_keys, split, visit
from qvg_jax.attention.formats import scheme_of
from qvg_jax.attention.workspaces import by_kernels
from qvg_jax.attention.xla import attend_new_block
from qvg_jax.backends import capability, no_triton, on_several_devices
from qvg_jax.cache.layer_codecs import LayerCodecs
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.view import CacheView

__all__ = ["Workspaces", "attend_cudnn", "undecodable", "unsupported"]


def unsupported(view: CacheView, q_BTHD: Array, features: Features = PLAIN) -> str | None:
    """The reason why cuDNN cannot serve a call, or None if it can."""
    if features.softcap is not None:
        return f"softcap={features.softcap}; cuDNN attends to plain logits"
    lay: Layout = view.cache.layout
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q has dtype {q_BTHD.dtype}; cuDNN reads bfloat16 and float16"
    found = capability()
    widest = 128 if found is not None and found < (9, 0) else 256
    if lay.head_dim % 8 or lay.head_dim > widest:
        return f"head_dim={lay.head_dim}; cuDNN reads multiples of 8 up to {widest} on this device"
    if lay.key_bias is not None and lay.key_bias.factor:
        factor = lay.key_bias.factor
        return f"key_bias factor={factor}; with cuDNN only factor=0 is served, with any offset"
    if (why := on_several_devices(q_BTHD)) is not None:
        return why
    if found is None or found < (8, 0):
        device = jax.devices()[0]
        name = f"{device.platform} {getattr(device, 'compute_capability', '')}".strip()
        return f"the default device is {name}; cuDNN needs a GPU of compute capability 8.0 or more"
    return None


def undecodable(view: CacheView, q_BTHD: Array) -> str | None:
    """The reason why kernels cannot decode the spans of a call for cuDNN, or None if they can.

    Whatever changes keys and values between decoding and attention, other than a rotation, XLA does.
    """
    lay: Layout = view.cache.layout
    if q_BTHD.dtype != jnp.bfloat16:
        return f"q has dtype {q_BTHD.dtype}; the kernels decode to bfloat16"
    if lay.blocks == "padded":
        return "the cache has blocks='padded', whose tokens are sorted when they are decoded"
    for name, codec in (("key", lay.key_codec), ("value", lay.value_codec)):
        if isinstance(codec, LayerCodecs):
            return f"{name} codecs differ by layer; the kernels read one for all"
        if lay.max_spans and isinstance(why := scheme_of(codec, lay.head_dim), str):
            return f"the kernels do not decode the {name} codec {codec.name}: {why}"
    if not by_kernels(view):
        return f"the kernels do not apply {type(view.rope).__name__}; they rotate keys by a Rope"
    return None


def attend_cudnn(
    q_BTHD: Float[Array, "R T Hq D"],
    view: CacheView,
    k_BTHD: Float[Array, "R T H D"],
    v_BTHD: Float[Array, "R T H D"],
    layer: Int[Array, ""],
    scale: Float[Array, ""],
    features: Features = PLAIN,
    *,
    backend: str = "cudnn",
    workspaces: Workspaces = MEASURED,
) -> tuple[Float[Array, "R T Hq D"], Float[Array, "R T Hq"] | None]:
    """Output and log-sum-exp of `attend` through cuDNN, for calls that are not `unsupported`.

    XLA attends to a new block of which not all is seen, and its result is one of those that are merged.

    Args:
        q_BTHD, view, k_BTHD, v_BTHD, layer, scale: as in `attend`; `layer` and `scale` are arrays.
        features: of the call.
        backend: "cudnn", or "xla" for the same path anywhere and in any floating dtype.
        workspaces: sizes of the calls.

    Returns:
        The attention output in q's dtype, and the log-sum-exp if the features need it.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: kernels are to decode spans that they cannot; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not accepted: give one of {tuple(BACKENDS)}")
    why = undecodable(view, q_BTHD)
    if workspaces.decoder is None:
        decoder = "triton" if why is None and no_triton() is None else "xla"
        workspaces = dataclasses.replace(workspaces, decoder=decoder)
    elif workspaces.decoder != "xla" and why is not None:
        raise NotImplementedError(f"decoder={workspaces.decoder!r}: {why}; 'xla' serves it")
    lay: Layout = view.cache.layout
    batches, tokens, query_heads = q_BTHD.shape[:3]
    branches, group = batches // lay.batch, query_heads // view.heads
    rows = lay.batch * view.heads

    q_BHTD, k_BHTD, v_BHTD = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    k_BHTD, v_BHTD = k_BHTD.astype(q_BTHD.dtype), v_BHTD.astype(q_BTHD.dtype)
    q_BHTD = view.new(q_BHTD)
    # cuDNN's scale is a constant of the program. For the usual scale the factor is one, and exact.
    factor = scale.astype(jnp.float32) * math.sqrt(lay.head_dim)
    q_BHTD = (q_BHTD.astype(jnp.float32) * factor).astype(q_BTHD.dtype)
    # A key-value head is a row: query heads that share it are more queries, and so are branches.
    q_RBHGTD = q_BHTD.reshape(branches, lay.batch, view.heads, group, tokens, lay.head_dim)
    q_nQD = jnp.moveaxis(q_RBHGTD, 0, 2).reshape(rows, -1, lay.head_dim)

    # The new block shares a call with the oldest spans, or else with the first part of sink and window. Not
    # where each branch has its own, nor where an offset is added to the logits of spans only, nor where
    # not all of it is seen or the valid tokens of rows end at different places.
    offset = 0.0 if lay.key_bias is None else lay.key_bias.offset
    by_xla = features.hides or not k_BHTD.shape[2]
    padded = lay.blocks == "padded"
    joins = branches == 1 and not offset and not by_xla and not padded
    new = (k_BHTD, v_BHTD) if joins else None
    reader = Reader(view, layer, q_nQD, new, workspaces)

    def visit_keys(run: Softmax, keys: Keys, offset: float = 0.0) -> Softmax:
        k_nSD, v_nSD = (x.reshape(rows, -1, lay.head_dim) for x in (keys.k_BHTD, keys.v_BHTD))
        parts = dict(parts=keys.parts, backend=backend, offset=offset)
        valid = jnp.repeat(keys.valid, view.heads) if padded else keys.valid
        return visit(run, q_nQD, k_nSD, v_nSD, valid, **parts)

    if joins:
        run = no_keys(q_nQD)
    else:
        apart_nQD = q_RBHGTD.reshape(branches * rows, -1, lay.head_dim)
        k_BHTD = view.new(k_BHTD) if k_BHTD.shape[2] else k_BHTD
        if by_xla:
            apart_BHQD = apart_nQD.reshape(batches, view.heads, -1, lay.head_dim)
            of_cudnn = jnp.float32(1 / math.sqrt(lay.head_dim))
            found = attend_new_block(apart_BHQD, k_BHTD, v_BHTD, of_cudnn, features)
            run = Softmax(*(x.reshape(branches * rows, *x.shape[2:]) for x in found))
        else:
            parts, room = split(*apart_nQD.shape[:2], tokens, workspaces.parts)
            k_BHTD, v_BHTD = joined([k_BHTD], room), joined([v_BHTD], room)
            k_nSD, v_nSD = (x.reshape(branches * rows, -1, lay.head_dim) for x in (k_BHTD, v_BHTD))
            alone = dict(parts=parts, backend=backend)
            run = visit(no_keys(apart_nQD), apart_nQD, k_nSD, v_nSD, tokens, **alone)
        run = Softmax(*(behind(x.reshape(branches, rows, *x.shape[1:]), 1) for x in run))
    # Loops, also where there is at most one step: a loop that looks at a counter, and no condition, which
    # would become a node of a CUDA graph.
    if view.reads_spans:
        some = lambda i, run: visit_keys(run, reader.spans(i), offset)  # noqa: E731
        run = lax.fori_loop(0, reader.valid_groups(), some, run)
    part = lambda i, run: visit_keys(run, reader.dense(i))  # noqa: E731
    run = lax.fori_loop(0, reader.valid_parts(), part, run)

    out = run.out_nQD.reshape(lay.batch, view.heads, branches, group, tokens, lay.head_dim)
    out_RBTHGD = jnp.transpose(out, (2, 0, 4, 1, 3, 5))
    out_BTHD, lse_BTH = out_RBTHGD.reshape(q_BTHD.shape), None
    if features.needs_lse:
        lse = run.lse_nQ.reshape(out.shape[:5])
        lse_BTH = jnp.transpose(lse, (2, 0, 4, 1, 3)).reshape(q_BTHD.shape[:3])
    out_BTHD, lse_BTH = features.finished(out_BTHD, lse_BTH)
    return out_BTHD.astype(q_BTHD.dtype), lse_BTH
