"""How long the command takes to say something that needs no model: help and what is wrong with options.

    python -m benchmarks.startup

prints for each command the median, the least and the most of 20 processes, in seconds of the clock and of
the processor. The first process of each is not counted: it may have to compile the modules.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

COMMANDS = {
    "--help": ("--help",),
    "generate --help": ("generate", "--help"),
    "--version": ("--version",),
    "no such command": ("dance",),
    "no such option": ("generate", "--loud"),
    "no number": ("generate", "--frames", "x"),
    "another model's option": ("generate", "self-forcing", "--tour", "8"),
}
TARGET = 0.5  # seconds


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each repeat, by the clock and of the processor."""

    clock: tuple[float, ...]
    processor: tuple[float, ...]


def measure(argv: Sequence[str], repeats: int = 20) -> Times:
    """Starts `python -m qvg_jax` with these arguments, again and again."""
    clock, processor = [], []
    for _ in range(1 + repeats):
        start, before = time.perf_counter(), os.times()
        command = [sys.executable, "-m", "qvg_jax", *argv]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        after = os.times()
        clock.append(time.perf_counter() - start)
        processor.append(
            after.children_user + after.children_system
            - before.children_user - before.children_system
        )  # fmt: skip
    return Times(tuple(clock[1:]), tuple(processor[1:]))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    print(f"{repeats} processes each, {os.cpu_count()} cores, load per core {busy:.1f}")
    print(f"{'command':24}{'clock: median':>15}{'least':>8}{'most':>8}{'processor: median':>20}")
    for name, argv in COMMANDS.items():
        t = measure(argv, repeats)
        clock = (statistics.median(t.clock), min(t.clock), max(t.clock))
        processor = statistics.median(t.processor)
        print(f"{name:24}{clock[0]:>15.2f}{clock[1]:>8.2f}{clock[2]:>8.2f}{processor:>20.2f}")


if __name__ == "__main__":
    main()
