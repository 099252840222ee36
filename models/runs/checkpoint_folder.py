"""The networks of a text-to-video run: which sizes they have, and where a folder keeps them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.common.checkpoint import CheckpointError
from models.common.shards import checkpoint_shards
from models.umt5.config import UMT5Config
from qvg_jax.errors import UserError
from qvg_jax.reading.schema import read_json

TOKENIZERS = ("google/umt5-xxl", "tokenizer", ".")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
VAE, TEXT = ("*VAE*", "*vae*"), ("*t5*", "text_encoder")
WHAT = {"dit": "the transformer", "vae": "the video VAE", "text": "the text encoder"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes[D, V]:
    """Configurations of the three networks: transformer, VAE, text encoder."""

    dit: D
    vae: V
    text: UMT5Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Files of a folder; each of the first three is one safetensors checkpoint."""

    dit: tuple[Path, ...]
    vae: tuple[Path, ...]
    text: tuple[Path, ...]
    tokenizer: Path
    config: dict[str, Any] | None  # the transformer's config.json, if there is one

    def identity(self) -> dict[str, int]:
        """Names and bytes of the files of the networks: enough to notice another checkpoint."""
        files = (*self.dit, *self.vae, *self.text)
        return {file.name: file.stat().st_size for file in files}


def find_parts(
    folder: str | Path, dit: tuple[str, ...], *, vae: tuple[str, ...] = VAE, config: str = "."
) -> Parts:
    """Looks for the networks in a folder laid out like their releases.

    Each is the first of its patterns that is there as .safetensors or as a folder of shards. The
    tokenizer is looked for in `TOKENIZERS`.

    Args:
        folder: where to look.
        dit, vae: patterns of the transformer's and the VAE's name, the best first.
        config: folder inside of `folder` that has the transformer's config.json, if any has.

    Raises:
        CheckpointError: what is missing, and what to convert; shards that are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"weights={str(folder)!r} is not a folder; accepted: a folder with the transformer, "
            "the VAE, the text encoder and its tokenizer, or 'random'"
        )
    patterns = {"dit": dit, "vae": vae, "text": TEXT}
    found = {name: _first(folder, names) for name, names in patterns.items()}
    tokenizer = _tokenizer(folder)
    lacking = [
        f"{WHAT[name]} ({_hint(folder, patterns[name])})"
        for name, files in found.items()
        if not files
    ]
    if tokenizer is None:
        lacking.append(f"the tokenizer ({' or '.join(TOKENIZER_FILES)} in google/umt5-xxl)")
    if lacking:
        raise CheckpointError(f"weights={str(folder)!r} lacks {'; '.join(lacking)}")
    file = folder / config / "config.json"
    return Parts(**found, tokenizer=tokenizer, config=_json(file) if file.is_file() else None)


def wanted_keys(config: Mapping[str, Any], *names: str, folder: str | None = None) -> None:
    """Raises UserError if a config.json lacks one of these keys."""
    if lacking := sorted(set(names) - config.keys()):
        raise UserError(f"config.json in {folder} lacks {', '.join(lacking)}")


@contextlib.contextmanager
def named_config(folder: str | None) -> Iterator[None]:
    """Puts the file's name in front of what is wrong with a config.json."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"config.json in {folder}: {error}") from error


def _first(folder: Path, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir() and any(path.glob("*.safetensors")):
                return checkpoint_shards(path)
        if files := sorted(folder.glob(f"{pattern}.safetensors")):
            # Shards belong together; of other files that match, the first one is taken.
            shards = [f for f in files if "-of-" in f.name]
            return checkpoint_shards(shards) if shards else (files[0],)
    return ()


def _hint(folder: Path, patterns: tuple[str, ...]) -> str:
    for pattern in patterns:
        for suffix in (".pt", ".pth"):
            for file in sorted(folder.glob(pattern + suffix)):
                made = file.with_suffix(".safetensors")
                return f"`qvg convert {file} {made}` makes it"
        for file in sorted(folder.glob(pattern + ".gguf")):
            return f"{file.name} is GGUF, which is not read; accepted: safetensors of floats"
    return f"{patterns[0]}.safetensors"


def _tokenizer(folder: Path) -> Path | None:
    for name in TOKENIZERS:
        for file in TOKENIZER_FILES:
            if (folder / name / file).is_file():
                return folder / name / file
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, dict[str, Any])
    except UserError as error:
        raise CheckpointError(str(error)) from error
