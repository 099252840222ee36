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
from qvg_jax.cache.head_history import HeadHistory, HeadSet
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
            out_BTHD = jnp.zeros_like(q_BTHD)
            lse_BTH = jnp.zeros(q_BTHD.shape[:3], jnp.float32) if features.needs_lse else None
            for has in (True, False):
                index_Lh = history.indices(count, has)
                if not index_Lh.shape[1]:
                    continue
                only = HeadSet(index_h=jnp.asarray(index_Lh)[layer], history=has)
                keys, queries = only.repeated((view.copies,)), only.repeated((view.copies, group))
                out, lse = attend_some(
                    q_BTHD.take(queries, 2),
                    dataclasses.replace(view, only=only),
                    k_BTHD.take(keys, 2),
                    v_BTHD.take(keys, 2),
                    layer,
                    scale,
                    features.of_heads(queries),
                )
                out_BTHD = out_BTHD.at[:, :, queries].set(out)
                if lse_BTH is not None:
                    lse_BTH = lse_BTH.at[:, :, queries].set(lse)
            return out_BTHD, lse_BTH

        return run

    counts = sorted(set(history.counts))
    if len(counts) == 1:
        return program(counts[0])(layer)
    which_L = np.asarray([counts.index(count) for count in history.counts], np.int32)
    return lax.switch(jnp.asarray(which_L)[layer], [program(count) for count in counts], layer)
