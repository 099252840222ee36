"""All spans of a history, kept packed beside a cache that has only some of them in sight.

    store = SpanStore.create(cache, spans=4096)                # in host memory; or memory="device"
    for block in blocks:
        cache = compress(append(cache, k, v, positions))
        store = store.keep(cache)                              # what was compressed since the last time
        ids = store.nearest(next_positions, count=7)
        cache, store = recall(cache, store, ids)               # seven spans in sight, whatever the length

The cache stays small and attention costs the same for a history of any length: it reads sink, window and
the spans in sight. Spans are numbered 0, 1, 2, ... in the order in which they were compressed, and travel
packed, as their codec stores them. These functions run on the host, between the blocks; what they move is
on its way when they return.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qvg_jax.cache.arguments import check_cache
from qvg_jax.cache.layout import Layout
from qvg_jax.cache.memories import check_room, in_memory
from qvg_jax.cache.state import KVCache

__all__ = ["Span", "SpanStore"]

_FIELDS = dataclasses.fields(Layout)


class Span(NamedTuple):
    """One span of all layers as it lies in a slot."""

    k: Any  # packed, leaves [L, ...]
    v: Any
    pos: Any  # [B, T, P]
    valid: Any  # [B, T], or None
    table: Any  # leaves [B, T, ...], or None


class _Kept(NamedTuple):
    """A span in the store, and where its blocks are."""

    span: Span  # in the memory of the store
    centre_FBP: np.ndarray  # mean position of each of its blocks


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SpanStore:
    """The packed spans of a history by number, outside of the cache; a value like the cache itself.

    Attributes:
        layout: of the caches that it serves.
        capacity: spans that it holds; then the oldest makes room.
        memory: "host" or "device".
        form: shapes and dtypes of one span.
        kept: the spans by number.
        next: number of the span that is compressed next.
        sight: number of the span in each slot of the cache; None for a slot that no kept span is in.
        newest: digest of the span that was compressed last, which tells a history from another; None
            before the first.
    """

    layout: Layout
    capacity: int
    memory: Literal["host", "device"]
    form: Span
    kept: Mapping[int, _Kept]
    next: int
    sight: tuple[int | None, ...]
    newest: int | None = None

    @classmethod
    def create(
        cls, cache: KVCache, *, spans: int, memory: Literal["host", "device"] = "host"
    ) -> "SpanStore":
        """An empty store for the spans of a cache.

        Args:
            cache: the cache, with overflow="drop" and at least one slot. Spans that it has in sight already
                are kept first, under the numbers behind those that made room.
            spans: most spans to keep; their memory is taken as they come.
            memory: "host" keeps them in the host's memory, pinned where the device knows that; "device"
                beside the cache.

        Raises:
            TypeError: what is no cache.
            ValueError: a cache without slots or that refuses blocks, an unknown memory, or one that
                does not hold so many spans.
            NotImplementedError: a cache that is spread over devices.
        """
        check_cache(cache)
        lay = cache.layout
        if not lay.max_spans or lay.overflow != "drop":
            raise ValueError(
                f"a cache with max_spans={lay.max_spans} and overflow={lay.overflow!r}: a store keeps "
                "what makes room; accepted: max_spans >= 1 and overflow='drop'"
            )
        if lay.plan is not None:
            raise NotImplementedError(
                f"plan {lay.plan.axis}={lay.plan.devices}: a store serves a cache on one device"
            )
        if isinstance(spans, bool) or not isinstance(spans, int) or spans < lay.max_spans:
            raise ValueError(
                f"spans={spans!r} is not accepted: give an integer >= max_spans={lay.max_spans}, the "
                "spans that the cache has in sight"
            )
        if memory not in ("host", "device"):
            raise ValueError(f"memory={memory!r} is not accepted: give 'host' or 'device'")
        form = jax.eval_shape(_taken, cache, jax.ShapeDtypeStruct((), jnp.int32))
        check_room(spans, _bytes(form), memory)
        return cls(
            layout=lay,
            capacity=spans,
            memory=memory,
            form=form,
            kept={},
            next=_oldest_in_sight(cache),
            sight=(None,) * lay.max_spans,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the spans that are kept."""
        return len(self.kept) * _bytes(self.form)

    def keep(self, cache: KVCache) -> "SpanStore":
        """The store with the spans that were compressed since the last time.

        Call it, or `recall`, at least once while so many spans are compressed as the cache has slots.

        Raises:
            ValueError: a cache of another layout, one that was cut back, or spans that made room before
                they were kept.
        """
        lay = self.layout
        if cache.layout != lay:
            pairs = ((f.name, getattr(lay, f.name), getattr(cache.layout, f.name)) for f in _FIELDS)
            differ = [f"{name}={has} and not {own}" for name, own, has in pairs if own != has]
            raise ValueError(f"the store serves caches of another layout: this one has {differ[0]}")
        counters = cache.encoded_blocks, cache.first_span, cache.num_spans
        encoded, first, held = (int(x) for x in jax.device_get(counters))
        made = encoded // lay.span_blocks
        if made < self.next:
            raise ValueError(
                f"the cache has compressed {made} spans and the store knows {self.next}: a cache that "
                "was reset or truncated needs a new store"
            )
        if made - self.next < held:  # the newest span that the store knows may be in its slot still
            slot = (first + held - 1 - (made - self.next)) % lay.max_spans
            known = self.sight[slot] == self.next - 1
            if known and self.newest != int(_digest_in(cache, np.int32(slot))):
                raise ValueError(
                    f"span {self.next - 1} of the cache is another than the store's: a cache that was reset "
                    "or truncated needs a new store"
                )
        if made == self.next:
            return self
        if made - self.next > held:
            raise ValueError(
                f"spans {self.next} to {made - held - 1} made room in the cache before they were kept; "
                f"keep at least every max_spans={lay.max_spans} spans"
            )
        kept, sight = dict(self.kept), list(self.sight)
        for number in range(self.next, made):
            slot = (first + held - (made - number)) % lay.max_spans
            span = _taken(cache, np.int32(slot))
            pos_BTP = np.asarray(span.pos)
            centre_FBP = pos_BTP.reshape(lay.batch, lay.span_blocks, -1, lay.pos_dims).mean(2)
            kept[number] = _Kept(in_memory(span, self.memory), centre_FBP.swapaxes(0, 1))
            sight[slot] = number
            kept.pop(number - self.capacity, None)
        newest = int(_digest(span))
        return dataclasses.replace(self, kept=kept, next=made, sight=tuple(sight), newest=newest)

    def nearest(
        self,
        positions_BTP: Float[Array | np.ndarray, "B T P"],
        count: int,
        components: Sequence[int] | None = None,
    ) -> tuple[int, ...]:
        """Numbers of the kept spans that come closest to a block, by position; at most `count`.

        The distance of a span is that of its closest block, between mean positions, as a mean over the
        batch. Of equal ones the newer are taken.

        Args:
            positions_BTP: of the block that is to read.
            count: how many.
            components: of the positions that say where a token is; None is all but the first, time, or
                that one if it is alone.

        Raises:
            ValueError: positions of another shape or not finite, a count below 1, an unknown component.
        """
        dims = self.layout.pos_dims
        axes = list(range(min(1, dims - 1), dims)) if components is None else list(components)
        here = np.asarray(positions_BTP, np.float32)
        if here.ndim != 3 or (here.shape[0], here.shape[2]) != (self.layout.batch, dims):
            want = f"({self.layout.batch}, T, {dims})"
            raise ValueError(f"positions have shape {here.shape}; accepted: {want} (B, T, P)")
        if not np.isfinite(here).all():
            raise ValueError("positions have NaN or Inf; accepted: finite numbers")
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"count={count!r} is not accepted: give an integer above 0")
        if not axes or not set(axes) <= set(range(dims)):
            raise ValueError(f"components={axes} are not accepted: give some of 0 to {dims - 1}")
        here_BP = here.mean(1)[:, axes]
        numbers = sorted(self.kept, reverse=True)
        if not numbers:
            return ()
        centre_NFBP = np.stack([self.kept[i].centre_FBP[..., axes] for i in numbers])
        away_N = np.linalg.norm(centre_NFBP - here_BP, axis=-1).min(1).mean(-1)
        return tuple(sorted(numbers[i] for i in np.argsort(away_N, kind="stable")[:count]))

    def fetch(self, ids: Sequence[int]) -> dict[int, Span]:
        """Kept spans on their way to the device, those in sight left out; for `recall` to take up later.

        Copies run beside what the device computes. So ask before a block for what the next one may need.
        """
        return {i: in_memory(self.span(i), "device") for i in ids if i not in self.sight}

    def span(self, number: int) -> Span:
        """A kept span, in the memory of the store.

        Raises:
            ValueError: it is not kept, or no longer.
        """
        if number in self.kept:
            return self.kept[number].span
        oldest = min(self.kept, default=None)
        if oldest is None:
            raise ValueError(f"span {number} is not kept: the store is empty")
        gone = f"; the store holds capacity={self.capacity}, and it made room" * (number < oldest)
        raise ValueError(f"span {number} is not kept; accepted: {oldest} to {self.next - 1}{gone}")

    def to_saved(self) -> dict[str, Any]:
        """The arrays of the store by name, for any saver; save the cache beside it."""
        counts = dict(next=self.next, sight=[-1 if i is None else i for i in self.sight])
        saved: dict[str, Any] = {name: np.asarray(x, np.int64) for name, x in counts.items()}
        for number, one in self.kept.items():
            for path, x in jax.tree_util.tree_leaves_with_path(one):
                saved[f"{number}{jax.tree_util.keystr(path)}"] = np.asarray(x)
        return saved

    def from_saved(self, saved: Mapping[str, Any]) -> "SpanStore":
        """The store that `to_saved` gave away, in the memory and layout of this empty one.

        Raises:
            ValueError: an array is missing or of another shape or dtype.
        """
        for name in ("next", "sight"):
            if name not in saved:
                raise ValueError(f"saved has no {name!r}: accepted is what `to_saved` returns")
        lay = self.layout
        centre = jax.ShapeDtypeStruct((lay.span_blocks, lay.batch, lay.pos_dims), np.float32)
        leaves, tree = jax.tree_util.tree_flatten_with_path(_Kept(self.form, centre))
        kept = {}
        for number in sorted({int(name.partition(".")[0]) for name in saved if "." in name}):
            found = []
            for path, want in leaves:
                name = f"{number}{jax.tree_util.keystr(path)}"
                got = saved.get(name)
                if got is None or (got.shape, got.dtype) != (want.shape, want.dtype):
                    has = "is missing" if got is None else f"has {got.shape} {got.dtype}"
                    raise ValueError(f"saved: {name} {has}; accepted: {want.shape} {want.dtype}")
                found.append(np.asarray(got))
            one = jax.tree.unflatten(tree, found)
            kept[number] = one._replace(span=in_memory(one.span, self.memory))
        following, sight = int(saved["next"]), [int(i) for i in np.asarray(saved["sight"]).ravel()]
        wanted = [*range(following - len(kept), following)]
        if [*kept] != wanted or len(kept) > self.capacity:
            raise ValueError(
                f"saved has the spans {[*kept]} before next={following}; accepted: the ones right before "
                f"it, at most capacity={self.capacity}"
            )
        if len(sight) != lay.max_spans or not {i for i in sight if i >= 0} <= set(kept):
            raise ValueError(
                f"saved: sight={sight}; accepted: a kept span or -1 for each of {lay.max_spans} slots"
            )
        return dataclasses.replace(
            self,
            kept=kept,
            next=following,
            sight=tuple(None if i < 0 else i for i in sight),
            newest=int(_digest(in_memory(kept[following - 1].span, "device"))) if kept else None,
        )


def _oldest_in_sight(cache: KVCache) -> int:
    """Number of the oldest span in a cache that nothing was recalled into; 0 for shapes alone."""
    if not isinstance(cache.num_spans, jax.Array):
        return 0
    return int(cache.encoded_blocks // cache.layout.span_blocks - cache.num_spans)


def _bytes(form: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(form))


@jax.jit
def _digest(span: Span) -> Array:
    """A number that two spans have in common only if their codes are the same, as good as surely."""

    def of(x: Array) -> Array:
        x = x.ravel()
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.arange(bits.size, dtype=jnp.uint32)
        return jnp.sum((bits + 1) * (2 * place + 1) * jnp.uint32(2654435761), dtype=jnp.uint32)

    return sum(map(of, jax.tree.leaves((span.k, span.v))), jnp.uint32(0))


@jax.jit
def _taken(cache: KVCache, slot: Array) -> Span:
    """The span in a slot."""
    of = lambda tree, axis: jax.tree.map(  # noqa: E731
        lambda x: lax.dynamic_index_in_dim(x, slot, axis, False), tree
    )
    packed = (of(x, 1) for x in (cache.span_k, cache.span_v))
    return Span(*packed, *(of(x, 0) for x in (cache.span_pos, cache.span_valid, cache.span_table)))


@jax.jit
def _digest_in(cache: KVCache, slot: Array) -> Array:
    """The digest of the span in a slot, of which no copy is made."""
    return _digest(_taken(cache, slot))
