"""A plan says over how many devices a cache is spread, and along which axis: heads, spans, or a ring of spans.

    plan = Plan(spans=4)                  # or Plan(heads=4), Plan(ring=4)
    cache = KVCache.create(..., sharding=plan)

`heads`: each device has some of the key-value heads. `spans`: each device has every n-th compressed span
and, of each block of sink and window, every n-th part of the tokens. `ring`: each device has every n-th
span and all of sink and window; packed spans travel from device to device during attention.
"""

import dataclasses
import functools
from numbers import Integral
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from qvg_jax.cache.layer_codecs import LayerCodecs

if TYPE_CHECKING:
    from qvg_jax.cache.layout import Layout

__all__ = ["AXES", "Part", "Plan", "fits_memory"]

AXES = ("heads", "spans", "ring")


@dataclasses.dataclass(frozen=True)
class Part:
    """The share of one device in a spread cache; static in the layout of that device's arrays.

    Attributes:
        axis: name of the mesh axis.
        devices: their number; device d has the spans d, d + devices, d + 2 devices, ...
        splits_blocks: whether a device has only 1 / devices of the tokens of each uncompressed block.
    """

    axis: str
    devices: int
    splits_blocks: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which axis of a cache is divided over how many devices; hashable, like a layout.

    Attributes:
        heads: devices that divide the key-value heads. Attention communicates nothing where queries
            come with their heads apart; where they come with their tokens apart
            (`split_tokens`) one all-to-all brings heads together, and one takes them back.
        spans: devices that divide the compressed spans and the tokens of uncompressed blocks. Each
            attends to its own; outputs are merged by their log-sum-exp. No K or V moves in attention;
            `compress` gathers the one span that it encodes.
        ring: devices that divide the spans and the queries. Packed spans go around.
        split_tokens: whether models keep the tokens of a new block apart on the devices, so that the
            output of attention is wanted in parts too. A ring always does.

    Raises:
        ValueError: a number below 1, or two axes of more than one device.
    """

    heads: int = 1
    spans: int = 1
    ring: int = 1
    split_tokens: bool = False

    def __post_init__(self):
        for name in AXES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"plan {name}={value!r} is not accepted: give an integer >= 1")
        several = [f"{name}={getattr(self, name)}" for name in AXES if getattr(self, name) > 1]
        if len(several) > 1:
            raise ValueError(
                f"plan {' and '.join(several)}: accepted is one axis of more than one device"
            )
        if self.ring > 1:
            object.__setattr__(self, "split_tokens", True)

    @property
    def axis(self) -> str:
        """Name of the axis that is divided, which is that of the mesh's axis too."""
        return next((name for name in AXES if getattr(self, name) > 1), "heads")

    @property
    def devices(self) -> int:
        """Devices that share the cache."""
        return getattr(self, self.axis)

    @property
    def mesh(self) -> Mesh | AbstractMesh:
        """The mesh that is set, if it has the plan's axis, else one of the first devices.

        Raises:
            ValueError: fewer devices than the plan asks for.
        """
        here = jax.sharding.get_abstract_mesh()
        if here.shape.get(self.axis) == self.devices:
            return here
        return _mesh(self.axis, self.devices)

    @property
    def part(self) -> Part | None:
        """What one device has of spans and blocks; None where heads are divided."""
        if self.axis == "heads":
            return None
        return Part(self.axis, self.devices, self.axis == "spans")

    def check(self, lay: "Layout") -> None:
        """Raises ValueError or NotImplementedError if a cache of this layout cannot be spread so."""
        n, where = self.devices, f"plan {self.axis}={self.devices}"
        if lay.history is not None and self.axis != "spans":
            raise NotImplementedError(
                f"{where}: heads of the cache differ in their history, so layers do in what they "
                "store; accepted: plan spans, or history=None"
            )
        if self.axis == "heads":
            if lay.heads % n:
                raise ValueError(f"{where} does not divide heads={lay.heads}: give a divisor of it")
            return
        if lay.max_spans % n:
            raise ValueError(
                f"{where} does not divide max_spans={lay.max_spans}: give a multiple of {n} slots"
            )
        if self.axis == "spans" and lay.block_tokens % n:
            raise ValueError(
                f"{where} does not divide block_tokens={lay.block_tokens}: accepted are its divisors"
            )
        if self.axis == "spans" and lay.blocks != "whole":
            raise ValueError(
                f"{where} with blocks={lay.blocks!r}: a block is divided over the devices; accepted: "
                "blocks='whole', or another plan"
            )
        if self.axis == "ring" and any(
            isinstance(c, LayerCodecs) for c in (lay.key_codec, lay.value_codec)
        ):
            raise NotImplementedError(
                f"{where}: codecs differ by layer, and a ring sends the spans of one layer at a time; "
                "accepted: one codec for all layers, or plan spans"
            )


@functools.cache
def _mesh(axis: str, devices: int) -> Mesh:
    there = jax.devices()
    if len(there) < devices:
        raise ValueError(
            f"plan {axis}={devices}: there are {len(there)} devices; give at most that"
        )
    return Mesh(np.asarray(there[:devices]), (axis,), axis_types=(AxisType.Auto,))


def fits_memory(plan: Plan, share: int, limit: int | None) -> None:
    """Raises ValueError if one device's share of a cache takes more bytes than it has.

    Args:
        plan: named in the error.
        share: bytes of the cache on one device.
        limit: bytes of a device; None for unknown, which accepts everything.
    """
    if limit is not None and share > limit:
        raise ValueError(
            f"plan {plan.axis}={plan.devices}: the cache takes {share / 1e9:.3g} GB of each device, which "
            f"has {limit / 1e9:.3g} GB; give more devices, fewer slots (max_spans) or a smaller window"
        )
