"""LoRA files of LongCat-Video, merged into the weights they change.

A LoRA adds multiplier x scale x U D to a matrix W, with U and D of low rank r. Matrices that hold g
projections side by side (query, key and value: g = 3) have one pair for each, D stacked along its
rows and U in g blocks, and pair j changes the j-th part of the output.
"""

import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.common.checkpoint import CheckpointError, checkpoint_files
from models.longcat.modeling import LongCatDiT
from models.longcat.params import RULES
from qvg_jax.errors import UserError
from qvg_jax.reading.tensors import opened, read_tensor

_HYPHEN = "___lorahyphen___"
_SUFFIX = re.compile(
    r"(.+)\.(?:(lora_down)\.weight|lora_up(?:\.blocks\.(\d+))?\.weight|alpha_scale)"
)


class _Pairs(NamedTuple):
    """The g pairs of one stored matrix, and the file's own scale folded into U."""

    down: np.ndarray  # [g, r, in] float32
    up: np.ndarray  # [g, r, out / g] float32


def merge_lora(
    model: LongCatDiT,
    source: str | Path | Iterable[str | Path],
    *,
    multiplier: float = 1.0,
    rank: int | None = None,
) -> LongCatDiT:
    """W <- W + multiplier alpha_scale concat_j(U_j D_j), in float32, rounded once.

    Args:
        model: the transformer. Its changed matrices are donated: use the returned model from here
            on. A second call with the negative multiplier takes the LoRA out again, to rounding.
        source: safetensors with the released key pattern
            (`lora___lorahyphen___blocks___lorahyphen___0...lora_down.weight`).
        multiplier: strength.
        rank: what r must be; None takes any r that is the same in the whole file.

    Returns:
        The model with the LoRA in it.

    Raises:
        CheckpointError: everything that does not fit, in one message: names the model does not
            have, missing parts, layers or blocks, wrong shapes, ranks that differ or are not
            `rank`. No weight has been changed then.
    """
    graphdef, state = nnx.split(model)
    flat = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
    errors: list[str] = []
    found: dict[str, dict[int | None, _Pairs]] = {}
    for module, parts in _modules(checkpoint_files(source), errors).items():
        target = _target(module, flat)
        if target is None:
            errors.append(f"unused: {module}, the model has no such matrix")
            continue
        path, row = target
        shape = flat[path].shape[row is not None :]
        pairs = _pairs(module, parts, shape, errors)
        if pairs is not None:
            found.setdefault(path, {})[row] = pairs
    ranks = sorted({p.down.shape[1] for rows in found.values() for p in rows.values()})
    if rank is not None and ranks not in ([], [rank]):
        errors.append(f"rank: the file has rank {', '.join(map(str, ranks))}, asked for is {rank}")
    elif len(ranks) > 1:
        errors.append(f"rank: the file has several, {', '.join(map(str, ranks))}")
    for path, rows in found.items():
        layers = () if None in rows else range(flat[path].shape[0])
        errors += [f"missing: {path}[{i}]" for i in layers if i not in rows]
        if len({p.down.shape for p in rows.values()}) > 1 and len(ranks) < 2:
            errors.append(f"misshapen: {path} has other groups in some layers")
    if not found and not errors:
        errors.append("the file holds no LoRA")
    if errors:
        raise CheckpointError("\n  ".join([f"{len(errors)} problems with {source}:", *errors]))
    for path, rows in found.items():
        order = sorted(rows) if None not in rows else [None]
        down_Lgri, up_Lgro = (np.stack([rows[i][n] for i in order]) for n in (0, 1))
        kernel = flat[path][...]
        stacked = kernel if None not in rows else kernel[None]
        merged = _add(stacked, down_Lgri, up_Lgro, np.float32(multiplier))
        flat[path] = flat[path].replace(merged.reshape(kernel.shape))
    filled = [(path, flat[".".join(map(str, path))]) for path, _ in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@functools.partial(jax.jit, donate_argnames="kernel_Lio")
def _add(
    kernel_Lio: Float[Array, "L i ..."],
    down_Lgri: Float[Array, "L g r i"],
    up_Lgro: Float[Array, "L g r o_g"],
    multiplier: Float[Array, ""],
) -> Float[Array, "L i ..."]:
    """Adds the products to all layers of one stacked matrix, one after the other, in place."""

    def one_layer(layer, kernel_Lio):
        pairs = (down_Lgri[layer], up_Lgro[layer])
        exact = jax.lax.Precision.HIGHEST
        delta_io = jnp.einsum("gri,gro->igo", *pairs, precision=exact).reshape(kernel_Lio.shape[1:])
        row = kernel_Lio[layer].astype(jnp.float32) + multiplier * delta_io
        return kernel_Lio.at[layer].set(row.astype(kernel_Lio.dtype))

    return jax.lax.fori_loop(0, kernel_Lio.shape[0], one_layer, kernel_Lio)


def _modules(files: Iterable[Path], errors: list[str]) -> dict[str, dict[str | int, np.ndarray]]:
    """The tensors of each module: keys "down", "scale", and the numbers of the blocks of U."""
    modules: dict[str, dict[str | int, np.ndarray]] = {}
    for file in files:
        try:
            with opened(file) as f:
                tensors = {name: read_tensor(f, name, file) for name in f.keys()}  # noqa: SIM118
        except UserError as e:
            raise CheckpointError(str(e)) from e
        for name, x in tensors.items():
            parts = _SUFFIX.fullmatch(name)
            prefix, _, module = (parts[1] if parts else "").partition(_HYPHEN)
            if not parts or prefix != "lora" or not module:
                errors.append(f"unused: {name}, not a name of a LoRA's part")
                continue
            if not np.isfinite(x).all():
                errors.append(f"{name} has NaN or Inf; accepted: finite values")
            if name.endswith("alpha_scale"):
                part: str | int = "scale"
            else:
                part = "down" if parts[2] else int(parts[3] or 0)
            modules.setdefault(module.replace(_HYPHEN, "."), {})[part] = x
    return modules


def _target(module: str, flat: dict) -> tuple[str, int | None] | None:
    """Our path and row of a stored matrix, by the table that loads the model itself."""
    for rule in RULES:
        if match := re.fullmatch(rule.pattern, module + ".weight"):
            path = match.expand(rule.path)
            row = None if rule.layer is None else int(match[rule.layer])
            fits = path.endswith(".kernel") and (row is None or row < flat[path].shape[0])
            return (path, row) if fits else None
    return None


def _pairs(module: str, parts: dict, shape: tuple[int, ...], errors: list[str]) -> _Pairs | None:
    """Checks one module against its matrix [in, out] and splits it into pairs."""
    blocks = sorted(k for k in parts if isinstance(k, int))
    absent = [k for k in ("down", "scale") if k not in parts]
    if absent or blocks != list(range(len(blocks))) or not blocks:
        errors.append(f"missing: parts of {module}; it has {sorted(map(str, parts))}")
        return None
    down, ups, g = parts["down"], [parts[j] for j in blocks], len(blocks)
    n_in, n_out = shape[0], math.prod(shape[1:])
    r = down.shape[0] // g if down.ndim == 2 else 0
    fits = down.shape == (g * r, n_in) and r and n_out % g == 0
    if not fits or any(u.shape != (n_out // g, r) for u in ups) or parts["scale"].size != 1:
        errors.append(
            f"misshapen: {module} has down {list(down.shape)}, up {[list(u.shape) for u in ups]}; "
            f"a rank r needs down [{g} r, {n_in}], up {g} x [{n_out // g}, r]"
        )
        return None
    scale = np.float32(parts["scale"].reshape(()))
    up = np.stack([scale * u.astype(np.float32).T for u in ups])
    return _Pairs(down.astype(np.float32).reshape(g, r, n_in), up)
