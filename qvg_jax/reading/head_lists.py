"""Lists of heads in JSON files: which heads of a model have a history.

Two formats. Ours, as `qvg tune --heads` writes it:

    {"local_blocks": 2, "table": ["##.", "#.."], "made_by": {...}}

with a row for each layer, `#` for a head with a history and `.` for a local one. And lists as Forcing-KV
(arXiv 2605.09681) publishes them, of which the fields that say something are read:

    {"num_layers": 2, "num_heads": 3, "layers": [{"layer_idx": 0, "static_head": [2], "dynamic_head": [0, 1]}, ...]}

or the list of layers alone. Static heads are local ones; earlier lists call them `local_head`, and the others
`temporal_head`. How many newest frames a static head reads is not in the file.
"""

import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from jaxtyping import Bool
from msgspec import Meta

from qvg_jax.errors import UserError
from qvg_jax.reading.schema import checked, read_json

__all__ = ["HeadList", "read_head_list", "rows_of"]

HAS, LOCAL = "#", "."

type _Count = Annotated[int, Meta(ge=1, le=2**12)]
type _Index = Annotated[int, Meta(ge=0, lt=2**12)]


class HeadList(NamedTuple):
    """What a file says.

    Attributes:
        table: True for a head with a history.
        local_blocks: newest blocks that the others read; None if the file does not say.
    """

    table: Bool[np.ndarray, "L H"]
    local_blocks: int | None


class _Own(msgspec.Struct):
    table: Annotated[list[Annotated[str, Meta(min_length=1, max_length=2**12)]], Meta(min_length=1)]
    local_blocks: Annotated[int, Meta(ge=0, le=2**16)] | None = None


class _PublishedLayer(msgspec.Struct):
    layer_idx: _Index
    static_head: list[_Index] | None = None
    dynamic_head: list[_Index] | None = None
    local_head: list[_Index] | None = None
    temporal_head: list[_Index] | None = None


class _Published(msgspec.Struct):
    layers: Annotated[list[_PublishedLayer], Meta(min_length=1)]
    num_layers: _Count | None = None
    num_heads: _Count | None = None


def read_head_list(path: str | os.PathLike) -> HeadList:
    """The list of heads in a JSON file of either format.

    Raises:
        UserError: the file is not there or no such list; a layer or head that is missing, or twice.
    """
    path = Path(path)
    found = read_json(path, dict[str, Any] | list[Any])
    found = found if isinstance(found, dict) else {"layers": found}
    if "table" not in found and "layers" not in found:
        raise UserError(
            f"{path}: neither 'table' nor 'layers'; accepted: what `qvg tune --heads` writes, or a list in "
            "the format of Forcing-KV"
        )
    if "table" in found:
        own = checked(found, _Own, str(path))
        return HeadList(_of_rows(own.table, path), own.local_blocks)
    return HeadList(_of_lists(checked(found, _Published, str(path)), path), None)


def rows_of(table: Bool[np.ndarray, "L H"]) -> list[str]:
    """A class table in text, a row for each layer."""
    return ["".join(HAS if has else LOCAL for has in row) for row in table]


def _of_rows(rows: list[str], path: Path) -> np.ndarray:
    for layer, row in enumerate(rows):
        if len(row) != len(rows[0]) or set(row) - {HAS, LOCAL}:
            raise UserError(
                f"{path}: table[{layer}]={row[:60]!r} is not accepted: give {len(rows[0])} of {HAS!r} for a head "
                f"with a history and {LOCAL!r} for a local one"
            )
    return np.array([[head == HAS for head in row] for row in rows])


def _of_lists(found: _Published, path: Path) -> np.ndarray:
    pairs = {}
    for layer in found.layers:
        pair = layer.static_head, layer.dynamic_head
        if None in pair:
            pair = layer.local_head, layer.temporal_head
        if None in pair:
            raise UserError(
                f"{path}: layer {layer.layer_idx} lacks a list; accepted: static_head and dynamic_head, or "
                "local_head and temporal_head"
            )
        pairs[layer.layer_idx] = pair
    count = len(found.layers) if found.num_layers is None else found.num_layers
    if sorted(layer.layer_idx for layer in found.layers) != list(range(count)):
        raise UserError(
            f"{path}: layers are numbered {str(sorted(pairs))[:60]}; accepted: 0 to {count - 1}, each once"
        )
    heads = sum(map(len, pairs[0])) if found.num_heads is None else found.num_heads
    table = np.zeros((count, heads), bool)
    for number, (local, others) in pairs.items():
        if (there := sorted(local + others)) != list(range(heads)):
            raise UserError(
                f"{path}: layer {number} has the heads {str(there)[:60]}; accepted: 0 to {heads - 1}, each once, "
                "in one of its lists"
            )
        table[number, others] = True
    return table
