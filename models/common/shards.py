"""Sharded checkpoints: which files belong together, and which of them are missing."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from models.common.checkpoint import CheckpointError, checkpoint_files
from qvg_jax.errors import UserError
from qvg_jax.reading.schema import named_file, read_json

_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
MOST_SHARDS = 1000  # of one checkpoint
INDEX_BYTES = 2**22


class _Index(Struct):
    """The index file of a sharded checkpoint: the shard of each tensor."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1, max_length=2**16)]


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
        named = {file for index in indices for file in _named_by(index)}
        files += sorted(named) if named else checkpoint_files(path)
    for file in tuple(files):
        if part := _NUMBERED.fullmatch(file.name):
            stem, _, count = part.groups()
            if int(count) > MOST_SHARDS:
                raise CheckpointError(
                    f"{file}: one of {int(count)} shards; accepted: at most {MOST_SHARDS}"
                )
            names = (f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1))
            # Shards that were asked for one by one must be complete as well.
            files += [f for f in (file.with_name(n) for n in names) if not f.is_file()]
    missing = sorted({f.name for f in files if not f.is_file()})
    if missing:
        raise CheckpointError(f"{source}: {len(missing)} shards are missing: {', '.join(missing)}")
    return checkpoint_files(files)


def _named_by(index: Path) -> set[Path]:
    """The shards that an index names, all in its own folder."""
    try:
        names = set(read_json(index, _Index, most=INDEX_BYTES).weight_map.values())
        if len(names) > MOST_SHARDS:
            raise UserError(f"{index}: {len(names)} shards; accepted: at most {MOST_SHARDS}")
        return {named_file(index.parent, name, str(index)) for name in names}
    except UserError as e:
        raise CheckpointError(f"not an index of safetensors shards: {e}") from e
