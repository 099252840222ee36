"""The default device, what it can run, and the choice among implementations that may serve a call.

Nothing here imports kernels: the modules of Triton are loaded once a GPU that runs them is found.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

__all__ = [
    "Candidate",
    "Choice",
    "capability",
    "divided_automatically",
    "is_hopper",
    "no_hopper",
    "no_triton",
    "num_sms",
    "on_several_devices",
    "resolve",
    "row_major",
]


def _gpu() -> jax.Device | None:
    """The GPU that computations go to, or None."""
    device = jax.config.jax_default_device or jax.devices()[0]
    return None if isinstance(device, str) or device.platform != "gpu" else device


def capability() -> tuple[int, ...] | None:
    """Compute capability of the NVIDIA GPU that computations go to, such as (8, 6), or None."""
    numbers = str(getattr(_gpu(), "compute_capability", "")).split(".")
    return tuple(map(int, numbers)) if all(n.isdigit() for n in numbers) else None


def num_sms() -> int:
    """Streaming multiprocessors of that GPU; those of an H100 where the number is not known."""
    return getattr(_gpu(), "core_count", None) or 132


def is_hopper() -> bool:
    """Whether computations go to a GPU of compute capability 9."""
    return (capability() or (0,))[0] == 9


KERNELS_JAX = "0.11"  # whose Mosaic the kernels are written for; 0.12 lowers some of them no longer


def no_hopper() -> str | None:
    """The reason why kernels for Hopper GPUs cannot be called here, or None if they can."""
    if is_hopper():
        if jax.__version__.startswith(f"{KERNELS_JAX}."):
            return None
        return (
            f"jax {jax.__version__} is installed, and the kernels are for jax {KERNELS_JAX}: "
            "pip install 'qvg-jax[gpu]'"
        )
    return f"the default device is {jax.devices()[0].platform}; it must be a Hopper GPU"


def no_triton() -> str | None:
    """The reason why Triton kernels cannot be called here, or None if they can."""
    if (capability() or (0,))[0] < 8:
        device = jax.devices()[0]
        found = f"{device.platform} {getattr(device, 'compute_capability', '')}".strip()
        return f"the default device is {found}; it must be a GPU of compute capability 8.0 or more"
    from pallas_kernels.gpu.triton_launch import missing

    return missing()


def on_several_devices(x: Array) -> str | None:
    """The reason why kernels cannot be called on x, which is spread over devices; None if it is not."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.are_all_axes_manual:
        return None
    return "arrays on several devices; inside of shard_map they can be read"


def divided_automatically(function: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """The function with mesh axes of explicit type made automatic inside, for results placed as `like`.

    Codecs begin loops from constants, whose types would not name the axes that the results have. XLA
    divides such loops by itself. Without explicit axes it is the function as it is.

    Args:
        function: its result has the structure of `like`.
        like: pytree of arrays.
    """
    types = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
    explicit = jax.sharding.AxisType.Explicit
    meshes = [t.mesh for t in jax.tree.leaves(types) if not t.mesh.empty]
    axes = {
        name: None
        for mesh in meshes
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == explicit
    }
    if not axes:
        return function
    return jax.sharding.auto_axes(function, axes=tuple(axes), out_sharding=types)


def row_major(x: Array) -> Array:
    """x with its last axis as the innermost one in memory; inside of jit.

    For arrays that are written into a large buffer. XLA lets the buffer take the layout of the write,
    and where that is transposed it transposes the whole buffer, before and after: for a GPU that was
    two more copies of a cache of 7.5 GB.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way of serving a call.

    Attributes:
        implementation: the name by which a caller asks for it.
        why_not: `why_not(call)` is the reason why it cannot serve a call, or None if it can.
        precision: "bf16" or "fp8", of its matrix products; None is that of the arguments.
        decoding: "kernels" or "xla", by which it decodes compressed spans; None if that says nothing.
        named: True if it runs only for callers who name its implementation or its precision, False if
            only for callers who name neither, None for both.
        why_name: `why_name(call)` is the reason why it serves a call only for callers who name it, or
            None if it needs no name; it is asked when `why_not` has none.
    """

    implementation: str
    why_not: Callable[[Any], str | None]
    precision: str | None = None
    decoding: str | None = None
    named: bool | None = None
    why_name: Callable[[Any], str | None] | None = None

    def refuses(self, call: Any, *, named: bool) -> str | None:
        """The reason why it does not serve a call whose caller names it or not; None if it does."""
        why = self.why_not(call)
        return self.why_name(call) if why is None and self.why_name and not named else why

    def __str__(self) -> str:
        precision = f" in {self.precision}" if self.precision else ""
        decoding = f", spans decoded by {self.decoding}" if self.decoding else ""
        return f"{self.implementation}{precision}{decoding}"

    def is_meant(self, implementation: str | None, precision: str | None) -> bool:
        """Whether a caller who names these, or None, accepts this candidate."""
        if implementation is not None and implementation != self.implementation:
            return False
        if precision is not None and self.precision not in (None, precision):
            return False
        if precision == "fp8" and self.precision is None:
            return False
        if implementation is not None:
            # Who names an implementation and no precision gets that of its unnamed candidate.
            return self.named is not False and (precision is not None or self.precision != "fp8")
        return self.named is None or (self.named is True) == (precision == self.precision == "fp8")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What serves a call, and why other candidates do not.

    Attributes:
        chosen: the candidate that serves the call.
        refused: candidates before it in the order of preference, with the reason of each.
    """

    chosen: Candidate
    refused: dict[Candidate, str]

    def __str__(self) -> str:
        lines = [f"runs: {self.chosen}"]
        lines += [f"not {candidate}: {why}" for candidate, why in self.refused.items()]
        return "\n".join(lines)


def resolve(
    candidates: Sequence[Candidate],
    call: Any,
    *,
    implementation: str | None = None,
    precision: str | None = None,
) -> Choice:
    """The choice for a call: the first candidate that serves it; a named one is never replaced.

    Args:
        candidates: in order of preference.
        call: what `why_not` of the candidates is given.
        implementation, precision: what the caller names; None leaves the choice.

    Raises:
        ValueError: a name that no candidate has.
        NotImplementedError: no candidate of these names serves the call. The message has the reason of
            each, and what serves the call if nothing is named.
    """
    for argument, value in (("implementation", implementation), ("precision", precision)):
        names = dict.fromkeys(n for c in candidates if (n := getattr(c, argument)) is not None)
        if value is not None and value not in names:
            raise ValueError(f"{argument}={value!r} is not accepted: give one of {tuple(names)}")
    meant = [c for c in candidates if c.is_meant(implementation, precision)]
    chosen, refused = _first(meant, call, named=implementation is not None or precision is not None)
    if chosen is not None:
        return Choice(chosen, refused)
    given = {"implementation": implementation, "precision": precision}
    names = ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None)
    reasons = "; ".join(dict.fromkeys(refused.values()))
    if not meant:
        found = [str(c) for c in candidates if implementation in (None, c.implementation)]
        reasons = f"these do not go together; there is {', '.join(found)}"
    other, _ = _first([c for c in candidates if c.is_meant(None, None)], call)
    instead = "nothing serves it" if other is None else f"{other.implementation!r} serves it"
    if other is not None and implementation == other.implementation and precision is not None:
        instead += f" without precision={precision!r}"
    raise NotImplementedError(f"{names + ': ' if names else ''}{reasons}; {instead}")


def _first(
    candidates: Sequence[Candidate], call: Any, *, named: bool = False
) -> tuple[Candidate | None, dict[Candidate, str]]:
    """The first candidate that serves a call, or None; and why those before it do not."""
    refused = {}
    for candidate in candidates:
        if (why := candidate.refuses(call, named=named)) is None:
            return candidate, refused
        refused[candidate] = why
    return None, refused
