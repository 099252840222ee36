"""Plans: the device memory that a run needs, worked out before it runs.

Bytes of arrays come from their shapes (`jax.eval_shape`), temporaries from the compiled program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from qvg_jax.app.report import aligned

__all__ = ["Need", "Plan", "plan_table", "shape_bytes", "temporary_bytes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that one arm needs on the device.

    Attributes:
        name: of the arm.
        held: what is there all the time, by what it is, the cache under "cache".
        temporaries: what each compiled program needs beside it; one runs at a time.
        in_place_of_cache: the same of programs that run when the cache is gone.
        longest: latent frames that would fit, given the memory asked about; 0 for none, None for
            any number.
        seconds: predicted for the last block, or for what the plan names; None for unknown.
    """

    name: str
    held: dict[str, int]
    temporaries: dict[str, int]
    in_place_of_cache: dict[str, int] = dataclasses.field(default_factory=dict)
    longest: int | None = 0
    seconds: float | None = None

    @property
    def networks(self) -> dict[str, int]:
        """Bytes of what is there whatever the cache is, by what it is."""
        return {part: size for part, size in self.held.items() if part != "cache"}

    @property
    def total(self) -> int:
        """The most bytes that are in use at once."""
        beside = max(self.temporaries.values(), default=0)
        instead = max(self.in_place_of_cache.values(), default=0) - self.held["cache"]
        return sum(self.held.values()) + max(beside, instead)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Needs of all arms, each as if it ran alone.

    Attributes:
        what: the run, in words.
        before: bytes of what is there, alone, before the rest is loaded, by what it is.
        needs: of the arms.
        backend: where the programs were compiled.
        seconds: how long that took.
        advice: what to change where nothing fits.
        notes: further sentences, such as the source of predicted seconds.
        larger: what helps where the networks alone do not fit.
        timed: what the predicted seconds are of.
    """

    what: str
    before: dict[str, int]
    needs: tuple[Need, ...]
    backend: str
    seconds: float
    advice: str
    notes: tuple[str, ...] = ()
    larger: str = "a device with more memory"
    timed: str = "a block"

    def fits(self, need: Need, memory: int) -> bool:
        """Whether an arm runs in so many bytes."""
        return max(need.total, sum(self.before.values())) <= memory


def shape_bytes(tree: Any) -> int:
    """Bytes of arrays or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))


def temporary_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that a jitted function needs beside its arguments.

    They are temporaries, and results that do not take an argument's place.

    Args:
        function: from `jax.jit`.
        *args: arrays or their shapes.
    """
    memory = function.lower(*args).compile().memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + results


def plan_table(plan: Plan, memory: int) -> str:
    """The plan in words: a line for each arm, then what fits."""
    gb = lambda n: f"{n / 1e9:.2f}"  # noqa: E731
    parts = list(plan.needs[0].held)
    timed = any(need.seconds is not None for need in plan.needs)
    seconds = (f"s {plan.timed}",) if timed else ()
    rows = [("GB", *parts, "temporaries", "peak", f"in {gb(memory)}", "at most", *seconds)]
    for need in plan.needs:
        fits = "fits" if plan.fits(need, memory) else "too large"
        rows.append(
            (
                need.name,
                *(gb(need.held[part]) for part in parts),
                gb(max(need.temporaries.values())),
                gb(need.total),
                fits,
                _frames(need.longest),
                *([_seconds(need.seconds)] if timed else []),
            )
        )
    asked = f"Memory of a device: {gb(memory)} GB ({memory:,} bytes)."
    lines = [plan.what, asked, "", aligned(rows), ""]
    for name, size in plan.before.items():
        lines.append(f"Before that, alone: {name}, {gb(size)} GB.")
    worst = max(plan.needs, key=lambda need: max(need.temporaries.values()))
    programs = ", ".join(f"{name} {gb(size)}" for name, size in worst.temporaries.items())
    for name, size in worst.in_place_of_cache.items():
        programs += f", in place of the cache {name} {gb(size)}"
    lines.append(
        f"Temporaries: {programs}; from the programs compiled for {plan.backend} in "
        f"{plan.seconds:.0f} s."
    )
    if plan.backend == "cpu":
        lines.append(
            "A CPU keeps float32 copies of bfloat16 operands: on a GPU temporaries are smaller."
        )
    lines += [f"{note[0].upper()}{note[1:]}." for note in plan.notes]
    fitting = [need.name for need in plan.needs if plan.fits(need, memory)]
    # A codec's name may have commas.
    lines.append(
        f"Fits: {'; '.join(fitting)}." if fitting else f"Nothing fits: {_advice(plan, memory)}"
    )
    return "\n".join(lines)


def _frames(count: int | None) -> str:
    return "any number" if count is None else f"{count} frames" if count else "none"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f}"


def _advice(plan: Plan, memory: int) -> str:
    """What to change where nothing fits: a smaller cache helps only if there is room for the networks."""
    least = min(plan.needs, key=lambda need: sum(need.networks.values())).networks
    for sizes in (plan.before, least):
        if (size := sum(sizes.values())) > memory:
            names = " and ".join(filter(None, (", ".join([*sizes][:-1]), [*sizes][-1])))
            return (
                f"{names} alone, without any cache, take {size / 1e9:.2f} GB ({size:,} bytes); "
                f"accepted: {plan.larger}"
            )
    return plan.advice
