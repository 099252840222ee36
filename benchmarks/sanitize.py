"""One small call of every Mosaic kernel, for compute-sanitizer on a Hopper GPU.

    compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m benchmarks.sanitize

Partial tiles, formats of 1 to 4 bits, dithered codes, spans behind each other, new tokens behind those, windows, empty
segments, heads of 64, 128 and 256 channels. Prints a line for each call, and fails if one does. `--tool
racecheck` and `--tool synccheck` take it too.
"""

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator

# The tool watches allocations; a pool would hide what runs past one of them.
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dequant_attention import Schedule, prepare, prepare_tokens, visit
from pallas_kernels.dequantize import (
    Encoded,
    Rotation,
    Scheme,
    Spans,
    Tokens,
    Window,
    append_keys,
    append_values,
    decode_keys,
    decode_values,
)
from pallas_kernels.kmeans import Metric, kmeans_sums
from pallas_kernels.quantize_pack import (
    Dithered,
    Integers,
    Midrise,
    assign_and_pack,
    assign_and_subtract,
    pack_dithered,
)

E4M3 = jnp.float8_e4m3fn
_TOKENS = 304


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(jnp.bfloat16)


def _packed(rows: int, bits: int, group: int, stages: int, head_dim: int) -> tuple[Encoded, Scheme]:
    rng = np.random.default_rng(bits)
    whole = lambda most, *shape: rng.integers(0, most, shape).astype(np.uint8)  # noqa: E731
    return Encoded(
        codes_RTC=whole(256, rows, _TOKENS, head_dim * bits // 8),
        scales_RTG=whole(0x40, rows, _TOKENS, head_dim // group),
        ids_RST=whole(100, rows, stages, _TOKENS) if stages else None,
        centroids_RSKD=_noise(rows, stages, 100, head_dim) if stages else None,
    ), Scheme(bits, group, (2**bits - 1) / 2, stages)


def calls() -> Iterator[tuple[str, Callable, tuple]]:
    """Yields the name, the function and the arguments of every call."""
    for head_dim in (64, 128, 256):
        for dtype in (jnp.bfloat16, E4M3):
            yield from _reading(head_dim, dtype)
        yield _queries(head_dim)
    yield from _encoding()


def _reading(head_dim: int, dtype: jnp.dtype) -> Iterator[tuple[str, Callable, tuple]]:
    name = f"{jnp.dtype(dtype).name}, {head_dim} channels"
    angle = np.ones((3, _TOKENS, head_dim // 2), np.float32)
    here = dict(valid=_TOKENS, dtype=dtype, scale_n=np.ones(2, np.float32))
    for bits, group, stages in ((1, head_dim, 2), (2, 64, 1), (3, head_dim, 1), (4, 16, 0)):
        source, scheme = _packed(6, bits, group, stages, head_dim)
        yield (
            f"keys of {bits} bits to {name}",
            lambda s, x, c=scheme: decode_keys(
                Spans(s, c, 4, 2), rotation=Rotation((x, x), first=2), **here
            ),
            (source, angle),
        )
        yield (
            f"values of {bits} bits to {name}",
            lambda s, c=scheme: decode_values(Spans(s, c, 4, 2), **here),
            (source,),
        )
    source, scheme = _packed(6, 2, head_dim, 1, head_dim)
    source = dataclasses.replace(
        source, zeros_RTG=source.scales_RTG, deviations_RD=_noise(6, head_dim)
    )
    shifts = dict(dithered=True, zero_points=True, deviations=True)
    scheme = dataclasses.replace(scheme, offset=2 - 1 / 128, **shifts)
    for decode in (decode_keys, decode_values):
        yield (
            f"{decode.__name__} of dithered codes with zero points to {name}",
            lambda s, f=decode, c=scheme: f(Spans(s, c, 4, 2), **here),
            (source,),
        )
    source, scheme = _packed(6, 2, 64, 1, head_dim)
    three, more = np.asarray([4, 0, 2]), here | dict(valid=2 * _TOKENS)
    yield (
        f"keys of three spans to {name}",
        lambda s, x: decode_keys(
            Spans(s, scheme, three, 2), rotation=Rotation((x, x), first=np.arange(3)), **more
        ),
        (source, angle),
    )
    yield (
        f"values of three spans to {name}",
        lambda s: decode_values(Spans(s, scheme, three, 2), **more),
        (source,),
    )
    for decode in (decode_keys, decode_values):
        yield (
            f"{decode.__name__}, the end of plain tokens, to {name}",
            lambda x, f=decode: f(Window(Tokens(x, 1, 2), 260, 44), **here | dict(valid=44)),
            (_noise(3, _TOKENS, head_dim),),
        )

    def behind(source: Encoded, x: np.ndarray) -> list[jax.Array]:
        spans, scale_n = Spans(source, scheme, three, 2), here["scale_n"]
        return [
            append(
                decode(spans, room=70, **more), more["valid"], Tokens(x, 0, 2), valid=70,
                scale_n=scale_n,
            )
            for decode, append in ((decode_keys, append_keys), (decode_values, append_values))
        ]  # fmt: skip

    yield (
        f"new tokens behind spans to {name}",
        behind,
        (source, _noise(1, 70, 2, head_dim)),
    )
    yield from _attention(head_dim, dtype, name)


def _queries(head_dim: int) -> tuple[str, Callable, tuple]:
    here = dict(batch=1, heads=1, fp8=True)
    return (
        f"queries of {head_dim} channels",
        lambda q, x: prepare_tokens(q, jnp.float32(0.1), rotation=Rotation((x, x)), **here),
        (_noise(1, 75, 2, head_dim), np.ones((1, 75, head_dim // 2), np.float32)),
    )


def _encoding() -> Iterator[tuple[str, Callable, tuple]]:
    x, c = _noise(2, 1000, 128), _noise(2, 200, 128)
    yield "k-means sums", lambda x, c: kmeans_sums(x, c, scores=True, parts=3), (x, c)
    metric = Metric(np.zeros((2, 128), np.float32), np.ones((2, 128), np.float32))
    yield "subtract", assign_and_subtract, (x, c)
    yield "subtract by a metric", lambda x, c: assign_and_subtract(x, c, metric=metric), (x, c)
    forms = (
        Integers(2, 64), Integers(4, 128, zero_points=True), Midrise(1, 1.5958, 1, recode=False),
        Midrise(2, 1.0, 1, True),
    )  # fmt: skip
    for form in forms:
        yield f"pack, {form}", lambda x, c, f=form: assign_and_pack(x, c, f), (x, c)
    for dithered in (Dithered(2, 3.75, False), Dithered(4, 15.5, True)):
        pack = functools.partial(pack_dithered, form=dithered)
        yield f"pack, {dithered}", pack, (x, np.ones((2, 128), np.float32))


def _attention(head_dim: int, dtype: jnp.dtype, name: str) -> Iterator[tuple[str, Callable, tuple]]:
    k = _noise(2, 512, head_dim).astype(dtype)
    v = np.ascontiguousarray(k.swapaxes(1, 2)) if dtype == E4M3 else k
    for splits in (2, Schedule(4, 3, 2)):

        def run(q, k, v, valid, splits=splits):
            queries = prepare(q, jnp.float32(0.1), dtype)
            refs = [jax.new_ref(x) for x in visit(queries, k, v, valid, splits=splits)]
            for n in (0, valid):
                visit(queries, k, v, n, state=refs, splits=splits)
            return [r[...] for r in refs]

        yield f"attention in {name}, {splits}", run, (_noise(2, 200, head_dim), k, v, np.int32(400))


def main(argv: list[str] | None = None) -> int:
    """Runs all calls and returns the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="calls whose name contains one of these"
    )
    args = parser.parse_args(argv)
    failed = ran = 0
    for name, function, arguments in calls():
        if not any(part in name for part in args.only):
            continue
        ran += 1
        start = time.perf_counter()
        try:
            jax.block_until_ready(jax.jit(function)(*arguments))
            said = "ran"
        except Exception as error:  # one line for each call, whatever is wrong with it
            said, failed = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}", failed + 1
        print(f"{name:60} {time.perf_counter() - start:6.1f} s  {said}", flush=True)
    print(f"{ran} ran, {failed} failed")
    return failed if ran else 2


if __name__ == "__main__":
    sys.exit(main())
