"""LoRA files merged into the weights they change, whoever named their tensors.

A LoRA adds multiplier x scale x U D to a matrix W, with U and D of low rank r. The pairs are found by
the table that loads the model itself, and read as

| naming | D | U | scale |
|---|---|---|---|
| peft | `base_model.model.blocks.0.attn.q.lora_A.weight` | `.lora_B.weight` | alpha / r |
| diffusers | `transformer.blocks.0.attn.q.lora_A.weight`, `.lora.down.weight` | `.lora_B.`, `.lora.up.` | alpha / r |
| kohya | `lora_unet_blocks_0_attn_q.lora_down.weight` | `.lora_up.weight` | alpha / r |
| LongCat's | `lora___lorahyphen___blocks...lora_down.weight` | `.lora_up.blocks.j.weight` | alpha_scale |

with alpha from the file, else from the caller, else r. In LongCat's files matrices that hold g
projections side by side (query, key and value: g = 3) have one pair for each, D stacked along its
rows and U in g blocks, and pair j changes the j-th part of the output.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.common.checkpoint import CheckpointError, Rule, checkpoint_files
from qvg_jax.errors import UserError
from qvg_jax.reading.tensors import opened, read_tensor

_HYPHEN = "___lorahyphen___"
_DOWN = re.compile(r"(.+)\.(?:lora_down|lora_A|lora\.down)(?:\.\w+)?\.weight")
_UP = re.compile(r"(.+)\.(?:lora_up|lora_B|lora\.up)(?:\.blocks\.(\d+)|\.\w+)?\.weight")
_SCALE = re.compile(r"(.+)\.(alpha_scale|alpha)")
# What trainers put in front of a module's name, several of them too, and anywhere in it.
_FRONT = (
    "base_model.", "model.", "transformer.", "diffusion_model.", "unet.", "module.", "generator.",
    "lora_unet_", "lora_transformer_",
)  # fmt: skip
_ANYWHERE = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class _Pairs(NamedTuple):
    """The g pairs of one stored matrix, and the file's own scale folded into U."""

    down: np.ndarray  # [g, r, in] float32
    up: np.ndarray  # [g, r, out / g] float32


def merge_lora[M: nnx.Module](
    model: M,
    source: str | Path | Iterable[str | Path],
    rules: Sequence[Rule],
    *,
    multiplier: float = 1.0,
    rank: int | None = None,
    alpha: float | None = None,
) -> M:
    """W <- W + multiplier scale concat_j(U_j D_j), in float32, rounded once.

    Args:
        model: the transformer. Its changed matrices are donated: use the returned model from here
            on. A second call with the negative multiplier takes the LoRA out again, to rounding.
        source: safetensors in one of the namings above.
        rules: the table of names that loads the model.
        multiplier: strength.
        rank: what r must be; None takes any r that is the same in the whole file.
        alpha: what a file without one was trained with; None is r.

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
        target = _target(module, flat, rules)
        if target is None:
            errors.append(f"unused: {module}, the model has no such matrix")
            continue
        path, row = target
        shape = flat[path].shape[row is not None :]
        pairs = _pairs(module, parts, shape, alpha, errors)
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
    """The tensors of each module: keys "down", "scale", "alpha", and the numbers of blocks of U."""
    modules: dict[str, dict[str | int, np.ndarray]] = {}
    for file in files:
        try:
            with opened(file) as f:
                # A tensor with NaN or Inf is an error of `read_tensor`.
                tensors = {name: read_tensor(f, name, file) for name in f.keys()}  # noqa: SIM118
        except UserError as e:
            raise CheckpointError(str(e)) from e
        for name, x in tensors.items():
            module, part = _part(name)
            if not module:
                errors.append(f"unused: {name}, not a name of a LoRA's part")
                continue
            if _HYPHEN in module:  # LongCat's files always have a scale; an empty one is missing
                module = module.replace(_HYPHEN, ".").removeprefix("lora.")
                modules.setdefault(module, {"scale": np.empty(0)})
            modules.setdefault(module, {})[part] = x
    return modules


def _part(name: str) -> tuple[str, str | int]:
    """The module of a stored tensor, "" if there is none, and what of its pairs the tensor is."""
    if match := _DOWN.fullmatch(name):
        part: str | int = "down"
    elif match := _UP.fullmatch(name):
        part = int(match[2] or 0)
    elif match := _SCALE.fullmatch(name):
        part = "scale" if match[2] == "alpha_scale" else "alpha"
    return (match[1], part) if match else ("", "")


def _target(module: str, flat: dict, rules: Sequence[Rule]) -> tuple[str, int | None] | None:
    """Our path and row of a stored matrix, by the table that loads the model itself."""
    for name in _bare(module):
        for rule in rules:
            # kohya's names have underscores where the others have dots.
            for pattern, end in ((rule.pattern, ".weight"), (_underscored(rule), "_weight")):
                if match := re.fullmatch(pattern, name + end):
                    path = match.expand(rule.path)
                    row = None if rule.layer is None else int(match[rule.layer])
                    fits = path.endswith(".kernel") and path in flat
                    fits = fits and (row is None or row < flat[path].shape[0])
                    return (path, row) if fits else None
    return None


def _underscored(rule: Rule) -> str:
    return rule.pattern.replace(r"\.", "_")


def _bare(module: str) -> Iterator[str]:
    """The name of a module, then without what wrappers put in front, one after the other."""
    for part in _ANYWHERE:
        module = module.replace(part, "")
    yield module
    while front := next((f for f in _FRONT if module.startswith(f)), None):
        module = module.removeprefix(front)
        yield module


def _pairs(
    module: str,
    parts: dict[str | int, np.ndarray],
    shape: tuple[int, ...],
    alpha: float | None,
    errors: list[str],
) -> _Pairs | None:
    """Checks one module against its matrix [in, out] and splits it into pairs."""
    blocks = sorted(k for k in parts if isinstance(k, int))
    absent = [k for k in ("down",) if k not in parts]
    if "scale" in parts and not parts["scale"].size:
        absent.append("scale")
        parts = {k: x for k, x in parts.items() if k != "scale"}
    if absent or blocks != list(range(len(blocks))) or not blocks:
        errors.append(f"missing: parts of {module}; it has {sorted(map(str, parts))}")
        return None
    down, ups, g = parts["down"], [parts[j] for j in blocks], len(blocks)
    n_in, n_out = shape[0], math.prod(shape[1:])
    r = down.shape[0] // g if down.ndim == 2 else 0
    fits = down.shape == (g * r, n_in) and r and n_out % g == 0
    scales = [parts[k] for k in ("scale", "alpha") if k in parts]
    if not fits or any(u.shape != (n_out // g, r) for u in ups) or any(s.size != 1 for s in scales):
        errors.append(
            f"misshapen: {module} has down {list(down.shape)}, up {[list(u.shape) for u in ups]}; "
            f"a rank r needs down [{g} r, {n_in}], up {g} x [{n_out // g}, r]"
        )
        return None
    if "scale" in parts:
        scale = np.float32(parts["scale"].reshape(()))
    elif "alpha" in parts:
        scale = np.float32(parts["alpha"].reshape(())) / np.float32(r)
    else:
        scale = np.float32(1.0 if alpha is None else alpha / r)
    up = np.stack([scale * u.astype(np.float32).T for u in ups])
    return _Pairs(down.astype(np.float32).reshape(g, r, n_in), up)
