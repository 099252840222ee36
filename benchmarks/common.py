"""What the benchmarks of models share: processes of their own, clocks, the device's memory."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def names(text: str) -> tuple[str, ...]:
    """An argument with commas."""
    return tuple(text.split(","))


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """Returns a reader of an argument that is one of the known names."""
    accepted = tuple(known)

    def read(text: str) -> str:
        if text not in accepted:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not known; accepted: {', '.join(accepted)}"
            )
        return text

    return read


def several(read: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    """Returns a reader of arguments with commas, each read as one."""
    return lambda text: tuple(map(read, names(text)))


def several_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Returns a reader of an argument of known names with commas."""
    return several(one_of(known))


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a whole number of at least 1")
    return int(text)


def a_codec(text: str) -> str:
    """An argument that is a codec, or one for keys and one for values."""
    from qvg_jax.codecs import presets

    try:
        presets.parse_pair(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def an_implementation(text: str) -> str:
    """An argument that is an implementation of attention."""
    from qvg_jax.attention.choice import ALIASES, CANDIDATES

    return one_of((*dict.fromkeys(c.implementation for c in CANDIDATES), *ALIASES))(text)


def an_arm(text: str) -> str:
    """An argument that is an arm, CODEC or CODEC@IMPLEMENTATION."""
    codec, way = split_arm(text)
    a_codec(codec)
    if way is not None:
        an_implementation(way)
    return text


def some_arms(text: str) -> tuple[str, ...]:
    """An argument of arms with commas."""
    return several(an_arm)(text)


def split_arm(arm: str) -> tuple[str, str | None]:
    """(codec, implementation of attention) of an arm CODEC or CODEC@IMPLEMENTATION."""
    codec, _, way = arm.partition("@")
    return codec, way or None


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas; none if there is no text."""
    return tuple(int(n) for n in text.split(",")) if text else ()


def spawn(module: str, out: Path, parts: tuple[str, ...], limit: float | None = None) -> dict:
    """Runs parts of a benchmark in a process of their own: `python -m module ... --child parts`.

    The process writes a file `part.json` for each. What went wrong becomes the result, under
    "error".

    Args:
        module: the benchmark; it gets this process's arguments.
        out: folder of the results, log.txt and compiled programs.
        parts: names.
        limit: bytes of device memory that the process may take; None is nearly all.
    """
    env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    if limit and (total := device_bytes()):
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{limit / total:.5f}"
    # Its own folder: what is in it was compiled by this benchmark, and the first run is cold.
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    cold = not any(Path(env["JAX_COMPILATION_CACHE_DIR"]).glob("*"))
    with open(out / "log.txt", "a") as file:
        argv = [sys.executable, "-m", module, *sys.argv[1:], "--child", ",".join(parts)]
        code = subprocess.run(argv, env=env, stdout=file, stderr=file).returncode
    found = {}
    for part in parts:
        result = out / f"{part}.json"
        if result.is_file():
            found[part] = json.loads(result.read_text())
            found[part]["compilation_cache_was_empty"] = cold
            result.unlink()
    if code:
        tail = (out / "log.txt").read_text().strip().splitlines()[-1]
        found.setdefault(parts[-1], {})["error"] = f"exit code {code}: {tail[:300]}"
    return found


def device_bytes() -> int | None:
    """Memory of the first GPU as its driver says; None without one."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return int(float(out.split()[0]) * 2**20)
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def device() -> dict[str, Any]:
    """The default device, JAX's version, and the memory that this process may take."""
    import jax

    first = jax.devices()[0]
    stats = first.memory_stats() or {}
    return {
        "kind": f"{first.platform}: {first.device_kind}",
        "jax": jax.__version__,
        "bytes_limit": stats.get("bytes_limit"),
    }


def peak() -> int | None:
    """The most bytes that any device has held so far; None where nobody counts."""
    import jax

    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def seconds(run: Callable[[], Any]) -> float:
    """How long a call and all that it started on the device take."""
    import jax

    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def gb(n: int | None) -> str:
    """Bytes in words."""
    return "-" if n is None else f"{n / 1e9:.2f} GB"
