"""Lists of heads for benchmarks: which heads have a history, where no list of a model is at hand.

How long a block takes and how many bytes a cache has depend on the numbers of heads in each layer and not on
which heads they are. So a list that is made up, with the share of local heads that others have published, says both.
"""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.reading.head_lists import read_head_list, rows_of

__all__ = ["STAND_IN", "stand_in", "write_list"]

STAND_IN = "published"  # the name by which a benchmark asks for `stand_in`
SHARE = (
    134 / 360
)  # static heads of Self-Forcing's 30 layers of 12, as Forcing-KV (arXiv 2605.09681) reports them


def stand_in(layers: int, heads: int, seed: int = 0) -> Bool[np.ndarray, "L H"]:
    """A table with the published share of local heads, the same in every layer to within one head.

    Which layers have one more, and which heads are local, is random. A real list has other numbers in each layer.
    """
    rng = np.random.default_rng(seed)
    local = round(SHARE * layers * heads)
    table = np.ones((layers, heads), bool)
    more = set(rng.permutation(layers)[: local % layers].tolist())
    for layer, row in enumerate(table):
        row[rng.permutation(heads)[: local // layers + (layer in more)]] = False
    return table


def write_list(which: str, folder: Path, *, layers: int, heads: int, multiple: int) -> Path:
    """The file with the list of a benchmark, which the model's settings read.

    Args:
        which: a file of either format of `head_lists`, or `STAND_IN`.
        folder: where the list is written.
        layers, heads: of the model; only for the stand-in.
        multiple: see `HeadHistory.rounded`.
    """
    if which == STAND_IN:
        table, local, rule = stand_in(layers, heads), None, "a stand-in with the published share"
    else:
        (table, local), rule = read_head_list(which), which
    table = HeadHistory(table, 0).rounded(multiple).table
    made = dict(made_by=dict(rule=rule, multiple=multiple))
    file = folder / "heads.json"
    file.write_text(json.dumps(dict(table=rows_of(np.array(table)), local_blocks=local) | made))
    return file
