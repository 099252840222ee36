"""Checkpoints of PyTorch (.pt, .pth, .bin) as safetensors.

PyTorch reads them, with `weights_only=True`: a checkpoint is a pickle, and a pickle may run
anything, so only tensors and plain containers are let through. It is needed here alone; the extra
`convert` installs it.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qvg_jax.errors import MissingExtraError, UserError
from qvg_jax.files import replacing

__all__ = ["ENTRIES", "convert"]

# What trainers call the weights inside a checkpoint; the first one that is there is taken. The
# averaged ones come first: they are what a release means to be run with.
ENTRIES = ("generator_ema", "ema", "generator", "state_dict", "model", "module")


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
        "entry" (None for the whole), "tensors" and "bytes".

    Raises:
        UserError: PyTorch is not installed, the file cannot be read without running what is in
            it, or it holds no tensors there.
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
            save(_apart(tensors), partial, metadata={"format": "pt"})
    except SafetensorError as error:  # how it says that a file cannot be written
        raise OSError(0, str(error), str(target)) from error
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    return {"entry": entry, "tensors": len(tensors), "bytes": size}


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
    tensors = {str(name): x for name, x in _flat(chosen) if isinstance(x, kind)}
    if not tensors:
        raise UserError(f"source={str(source)!r} holds no tensors in {entry or 'its top level'}")
    return entry, tensors


def _flat(tree: Mapping, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _apart(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as safetensors takes them: contiguous, none in the memory of another."""
    seen, apart = set(), {}
    for name, x in tensors.items():
        place = x.untyped_storage().data_ptr()
        whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        apart[name] = x.contiguous() if whole and place not in seen else x.contiguous().clone()
        seen.add(place)
    return apart
