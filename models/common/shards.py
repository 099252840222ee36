"""Sharded checkpoints: which files belong together, and which of them are missing."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from models.common.checkpoint import CheckpointError, checkpoint_files

_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def checkpoint_shards(source: str | Path | Iterable[str | Path]) -> tuple[Path, ...]:
    """The files of a checkpoint, complete.

    As `checkpoint_files`; in a folder with an index (`*.safetensors.index.json`) the files that it
    names. Where names count shards (`x-00001-of-00006.safetensors`) all of them must be there.

    Raises:
        CheckpointError: a file that does not exist, with the names of all that are missing.
    """
    paths = [source] if isinstance(source, str | Path) else list(source)
    files: list[Path] = []
    for path in map(Path, paths):
        indices = sorted(path.glob("*.safetensors.index.json")) if path.is_dir() else []
        named = {path / name for index in indices for name in _named_by(index)}
        files += sorted(named) if named else checkpoint_files(path)
    for file in tuple(files):
        if part := _NUMBERED.fullmatch(file.name):
            stem, _, count = part.groups()
            names = (f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1))
            # Shards that were asked for one by one must be complete as well.
            files += [f for f in (file.with_name(n) for n in names) if not f.is_file()]
    missing = sorted({f.name for f in files if not f.is_file()})
    if missing:
        raise CheckpointError(f"{source}: {len(missing)} shards are missing: {', '.join(missing)}")
    return checkpoint_files(files)


def _named_by(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (json.JSONDecodeError, KeyError, AttributeError) as e:
        raise CheckpointError(f"{index}: not an index of safetensors shards ({e!r})") from e
