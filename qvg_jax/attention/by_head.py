"""Attention to a cache some of whose heads have no history: heads with one and local heads, each apart.

Layers with equally many heads of both kinds are one program. Which of the programs a layer runs is known when
it runs, so a scan over layers needs no more than a switch.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qvg_jax.attention.features import Features
from qvg_jax.cache.head_history import HeadHistory, HeadSet, repeated
from qvg_jax.cache.view import CacheView

__all__ = ["attend_by_head"]

type Attend = Callable[..., tuple[Array, Array | None]]


def attend_by_head(
    attend_some: Attend,
    q_BTHD: Array,
    view: CacheView,
    k_BTHD: Array,
    v_BTHD: Array,
    layer: Array,
    scale: Array,
    features: Features,
) -> tuple[Array, Array | None]:
    """Output and log-sum-exp of `attend` for a cache with a `HeadHistory`.

    Args:
        attend_some: `attend_some(q, view, k, v, layer, scale, features)` for the heads that the view is
            narrowed to.
        q_BTHD, view, k_BTHD, v_BTHD, layer, scale, features: as in `attend`, checked.
    """
    history: HeadHistory = view.cache.layout.history
    group = q_BTHD.shape[2] // view.heads

    def program(count: int) -> Callable[[Array], tuple[Array, Array | None]]:
        def run(layer: Array) -> tuple[Array, Array | None]:
            indices = {has: history.indices(count, has) for has in (True, False)}
            parts = []
            for has, index_Lh in indices.items():
                if not index_Lh.shape[1]:
                    continue
                only = HeadSet(index_h=jnp.asarray(index_Lh)[layer], history=has)
                narrowed = dataclasses.replace(view, only=only)
                if only.count == history.heads:  # all heads of the layer, in their order
                    return attend_some(q_BTHD, narrowed, k_BTHD, v_BTHD, layer, scale, features)
                keys = repeated(only.index_h, (view.copies,))
                queries = repeated(keys, (group,))
                k, v = (x.take(keys, 2) for x in (k_BTHD, v_BTHD))
                some = features.of_heads(queries)
                parts.append(
                    attend_some(q_BTHD.take(queries, 2), narrowed, k, v, layer, scale, some)
                )
            # A gather brings heads back into their order: a scatter would cost a GPU more.
            place_LH = np.argsort(np.concatenate(list(indices.values()), 1), 1).astype(np.int32)
            back = repeated(jnp.asarray(place_LH)[layer], (view.copies, group))
            joined = lambda x: jnp.concatenate(x, 2).take(back, 2)  # noqa: E731
            out, lse = zip(*parts, strict=True)
            return joined(out), joined(lse) if features.needs_lse else None

        return run

    counts = sorted(set(history.counts))
    if len(counts) == 1:
        return program(counts[0])(layer)
    which_L = np.asarray([counts.index(count) for count in history.counts], np.int32)
    return lax.switch(jnp.asarray(which_L)[layer], [program(count) for count in counts], layer)
