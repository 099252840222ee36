"""The features of a call of `attend`: masks of the new block, a soft-cap, learned sinks, the log-sum-exp.

A call that asks for nothing has `PLAIN`, which holds no array, so its program is that of plain attention.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qvg_jax.cache.view import checked_lengths

__all__ = ["PLAIN", "Features", "features_of"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """The features of a call, as `features_of` has checked them.

    Axes: R rows of the queries, Hq query heads, T tokens of the new block.

    Attributes:
        causal: whether a query sees only new keys that are not behind it.
        softcap: c of logits c tanh(s / c); None for plain logits.
        return_lse: whether the log-sum-exp of the logits is returned too.
        mask: bool, (R or 1, Hq or 1, T, T): which new keys a query sees; None for all.
        lengths_R: int32, tokens of each row that count; None for all.
        sink_logits_H: float32, a logit of each query head whose key has a value of zero.
    """

    causal: bool = dataclasses.field(default=False, metadata=dict(static=True))
    softcap: float | None = dataclasses.field(default=None, metadata=dict(static=True))
    return_lse: bool = dataclasses.field(default=False, metadata=dict(static=True))
    mask: Any = None
    lengths_R: Any = None
    sink_logits_H: Any = None

    @property
    def hides(self) -> bool:
        """Whether a query may not see all of the new block."""
        return self.causal or self.mask is not None or self.lengths_R is not None

    @property
    def needs_lse(self) -> bool:
        """Whether the log-sum-exp of the logits is needed beside the output."""
        return self.return_lse or self.sink_logits_H is not None

    def names(self) -> list[str]:
        """The arguments of `attend` that ask for these features, such as ["causal=True"]."""
        named = {
            "causal=True": self.causal,
            "mask": self.mask is not None,
            "lengths": self.lengths_R is not None,
            f"softcap={self.softcap}": self.softcap is not None,
            "sink_logits": self.sink_logits_H is not None,
            "return_lse=True": self.return_lse,
        }
        return [name for name, given in named.items() if given]

    def visible(self, form: tuple[int, int, int], start: Array | int, size: int) -> Array | None:
        """Which keys `start` to `start` + `size` of the new block the queries see; None for all.

        Args:
            form: (H, G, T): key-value heads, query heads of each, tokens of the new block.
            start, size: of the keys.

        Returns:
            Bool (R or 1, H or 1, G T, size), queries of a head in the order (G, T).
        """
        heads, group, tokens = form
        key_s, seen = start + jnp.arange(size), None

        def both(seen: Array | None, more: Array) -> Array:
            return more if seen is None else seen & more

        if self.causal:
            seen = (key_s[None, :] <= jnp.arange(tokens)[:, None])[None, None, None]
        if self.lengths_R is not None:
            counts = key_s[None, :] < self.lengths_R[:, None]
            seen = both(seen, counts[:, None, None, None])
        if self.mask is not None:
            mask = jax.lax.dynamic_slice_in_dim(self.mask, start, size, 3)
            apart = (heads, group) if mask.shape[1] > 1 else (1, 1)
            seen = both(seen, mask.reshape(mask.shape[0], *apart, *mask.shape[2:]))
        if seen is None:
            return None
        seen = jnp.broadcast_to(seen, (*seen.shape[:2], group, tokens, size))
        return seen.reshape(*seen.shape[:2], group * tokens, size)

    def of_branches(self, batch: int) -> tuple["Features", "Features"]:
        """These features with rows (branches, batch) apart, and the axes over which to map them."""
        split = lambda x: x.reshape(-1, batch, *x.shape[1:])  # noqa: E731
        mask, lengths = self.mask, self.lengths_R
        apart = mask is not None and mask.shape[0] > 1
        parts = dataclasses.replace(
            self,
            mask=split(mask) if apart else mask,
            lengths_R=None if lengths is None else split(lengths),
        )
        axes = dataclasses.replace(
            self,
            mask=0 if apart else None,
            lengths_R=None if lengths is None else 0,
            sink_logits_H=None,
        )
        return parts, axes

    def of_heads(self, head_h: Array) -> "Features":
        """These features for some of the query heads."""
        mask, sinks = self.mask, self.sink_logits_H
        apart = mask is not None and mask.shape[1] > 1
        return dataclasses.replace(
            self,
            mask=mask.take(head_h, 1) if apart else mask,
            sink_logits_H=None if sinks is None else sinks.take(head_h),
        )

    def finished(self, out_BTHD: Array, lse_BTH: Array | None) -> tuple[Array, Array | None]:
        """Output and log-sum-exp (both float32) with the logits of the learned sinks among the others."""
        if self.sink_logits_H is None:
            return out_BTHD, lse_BTH
        total_BTH = jnp.logaddexp(lse_BTH, self.sink_logits_H[None, None])
        share_BTH = jnp.where(lse_BTH > -jnp.inf, jnp.exp(lse_BTH - total_BTH), 0)
        return out_BTHD * share_BTH[..., None], total_BTH


PLAIN = Features()


def features_of(
    form: tuple[int, int, int],
    *,
    causal: bool = False,
    mask: Any = None,
    lengths: Int[Array, " B"] | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " Hq"] | None = None,
    return_lse: bool = False,
) -> Features:
    """The features of a call; the arguments are those of `attend`.

    Args:
        form: (B, T, Hq) of the queries.
        causal, mask, lengths, softcap, sink_logits, return_lse: as in `attend`.

    Raises:
        ValueError: an argument of another shape, dtype or range.
    """
    rows, tokens, heads = form
    if mask is not None:
        mask = _checked_mask(mask, rows, tokens, heads)
    if lengths is not None:
        lengths = checked_lengths(lengths, rows, tokens)
    if softcap is not None:
        number = isinstance(softcap, int | float) and not isinstance(softcap, bool)
        if not number or not 0 < softcap < float("inf"):
            raise ValueError(f"softcap={softcap!r} is not accepted: give a finite number > 0")
        softcap = float(softcap)
    if sink_logits is not None:
        sink_logits = jnp.asarray(sink_logits, jnp.float32)
        if sink_logits.shape != (heads,):
            raise ValueError(
                f"sink_logits have shape {sink_logits.shape}; accepted: ({heads},), one a query head"
            )
    return Features(
        # A single token sees itself either way.
        causal=bool(causal) and tokens > 1,
        softcap=softcap,
        return_lse=bool(return_lse),
        mask=mask,
        lengths_R=lengths,
        sink_logits_H=sink_logits,
    )


def _checked_mask(mask: Any, rows: int, tokens: int, heads: int) -> Array:
    """The mask of the new block as (B or 1, Hq or 1, T, T)."""
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; accepted: bool, True where a key is seen")
    shape = {2: (1, 1), 3: (*mask.shape[:1], 1)}.get(mask.ndim, mask.shape[:2]) + mask.shape[-2:]
    fits = 2 <= mask.ndim <= 4 and shape[2:] == (tokens, tokens)
    if not fits or shape[0] not in (1, rows) or shape[1] not in (1, heads):
        t = tokens
        raise ValueError(
            f"mask has shape {mask.shape}; accepted: ({t}, {t}), ({rows}, {t}, {t}) or "
            f"({rows} or 1, {heads} or 1, {t}, {t}): (B, Hq, queries, keys) of the new block"
        )
    return mask.reshape(shape)
