"""What a GPU does during a call: time of every kernel, and time in which none runs.

    profile = traced(call)
    print(table(profile))

Read from a trace of JAX's profiler. A kernel's time does not depend on how fast the host starts it, so
kernels of some microseconds are measured this way; `gaps_ms` is what the host costs.
"""

import dataclasses
import glob
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.profiler import ProfileData

__all__ = ["Profile", "collected", "table", "traced"]


@dataclasses.dataclass(frozen=True)
class Profile:
    """The device time of a call, in milliseconds.

    Attributes:
        kernels: name: (time, how often it ran), the longest first.
        busy_ms: time in which a kernel ran.
        gaps_ms: the rest between the first start and the last end.
    """

    kernels: dict[str, tuple[float, float]]
    busy_ms: float
    gaps_ms: float


def traced(call: Callable[[], Any], calls: int = 3) -> Profile:
    """Traces `calls` calls, one waited for after the other, and averages.

    Raises:
        RuntimeError: the trace holds no GPU kernels, as without a GPU or its profiling library.
    """
    jax.block_until_ready(call())
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                jax.block_until_ready(call())
        files = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        events, planes = [], []
        for file in files:
            data = ProfileData.from_file(file)
            for plane in data.planes:
                planes.append(plane.name)
                if "GPU" in plane.name.upper() and "host" not in plane.name.lower():
                    lines = list(plane.lines)
                    streams = [x for x in lines if "stream" in x.name.lower()] or lines
                    for line in streams:
                        events += [(e.name, e.start_ns, e.duration_ns) for e in line.events]
    if not events:
        raise RuntimeError(f"the trace has no GPU kernels; its planes are {planes}")
    return collected(events, calls)


def collected(events: Iterable[tuple[str, float, float]], calls: int) -> Profile:
    """The profile of events (name, start, duration) in nanoseconds, of `calls` equal calls.

    Calls are waited for one by one, so the longest `calls - 1` gaps are those between calls.
    """
    kernels: dict[str, tuple[float, float]] = {}
    busy, gaps, end = 0.0, [], None
    for name, start, duration in sorted(events, key=lambda e: e[1]):
        time, count = kernels.get(name, (0.0, 0.0))
        kernels[name] = (time + duration * 1e-6 / calls, count + 1 / calls)
        if end is not None and start > end:
            gaps.append(start - end)
        begin = start if end is None else max(start, end)
        end = start + duration if end is None else max(end, start + duration)
        busy += max(0.0, end - begin)
    inner = sorted(gaps)[: max(0, len(gaps) - (calls - 1))]
    ordered = dict(sorted(kernels.items(), key=lambda k: -k[1][0]))
    return Profile(ordered, busy * 1e-6 / calls, sum(inner) * 1e-6 / calls)


def table(profile: Profile, most: int = 24) -> str:
    """A table in text: time, count and name of the longest kernels, and sums."""
    lines = [
        f"  {time:8.4f} ms {count:6.1f} x  {name[:80]}"
        for name, (time, count) in list(profile.kernels.items())[:most]
    ]
    rest = list(profile.kernels.values())[most:]
    if rest:
        lines.append(
            f"  {sum(t for t, _ in rest):8.4f} ms {sum(n for _, n in rest):6.1f} x  others"
        )
    lines.append(
        f"  {profile.busy_ms:8.4f} ms busy, {profile.gaps_ms:.4f} ms of gaps between kernels"
    )
    return "\n".join(lines)
