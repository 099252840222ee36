"""Prompts to token ids: text cleaning, a kept tokenizer library, end token, padding.

The libraries (`tokenizers` or `sentencepiece`, and `ftfy`) are imported when first needed; the
`text` extra installs them.
"""

import dataclasses
import html
import importlib
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from qvg_jax.errors import MissingExtraError

# Printable ASCII but "&", and plain white space: ftfy leaves such text as it is.
_NOTHING_TO_REPAIR = re.compile(r"[ -%'-~\t\n\r]*")


class Tokens(NamedTuple):
    """Padded token ids, and true where they are not padding. Lengths count the end token."""

    ids_BT: Int[np.ndarray, "B T"]
    mask_BT: Bool[np.ndarray, "B T"]


class PromptTooLongWarning(UserWarning):
    """The end of a prompt did not fit and was cut off; the message quotes what was lost."""


def clean_prompt(text: str) -> str:
    """Repairs mojibake, undoes HTML escapes (twice), strips, and collapses white space.

    Raises:
        MissingExtraError: the text has characters that `ftfy` might have to repair (anything beyond
            ASCII, control characters, `&`), and `ftfy` is not installed.
    """
    if not _NOTHING_TO_REPAIR.fullmatch(text):
        text = _import("ftfy").fix_text(text)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Turns prompts into padded ids: `tokenizer(["a cat", "a dog"])`.

    Args:
        to_ids: ids of a cleaned text, without special tokens.
        to_text: the way back, to quote what was cut off.
        length: T, tokens per prompt, counting the end token.
        pad_id: id in the padding.
        eos_id: id of the end token.
    """

    to_ids: Callable[[str], list[int]]
    to_text: Callable[[list[int]], str]
    length: int = 512
    pad_id: int = 0
    eos_id: int = 1

    @classmethod
    def from_file(cls, path: str | Path, *, length: int = 512) -> "Tokenizer":
        """Opens a tokenizer file of google/umt5-xxl.

        Args:
            path: a `.json` file (library `tokenizers`), a `.model` file (library `sentencepiece`),
                or a folder with `tokenizer.json` or `spiece.model`.
            length: tokens per prompt, counting the end token.

        Raises:
            FileNotFoundError: no such file, or the folder holds neither.
            MissingExtraError: the library for the file is not installed.
            ValueError: another kind of file, or one without padding and end tokens.
        """
        path = Path(path)
        if path.is_dir():
            names = ("tokenizer.json", "spiece.model")
            found = [path / name for name in names if (path / name).is_file()]
            if not found:
                raise FileNotFoundError(f"{path}: holds neither of {names}")
            path = found[0]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such tokenizer file")
        if path.suffix == ".json":
            tok = _import("tokenizers").Tokenizer.from_file(str(path))
            tok.no_padding()
            tok.no_truncation()
            pad_id, eos_id = tok.token_to_id("<pad>"), tok.token_to_id("</s>")

            def to_ids(text):
                return tok.encode(text, add_special_tokens=False).ids

        elif path.suffix == ".model":
            tok = _import("sentencepiece").SentencePieceProcessor(model_file=str(path))
            pad_id, eos_id = tok.pad_id(), tok.eos_id()
            to_ids = tok.encode
        else:
            raise ValueError(f"{path}: accepted: tokenizer.json or spiece.model")
        if pad_id is None or eos_id is None or min(pad_id, eos_id) < 0:
            raise ValueError(f"{path}: no padding or no end token ({pad_id=}, {eos_id=})")
        return cls(to_ids, tok.decode, length, pad_id, eos_id)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Cleans, tokenizes, ends and pads prompts.

        A prompt of more than `length` - 1 tokens is cut, with a `PromptTooLongWarning`; the end
        token is always there.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts={prompts!r}; accepted: a sequence of strings")
        ids_BT = np.full((len(prompts), self.length), self.pad_id, np.int32)
        mask_BT = np.zeros(ids_BT.shape, bool)
        for row, prompt in enumerate(prompts):
            ids = list(self.to_ids(clean_prompt(prompt)))
            keep, cut = ids[: self.length - 1], ids[self.length - 1 :]
            if cut:
                warnings.warn(
                    f"prompt {row} has {len(ids) + 1} tokens, at most {self.length} are used; "
                    f"cut off: {self.to_text(cut)!r}",
                    PromptTooLongWarning,
                    stacklevel=2,
                )
            keep.append(self.eos_id)
            ids_BT[row, : len(keep)] = keep
            mask_BT[row, : len(keep)] = True
        return Tokens(ids_BT, mask_BT)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        raise MissingExtraError(f"this text prompt needs {name}", "text") from e
