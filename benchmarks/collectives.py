"""What the devices of a compiled program exchange, read from its HLO text: how often, and how many bytes.

    for name, found in exchanges(compiled.as_text()).items():
        print(name, found.count, found.sent(name, devices=2))

Loops count as often as the compiler knows that they run (`known_trip_count`), and once where it does not. Of the
branches of a conditional the one with most bytes counts.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

__all__ = ["COLLECTIVES", "Exchange", "exchanges", "sent_bytes"]

# Bytes that each of n devices sends for a byte of its operand, by a ring.
COLLECTIVES = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "reduce-scatter": lambda n: (n - 1) / n,
}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^| )([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=|false_computation=)([^}=]*)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)')


class Exchange(NamedTuple):
    """The collectives of one kind: how many run, and the bytes of a device's operands."""

    count: int
    operand_bytes: int

    def sent(self, name: str, devices: int) -> int:
        """The bytes that each of so many devices sends for them, as a collective of this name."""
        return round(COLLECTIVES[name](devices) * self.operand_bytes)


class _Operation(NamedTuple):
    """One line of a computation: what runs, the bytes of its operands, and what it calls how often."""

    name: str
    operand_bytes: int
    called: tuple[str, ...]
    branches: tuple[str, ...]
    trips: int


def exchanges(text: str) -> dict[str, Exchange]:
    """The collectives that one call of a program runs, by their names in `COLLECTIVES`.

    Args:
        text: HLO of the compiled program, as `compiled.as_text()` gives it.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations, entry = _computations(text)

    @functools.cache
    def of(computation: str) -> dict[str, Exchange]:
        total: collections.Counter = collections.Counter()
        for operation in computations.get(computation, ()):
            name = operation.name.removesuffix("-start")
            if name in COLLECTIVES:
                total[name, "count"] += 1
                total[name, "bytes"] += operation.operand_bytes
                continue
            inner = [of(called) for called in operation.called]
            if operation.branches:
                weight = lambda found: sum(x.operand_bytes for x in found.values())  # noqa: E731
                inner.append(max(map(of, operation.branches), key=weight))
            for found in inner:
                for kind, x in found.items():
                    total[kind, "count"] += operation.trips * x.count
                    total[kind, "bytes"] += operation.trips * x.operand_bytes
        return {
            kind: Exchange(total[kind, "count"], total[kind, "bytes"])
            for kind in COLLECTIVES
            if total[kind, "count"]
        }

    return of(entry)


def sent_bytes(text: str, devices: int) -> int:
    """The bytes that each of so many devices sends in one call of a program, by its HLO text."""
    return sum(x.sent(name, devices) for name, x in exchanges(text).items())


def _computations(text: str) -> tuple[dict[str, list[_Operation]], str]:
    """The operations of all computations by name, and the name of the entry."""
    found: dict[str, list[_Operation]] = {}
    entry, lines, sizes = None, [], {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines, sizes = found.setdefault(header[2], []), {}
            entry = header[2] if header[1] else entry
        elif (parts := _LINE.match(line)) and (at := _OPERATION.search(parts[2])):
            sizes[parts[1]] = _bytes(parts[2][: at.start()])
            lines.append(_operation(at[1], parts[2][at.end() :], sizes))
    if entry is None:
        raise ValueError(
            "text has no ENTRY computation; accepted: HLO as compiled.as_text() has it"
        )
    return found, entry


def _operation(name: str, rest: str, sizes: dict[str, int]) -> _Operation:
    operands, _, attributes = rest.partition(")")
    branches = " ".join(_BRANCHES.findall(attributes)) if name == "conditional" else ""
    ends = name.endswith(("-done", "-update"))  # which name the computation of their start again
    trips = _TRIPS.search(attributes) if name == "while" else None
    return _Operation(
        name=name,
        operand_bytes=sum(sizes.get(x, 0) for x in re.findall(r"%([\w.\-]+)", operands)),
        called=() if ends else tuple(_CALLED.findall(attributes)),
        branches=tuple(re.findall(r"%([\w.\-]+)", branches)),
        trips=int(trips[1]) if trips else 1,
    )


def _bytes(shape: str) -> int:
    """The bytes of a shape, or of all shapes of a tuple."""
    total = 0
    for kind, bits, sizes in _SHAPE.findall(shape):
        elements = math.prod(int(n) for n in sizes.split(",") if n)
        total += -(-elements * (8 if kind == "pred" else int(bits)) // 8)
    return total
