"""Checkpoints of PyTorch (.pt, .pth, .bin) as safetensors.

PyTorch reads them, with `weights_only=True`: a checkpoint is a pickle, and a pickle may run
anything, so only tensors and plain containers are let through. It is needed here alone; the extra
`convert` installs it. What was written is read back, so that a file that the loaders could not read
never appears, and values that are not numbers are known at once.
"""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qvg_jax.errors import MissingExtraError, UserError, printable
from qvg_jax.files import replacing
from qvg_jax.reading.tensors import count_nonfinite, opened

__all__ = ["ENTRIES", "convert"]

# What trainers call the weights inside a checkpoint; the first one that is there is taken. The
# averaged ones come first: they are what a release means to be run with.
ENTRIES = ("generator_ema", "ema", "generator", "state_dict", "model", "module")

DEEPEST = 32  # mappings inside of each other
LONGEST_NAME = 512  # characters; released ones have 80
FLOATS = ("F64", "F32", "F16", "BF16")
RESERVED = "__metadata__"  # what safetensors' header has beside the tensors


def convert(source: str | Path, target: str | Path, *, entry: str | None = None) -> dict[str, Any]:
    """Writes the tensors of a PyTorch checkpoint as one safetensors file, names as they are.

    The file appears whole or not at all. Tensors are mapped from disk where the file allows it, and
    copied one by one only if several share memory.

    Args:
        source: .pt, .pth or .bin file.
        target: .safetensors file to write.
        entry: which entry of the checkpoint has the weights; None takes the first of `ENTRIES`
            that is there, or the whole checkpoint if it holds tensors itself.

    Returns:
        "entry" (None for the whole), "tensors", "bytes", and, if there are any, "nonfinite": the number of
        NaN and Inf of each tensor.

    Raises:
        UserError: PyTorch is not installed, the file cannot be read without running what is in
            it, it holds no tensors there, two of one name, or one that safetensors cannot store.
        OSError: the target could not be written.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise UserError(f"target={str(target)!r} is not accepted: give a name in .safetensors")
    if not source.is_file():
        raise UserError(f"source={str(source)!r} is not a file")
    torch = _torch()
    entry, tensors = _weights(_read(torch, source), entry, torch.Tensor, source)
    save = importlib.import_module("safetensors.torch").save_file
    try:
        with replacing(target) as partial:
            try:
                save(_apart(tensors, source), partial, metadata={"format": "pt"})
            except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                # What PyTorch says of tensors and dtypes of kinds that safetensors does not know.
                if isinstance(error, UserError):
                    raise
                what = printable(str(error))[:200]
                raise UserError(
                    f"source={str(source)!r} holds tensors that safetensors cannot store: {what}"
                ) from error
            nonfinite = _nonfinite(partial)
    except SafetensorError as error:  # how it says that a file cannot be written
        raise OSError(0, str(error), str(target)) from error
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    done = {"entry": entry, "tensors": len(tensors), "bytes": size}
    return done | ({"nonfinite": nonfinite} if nonfinite else {})


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("reading PyTorch's files needs PyTorch", "convert") from error


def _read(torch: Any, source: Path) -> Any:
    arguments = dict(map_location="cpu", weights_only=True)
    try:
        try:
            return torch.load(source, mmap=True, **arguments)
        except RuntimeError:  # files of old versions cannot be mapped
            return torch.load(source, **arguments)
    except Exception as error:  # pickle, zip and PyTorch's own errors, of a dozen kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"source={str(source)!r} cannot be read as a checkpoint of tensors alone: {first}"
        ) from error


def _weights(
    loaded: Any, entry: str | None, kind: type, source: Path
) -> tuple[str | None, dict[str, Any]]:
    """The entry that was taken, and its tensors by name."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"source={str(source)!r} holds a {type(loaded).__name__}, not a mapping")
    if entry is None:
        entry = next((e for e in ENTRIES if isinstance(loaded.get(e), Mapping)), None)
    elif not isinstance(loaded.get(entry), Mapping):
        found = [str(key) for key, value in loaded.items() if isinstance(value, Mapping)]
        raise UserError(
            f"entry={entry!r} is not in {str(source)!r}; accepted: {', '.join(found) or 'none'}"
        )
    chosen = loaded if entry is None else loaded[entry]
    tensors: dict[str, Any] = {}
    for name, x in _flat(chosen, source):
        if not isinstance(x, kind):
            continue
        if name in tensors:
            raise UserError(
                f"source={str(source)!r} holds two tensors that would both be called {_shown(name)}; "
                "accepted: one of each name, such as --entry of one that has no other"
            )
        if name == RESERVED or not name or len(name) > LONGEST_NAME:
            raise UserError(
                f"source={str(source)!r} holds a tensor called {_shown(name)}, which safetensors cannot "
                f"have; accepted: names of 1 to {LONGEST_NAME} characters but {RESERVED}"
            )
        tensors[name] = x
    if not tensors:
        raise UserError(f"source={str(source)!r} holds no tensors in {entry or 'its top level'}")
    return entry, tensors


def _flat(tree: Mapping, source: Path) -> Iterator[tuple[str, Any]]:
    """Names, joined by dots, and values of mappings inside of mappings, in their order."""
    waiting: list[tuple[str, Any, int]] = [("", tree, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        if not isinstance(value, Mapping):
            yield name, value
            continue
        if depth > DEEPEST:
            raise UserError(
                f"source={str(source)!r} has mappings inside of each other more than {DEEPEST} deep; "
                "accepted: a checkpoint's few levels"
            )
        front = f"{name}." if depth else ""
        inner = [(f"{front}{key}", part, depth + 1) for key, part in value.items()]
        waiting += reversed(inner)


def _apart(tensors: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Tensors as safetensors takes them: contiguous, none in the memory of another."""
    seen, apart = set(), {}
    for name, x in tensors.items():
        if why := _unstorable(x):
            raise UserError(
                f"source={str(source)!r}: tensor {_shown(name)} is {why}; accepted: plain dense tensors"
            )
        place = x.untyped_storage().data_ptr()
        whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        apart[name] = x.contiguous() if whole and place not in seen else x.contiguous().clone()
        seen.add(place)
    return apart


def _unstorable(x: Any) -> str | None:
    """The reason why a tensor has no plain values that could be written, or None."""
    layout = str(getattr(x, "layout", "torch.strided")).removeprefix("torch.")
    device = str(getattr(x, "device", "cpu"))
    if layout != "strided":
        return f"stored as {layout}"
    if getattr(x, "is_quantized", False):
        return "quantized"
    if getattr(x, "is_nested", False):
        return "nested"
    if not device.startswith("cpu"):
        return f"on the device {device}, without values" if device == "meta" else f"on {device}"
    if str(getattr(x, "dtype", "")).startswith("torch.complex"):
        return f"of dtype {x.dtype}"
    if x.numel() * x.element_size() > x.untyped_storage().nbytes():
        return "a view that repeats its memory"
    return None


def _nonfinite(path: Path) -> dict[str, int]:
    """The number of NaN and Inf of each tensor of a file that has any; the file is read to its end."""
    with opened(path) as tensors:
        names = [n for n in tensors.keys() if tensors.get_slice(n).get_dtype() in FLOATS]  # noqa: SIM118
        counts = {name: count_nonfinite(tensors.get_tensor(name)) for name in names}
    return {name: count for name, count in counts.items() if count}


def _shown(name: str) -> str:
    """A name from a file, for a message."""
    return repr(printable(name[:80]) + ("..." if len(name) > 80 else ""))
