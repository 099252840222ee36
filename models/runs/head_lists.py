"""Which heads of a model have a history, as a user says it: a file, "auto" or "all"."""

from pathlib import Path

from qvg_jax.cache.head_history import HeadHistory
from qvg_jax.errors import UserError, told_to_user
from qvg_jax.reading.head_lists import read_head_list

__all__ = ["AUTO", "EVERY", "history_of"]

EVERY, AUTO = "all", "auto"


@told_to_user()
def history_of(
    heads: str,
    *,
    layers: int,
    count: int,
    local: int | None,
    usual: int,
    own: Path | None = None,
) -> HeadHistory | None:
    """The history of a model's heads; None where all of them have one.

    Args:
        heads: "all", "auto" for the model's own list, or the name of a file; see `head_lists`.
        layers, count: of the model; `count` are its key-value heads.
        local: newest blocks that a local head reads; None is what the file says, or else `usual`.
        usual: the same where neither says it.
        own: the model's own list, if it has one.

    Raises:
        UserError: no list, or one of another model.
    """
    if heads == EVERY:
        return None
    if heads == AUTO and own is None:
        raise UserError("heads='auto': this model has no list of its own; accepted: all, or a file")
    path = own if heads == AUTO else Path(heads)
    assert path is not None
    found = read_head_list(path)
    if found.table.shape != (layers, count):
        raise UserError(
            f"heads={heads!r}: a table of {found.table.shape[0]} layers and {found.table.shape[1]} heads; "
            f"accepted: {layers} layers and {count} heads, those of this model"
        )
    said = usual if found.local_blocks is None else found.local_blocks
    history = HeadHistory(found.table, said if local is None else local)
    return None if history.full == layers * count else history
