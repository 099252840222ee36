"""A cache on disk, by orbax: saved on so many devices, and restored on another number of them.

    save_cache(folder, cache)
    cache = restore_cache(folder, KVCache.create(..., sharding=Plan(spans=2)))

Each process writes and reads its own part, and no device ever holds more than its share.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from qvg_jax.cache.devices import in_order_of
from qvg_jax.cache.plan import Plan
from qvg_jax.cache.state import KVCache

__all__ = ["restore_cache", "save_cache"]

ARRAYS, ABOUT = "arrays", "cache.json"


def save_cache(folder: str | Path, cache: KVCache) -> None:
    """Writes a cache into a folder that does not exist yet, or is empty.

    Args:
        folder: where to.
        cache: the cache, by any plan. Its layout is not written: who restores it says what it is.

    Raises:
        ValueError: the folder has something in it.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"folder={str(folder)!r} is not empty; accepted: a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as files:
        files.save(folder / ARRAYS, _named(cache))
    plan = cache.layout.plan
    about = {"plan": None if plan is None else dataclasses.asdict(plan), "sizes": _sizes(cache)}
    if jax.process_index() == 0:
        (folder / ABOUT).write_text(json.dumps(about))


def restore_cache(folder: str | Path, like: KVCache) -> KVCache:
    """A cache from a folder, spread by the plan of another one of the same sizes.

    Args:
        folder: where `save_cache` has written it.
        like: a cache with the same sizes and codecs by the plan that is wanted; its contents do not
            matter.

    Raises:
        ValueError: the folder has no cache, or one of other sizes.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    if not (folder / ABOUT).is_file():
        raise ValueError(f"folder={str(folder)!r} has no {ABOUT}; accepted: what save_cache wrote")
    about = json.loads((folder / ABOUT).read_text())
    saved, wanted = about["sizes"], _sizes(like)
    if saved != wanted:
        differ = [name for name in sorted({*saved, *wanted}) if saved.get(name) != wanted.get(name)]
        raise ValueError(
            f"folder={str(folder)!r} has a cache of other sizes: {differ[0]} is "
            f"{saved.get(differ[0])} there and {wanted.get(differ[0])} in `like`"
        )
    # Another number of devices reads it in the order in which it lies, each a part, and then reorders.
    form = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    with ocp.StandardCheckpointer() as files:
        leaves = files.restore(folder / ARRAYS, jax.tree.map(form, _named(like)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(like)]
    leaves = [leaves.get(path, x) for path, x in zip(paths, jax.tree.leaves(like), strict=True)]
    cache = jax.tree.unflatten(jax.tree.structure(like), leaves)
    plan = None if about["plan"] is None else Plan(**about["plan"])
    return in_order_of(cache, plan)


def _named(cache: KVCache) -> dict[str, Any]:
    """The arrays of a cache by their paths, but for those without elements, which orbax refuses."""
    leaves = jax.tree.leaves_with_path(cache)
    return {jax.tree_util.keystr(path): x for path, x in leaves if x.size}


def _sizes(cache: KVCache) -> dict[str, list]:
    """Shape and dtype of each array, as JSON types."""
    return {name: [list(x.shape), str(x.dtype)] for name, x in _named(cache).items()}
