"""LongCat on several devices: each has some of the heads and of the hidden channels.

    mesh = heads_mesh(config, jax.devices())
    model = load_dit(folder, config, device=placement(mesh))
    with jax.set_mesh(mesh): ...                       # LongCat(model, mesh=mesh) does it

Matrices into heads and hidden channels are cut along their outputs, matrices out of them along
their inputs, so a layer adds up partial results three times and communicates nothing else. The
residual stream, norms and small matrices are on every device. Heads never meet in attention: the
condition cache lies with its heads (`qvg_jax.sharding`), and is built, compressed and read there.
"""

import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array

from models.longcat.config import LongCatConfig

AXIS = "heads"

# Parameter -> its axis, counted from the end, that is cut; all others are whole on each device.
_CUT = (
    (r"blocks\.(self_attn\.qkv|cross_attn\.(q|kv)|ffn\.(gate|up))\.(kernel|bias)", 1),
    (r"text\.up\.(kernel|bias)", 1),
    (r"blocks\.((self|cross)_attn\.out|ffn\.down|modulation)\.kernel", 2),
    (r"text\.down\.kernel", 2),
)


def heads_mesh(config: LongCatConfig, devices: Sequence[jax.Device]) -> Mesh | None:
    """A mesh of all devices; None for a single one.

    Raises:
        ValueError: their number divides the heads or the hidden channels not.
    """
    n = len(devices)
    check_division(config, n)
    if n == 1:
        return None
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def check_division(config: LongCatConfig, n: int) -> None:
    """Raises ValueError if n devices do not divide the heads or the hidden channels."""
    if config.heads % n or config.ffn_width % n:
        raise ValueError(
            f"{n} devices do not divide heads={config.heads} and ffn_width={config.ffn_width}"
        )


def share_bytes(model: nnx.Module, n: int) -> int:
    """Bytes of parameters that one of n devices has; shapes are enough."""
    total = 0
    for path, v in nnx.to_flat_state(nnx.state(model)):
        at = _cut_axis(".".join(map(str, path)), v.shape)
        size = v.size * v.dtype.itemsize
        total += size if at is None or v.shape[at] % n else size // n
    return total


def _cut_axis(path: str, shape: tuple[int, ...]) -> int | None:
    """The axis along which a parameter is cut; None for one that is whole on each device."""
    return next((len(shape) - n for pattern, n in _CUT if re.fullmatch(pattern, path)), None)


def placement(mesh: Mesh | None) -> Callable[[str, tuple[int, ...]], NamedSharding] | None:
    """Where a parameter goes, by its dotted path and shape; None without a mesh."""
    if mesh is None:
        return None

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        at = _cut_axis(path, shape)
        if at is None or shape[at] % mesh.shape[AXIS]:
            return NamedSharding(mesh, jax.P())
        return NamedSharding(mesh, jax.P(*(None,) * at, AXIS))

    return place


def spread(model: nnx.Module, mesh: Mesh) -> nnx.Module:
    """The model with its parameters on all devices of a mesh."""
    graphdef, state = nnx.split(model)
    place = placement(mesh)
    moved = [
        (path, v.replace(jax.device_put(v[...], place(".".join(map(str, path)), v.shape))))
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(moved))


def spread_out() -> bool:
    """Whether the program that is being traced runs on such a mesh."""
    return devices() > 1


def devices() -> int:
    """How many devices share the heads in the program that is being traced."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def whole(x: Array) -> Array:
    """Says that an array is to be complete on each device; nothing without a mesh."""
    return jax.lax.with_sharding_constraint(x, jax.P()) if spread_out() else x


def by_heads(attention: Callable[..., Array], *qkv_BTHD: Array) -> Array:
    """attention(q, k, v), by each device for its own heads."""
    if not spread_out():
        return attention(*qkv_BTHD)
    apart = jax.P(None, None, AXIS)
    specs = dict(in_specs=(apart,) * len(qkv_BTHD), out_specs=apart)
    return jax.shard_map(attention, **specs, check_vma=False)(*qkv_BTHD)
