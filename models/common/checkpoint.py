r"""Safetensors checkpoints into abstract `nnx` skeletons, by a table of rules.

A model's `params.py` is a table of `Rule`s: regex on the stored name, our path, layout change.

    RULES = (
        Rule(r"head\.weight", "head.kernel", linear_kernel),
        Rule(r"blocks\.(\d+)\.attn\.q\.weight", "blocks.q.kernel", linear_kernel, layer=1),
    )
    model = load(nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0))), files, RULES)

The headers of all files are checked against the skeleton before any tensor is read: a wrong or
partial checkpoint fails at once, with every missing, unused and misshapen name in one error. Then
parameters are read one by one, cast to the skeleton's dtype and put on the device, so that host
memory holds one parameter at a time and no random weights are ever made.

Names may have what trainers and compilers wrap around a network (`wrappers`).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from models.common.wrappers import common_prefix, unwrapped
from qvg_jax.errors import UserError, printable
from qvg_jax.reading.tensors import opened, read_tensor

type Placed = jax.Device | jax.sharding.Sharding | None
type Device = Placed | Callable[[str, tuple[int, ...]], Placed]

_FLOATS = {"F64", "F32", "F16", "BF16"}
_QUANTIZED = dict.fromkeys(("F8_E4M3", "F8_E5M2"), " (fp8, whose scales are stored elsewhere)")


class CheckpointError(UserError):
    """A checkpoint that does not fit the model; the message lists everything that is wrong."""


def as_stored(x: np.ndarray) -> np.ndarray:
    """Keeps the stored layout."""
    return x


def vector(x: np.ndarray) -> np.ndarray:
    """`[C, 1, ..., 1]` to `[C]`; leaves any other shape alone, for the shape check to report."""
    return x.reshape(x.shape[:1]) if all(n == 1 for n in x.shape[1:]) else x


def linear_kernel(x: np.ndarray) -> np.ndarray:
    """`[out, in]` to `[in, out]`."""
    return np.moveaxis(x, 0, -1)


def conv_kernel(x: np.ndarray) -> np.ndarray:
    """`[out, in, *window]` to `[*window, in, out]`."""
    return np.moveaxis(x, (1, 0), (-2, -1))


def patch_kernel(x: np.ndarray) -> np.ndarray:
    """The kernel of a convolution whose stride is its window, as a matrix for flattened patches.

    `[out, in, *window]` becomes `[in * window, out]`: the channel is the slowest axis of a patch.
    """
    return np.moveaxis(x, 0, -1).reshape(-1, x.shape[0])


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Where one family of stored tensors goes.

    Args:
        pattern: regular expression that must match the whole stored name.
        path: dotted path of our parameter, a template for `re.Match.expand` (`\1`, `\g<name>`).
        layout: function from the stored numpy array to our layout; views only, it also runs on
            stand-ins without data to check shapes.
        layer: number of the regex group with the row of a stacked parameter (leading axis L) that
            the tensor fills; None for a parameter stored whole.
        alias: the tensor may be stored under several names (tied weights); the first one counts.
    """

    pattern: str
    path: str
    layout: Callable[[np.ndarray], np.ndarray] = as_stored
    layer: int | None = None
    alias: bool = False


class _Target(NamedTuple):
    """Where one stored tensor goes: its rule, our path, and the row of a stacked parameter."""

    rule: Rule
    path: str
    row: int | None


@dataclasses.dataclass(frozen=True)
class _Source:
    file: Path
    name: str
    rule: Rule


def checkpoint_files(source: str | Path | Iterable[str | Path]) -> tuple[Path, ...]:
    """Lists the safetensors files of a checkpoint: a file, a folder (all its shards), or several.

    Raises:
        CheckpointError: a path does not exist, a folder holds no safetensors file, or a file is of
            another kind.
    """
    paths = [source] if isinstance(source, str | Path) else list(source)
    files = []
    for path in map(Path, paths):
        found = _without_variants(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found or not all(f.is_file() for f in found):
            raise CheckpointError(f"{path}: no such file, or a folder without *.safetensors")
        files += found
    for file in files:
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file}: expected a .safetensors file; `qvg convert` makes one from .pt and .pth"
            )
    if not files:
        raise CheckpointError("no checkpoint files given")
    return tuple(files)


def _without_variants(files: Iterable[Path]) -> list[Path]:
    """The files of a folder, sorted, without `x.fp16.safetensors` where there is `x.safetensors`."""
    files = sorted(files)
    plain = {f.name for f in files}

    def is_variant(name: str) -> bool:
        stem, dot, _ = name.removesuffix(".safetensors").rpartition(".")
        return bool(dot) and f"{stem}.safetensors" in plain

    return [f for f in files if not is_variant(f.name)]


def load[M: nnx.Module](
    skeleton: M,
    source: str | Path | Iterable[str | Path],
    rules: Sequence[Rule],
    *,
    rename: Callable[[str], str] = str,
    ignore: Sequence[str] = (),
    device: Device = None,
) -> M:
    """Fills an abstract module from safetensors files.

    Args:
        skeleton: module from `nnx.eval_shape`; its shapes are checked, its dtypes are cast to.
        source: a `.safetensors` file, a folder of shards, or several of either.
        rules: table from stored names to paths in `skeleton`; the first matching rule is used.
        rename: applied to each stored name before matching, e.g. to strip a wrapper's prefix.
        ignore: regular expressions of whole (renamed) names to leave out on purpose.
        device: device or sharding of the parameters, or a function of a parameter's dotted path and
            shape that gives one; default: JAX's default device.

    Returns:
        The module with real arrays.

    Raises:
        CheckpointError: any name missing, unused, doubly stored, misshapen or not floating-point;
            all of them in one message. No tensor has been read then. Also a tensor with NaN or Inf,
            when it is read.
    """
    graphdef, state = nnx.split(skeleton)
    plan, wanted = _checked(state, source, rules, rename, ignore)
    place = device if callable(device) else lambda path, shape: device
    arrays = {
        path: jax.device_put(_read(plan[path], v), place(path, v.shape))
        for path, v in wanted.items()
    }
    filled = [
        (path, v.replace(arrays[".".join(map(str, path))])) for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def check(
    skeleton: nnx.Module,
    source: str | Path | Iterable[str | Path],
    rules: Sequence[Rule],
    *,
    rename: Callable[[str], str] = str,
    ignore: Sequence[str] = (),
) -> None:
    """What `load` checks, without loading: for files that are wanted later in a long run.

    Raises:
        CheckpointError: as `load`.
    """
    _checked(nnx.split(skeleton)[1], source, rules, rename, ignore)


def _checked(state, source, rules, rename, ignore):
    """The plan to read by and the variables wanted, or an error that lists all that is wrong."""
    wanted = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
    plan, errors = _plan(wanted, checkpoint_files(source), rules, rename, ignore)
    if errors:
        lines = [f"{len(errors)} problems with {_shown(source)}:", *sorted(errors)]
        raise CheckpointError("\n  ".join(lines))
    return plan, wanted


def _plan(wanted, files, rules, rename, ignore):
    """Maps each of our paths to its source tensors (`{row or None: source}`), and lists errors."""
    plan: dict[str, dict[int | None, _Source]] = {path: {} for path in wanted}
    errors, unused = [], []

    def target(stored: str) -> _Target | str | None:
        """Where a stored tensor goes; a string that says why nowhere; None to leave it out."""
        name = rename(stored)
        if any(re.fullmatch(p, name) for p in ignore):
            return None
        hit = next(((r, m) for r in rules if (m := re.fullmatch(r.pattern, name))), None)
        if hit is None:
            return ""
        rule, match = hit
        path = match.expand(rule.path)
        row = None if rule.layer is None else int(match[rule.layer])
        if path not in wanted or (row is not None and row >= wanted[path].shape[0]):
            return f", the model has no {_at(path, row)}"
        return _Target(rule, path, row)

    for file in files:
        for stored, shape, dtype in _header(file):
            found = unwrapped(stored, target)
            if found is None:
                continue
            if isinstance(found, str):
                unused.append(stored)
                errors.append(f"unused: {printable(stored)} {list(shape)}{found}")
                continue
            rule, path, row = found
            if row in plan[path]:
                if not rule.alias:
                    first = plan[path][row]
                    twice = f"{printable(stored)} and {printable(first.name)}"
                    errors.append(f"stored twice: {twice} ({first.file.name})")
                continue
            plan[path][row] = _Source(file, stored, rule)
            expected = wanted[path].shape[rule.layer is not None :]
            try:
                ours = rule.layout(np.broadcast_to(np.float32(0), shape)).shape
            except ValueError:  # too few axes for the layout
                ours = ()
            if ours != expected:
                errors.append(
                    f"misshapen: {printable(stored)} {list(shape)} gives {list(ours)}, "
                    f"{_at(path, row)} is {list(expected)}"
                )
            if dtype not in _FLOATS:
                errors.append(
                    f"dtype: {printable(stored)} is {dtype}{_QUANTIZED.get(dtype, '')}, not one of {sorted(_FLOATS)}"
                )
    if told := common_prefix(unused, target):
        errors.append(f" prefix: {told}")  # a space sorts it in front of all other lines
    for path, v in wanted.items():
        template = ((r, re.sub(r"\\(\d+|g<\w+>)", ".+", r.path)) for r in rules)
        rule = next((r for r, t in template if re.fullmatch(t, path)), None)
        stacked = rule is not None and rule.layer is not None
        name = "no rule" if rule is None else rule.pattern
        for row in range(v.shape[0]) if stacked else (None,):
            if row not in plan[path]:
                errors.append(f"missing: {_at(path, row)} (stored as {name})")
    return plan, errors


def _header(file: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every tensor of a file."""
    try:
        with opened(file) as f:
            slices = [(n, f.get_slice(n)) for n in f.keys()]  # noqa: SIM118 - not a dict
            return [(n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices]
    except UserError as e:
        raise CheckpointError(str(e)) from e


def _shown(source: Any) -> str:
    """A source in a message: one path, or the first of several and their number."""
    if isinstance(source, str | Path):
        return str(source)
    first, *more = source
    return f"{first}{f' and {len(more)} more files' if more else ''}"


def _at(path: str, row: int | None) -> str:
    return path if row is None else f"{path}[{row}]"


def _read(sources: dict[int | None, _Source], variable) -> np.ndarray:
    """Reads one parameter in the skeleton's shape and dtype; a stacked one row by row."""
    out = np.empty(variable.shape, variable.dtype)
    for row, source in sources.items():
        try:
            with opened(source.file) as f:
                stored = read_tensor(f, source.name, source.file)
        except UserError as e:
            raise CheckpointError(str(e)) from e
        out[... if row is None else row] = source.rule.layout(stored)
    return out
