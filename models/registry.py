"""The models that the command knows, by name: those of this repository and those of other packages.

Another package adds a model by an entry point of the group `qvg.models`, whose name is the model's and
whose object is a `qvg_jax.app.model_entry.ModelEntry`.
"""

import functools
import importlib
import importlib.metadata

from qvg_jax.app.model_entry import ModelEntry
from qvg_jax.errors import UserError

__all__ = ["GROUP", "names", "named"]

GROUP = "qvg.models"

BUILT_IN = {
    "pocket-world": "models.pocket_world.entry",
    "self-forcing": "models.self_forcing.entry",
    "worldplay": "models.worldplay.entry",
    "longcat": "models.longcat.entry",
    "lingbot": "models.lingbot.entry",
    **dict.fromkeys(
        (
            "causal-forcing",
            "causal-forcing-framewise",
            "causal-forcing-2-step",
            "causal-forcing-1-step",
            "raven",
            "longlive",
            "reward-forcing",
            "krea-realtime",
        ),
        "models.self_forcing.entry",
    ),
}


@functools.cache
def _foreign() -> dict[str, importlib.metadata.EntryPoint]:
    """Entry points of other packages by name; a name of this repository stays its own."""
    found = importlib.metadata.entry_points(group=GROUP)
    return {point.name: point for point in found if point.name not in BUILT_IN}


def names() -> tuple[str, ...]:
    """Names of all models, this repository's first."""
    return (*BUILT_IN, *sorted(_foreign()))


def named(name: str) -> ModelEntry:
    """The entry of a model.

    Raises:
        UserError: the name is not known, or another package's entry cannot be imported; the
            message says why.
    """
    if name in BUILT_IN:
        module = importlib.import_module(BUILT_IN[name])
        return module.ENTRIES[name] if hasattr(module, "ENTRIES") else module.ENTRY
    if name not in _foreign():
        raise UserError(f"model={name!r} is not known; accepted: {', '.join(names())}")
    point = _foreign()[name]
    try:
        entry = point.load()
    except Exception as error:  # whatever a foreign module raises, the other models still work
        raise UserError(
            f"model={name!r}: its entry point {point.value} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(entry, ModelEntry):
        raise UserError(
            f"model={name!r}: its entry point {point.value} is a {type(entry).__name__}; accepted: "
            "a qvg_jax.app.model_entry.ModelEntry"
        )
    return entry
