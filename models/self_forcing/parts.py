"""The parts of a text-to-video run: which sizes they have, and where a folder keeps them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from models.common.checkpoint import CheckpointError, checkpoint_files
from models.self_forcing.config import SelfForcingConfig
from models.umt5.config import UMT5Config
from models.wan_vae.config import WanVAEConfig

TOKENIZERS = ("google/umt5-xxl", "tokenizer", ".")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
# In order of preference: Wan's own transformer, without Self-Forcing's training, comes last.
PATTERNS = {
    "dit": ("self_forcing*", "*dmd*", "*generator*", "transformer", "diffusion_pytorch_model*"),
    "vae": ("*VAE*", "*vae*"),
    "text": ("*t5*", "text_encoder"),
}
WHAT = {"dit": "the transformer", "vae": "the video VAE", "text": "the text encoder"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Configurations of the three networks."""

    dit: SelfForcingConfig
    vae: WanVAEConfig
    text: UMT5Config

    @classmethod
    def released(cls) -> "Sizes":
        """Self-Forcing's 1.3B transformer, Wan2.1's VAE, umT5-XXL; all bfloat16."""
        return cls(
            dit=SelfForcingConfig.wan_1_3b(), vae=WanVAEConfig.wan_2_1(), text=UMT5Config.xxl()
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Files of a folder; each of the first three is one safetensors checkpoint."""

    dit: tuple[Path, ...]
    vae: tuple[Path, ...]
    text: tuple[Path, ...]
    tokenizer: Path
    config: dict[str, Any] | None  # a Wan config.json, if there is one

    def identity(self) -> dict[str, int]:
        """Names and bytes of the files of the networks: enough to notice another checkpoint."""
        files = (*self.dit, *self.vae, *self.text)
        return {file.name: file.stat().st_size for file in files}


def find_parts(folder: str | Path) -> Parts:
    """Looks for the parts in a folder laid out like the releases of Wan2.1.

    The transformer is the first of `PATTERNS` that is there as .safetensors or as a folder of
    shards; likewise the VAE and the text encoder. The tokenizer is looked for in `TOKENIZERS`.

    Raises:
        CheckpointError: what is missing, and what to convert.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"weights={str(folder)!r} is not a folder; accepted: a folder with the transformer, "
            "the VAE, the text encoder and its tokenizer, or 'random'"
        )
    found = {name: _first(folder, patterns) for name, patterns in PATTERNS.items()}
    tokenizer = _tokenizer(folder)
    lacking = [
        f"{WHAT[name]} ({_hint(folder, PATTERNS[name])})"
        for name, files in found.items()
        if not files
    ]
    if tokenizer is None:
        lacking.append(f"the tokenizer ({' or '.join(TOKENIZER_FILES)} in google/umt5-xxl)")
    if lacking:
        raise CheckpointError(f"weights={str(folder)!r} lacks {'; '.join(lacking)}")
    config = folder / "config.json"
    return Parts(**found, tokenizer=tokenizer, config=_json(config) if config.is_file() else None)


def _first(folder: Path, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir() and any(path.glob("*.safetensors")):
                return checkpoint_files(path)
        if files := sorted(folder.glob(f"{pattern}.safetensors")):
            # Shards belong together; of other files that match, the first one is taken.
            shards = [f for f in files if "-of-" in f.name]
            return tuple(shards) if shards else (files[0],)
    return ()


def _hint(folder: Path, patterns: tuple[str, ...]) -> str:
    for pattern in patterns:
        for suffix in (".pt", ".pth"):
            for file in sorted(folder.glob(pattern + suffix)):
                made = file.with_suffix(".safetensors")
                return f"`qvg convert {file} {made}` makes it"
    return f"{patterns[0]}.safetensors"


def _tokenizer(folder: Path) -> Path | None:
    for name in TOKENIZERS:
        for file in TOKENIZER_FILES:
            if (folder / name / file).is_file():
                return folder / name / file
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
