"""Self-Forcing at its true size with random weights: one cache over several GPUs, against one GPU.

    python -m benchmarks.spread --out DIR                                   # one GPU and all others, four plans
    python -m benchmarks.spread --out DIR --arms qvg@mosaic_fp8 --plans spans,heads,spans+weights,ring

Prints a table and writes DIR/spread.json after every row: seconds of a block after each of --histories latent
frames that were filled in, of a block that encodes a span, bytes of the cache and of the program on each
device, what the compiled program exchanges (from its HLO text), the link between the devices, and what
`qvg_jax.study.scale` predicts of the row from the times of one device. A plan with `+weights` shares the weights
of the layers too. --together programs are compiled side by side, and then timed one after the other; what has not
begun after --budget seconds is left out, and said.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import names, numbers, some_arms, split_arm
from benchmarks.spread_table import exchanged, ring_bytes, table

ENCODES = 165  # frames after which the second block encodes a span of 24


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if args.tiny:  # on CPUs that play several devices
        flag = "--xla_force_host_platform_device_count=2"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    else:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.out / "compiled"))
    run = Run(args)
    run.measure()
    print(table(run.results))
    print(f"{run.results['seconds']:.0f} s; wrote {run.file}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--arms", type=some_arms, default=("qvg@mosaic_fp8",), help="CODEC or CODEC@IMPLEMENTATION")
    add("--plans", type=names, default=("spans", "heads", "spans+weights", "ring"))
    add("--devices", type=int, help="that share a cache; all if left out")
    add("--capacity", type=int, default=180, help="frames that the caches are made for")
    add("--histories", type=numbers, default=(54, 150), help="latent frames before a block")
    add("--repeats", type=int, default=3, help="blocks timed at each history")
    add("--encodes", type=int, default=ENCODES, help="frames before the block before an encoding")
    add("--together", type=int, default=3, help="programs compiled side by side")
    add("--budget", type=float, default=150, help="seconds after which no row begins")
    add("--span", type=int, help="latent frames compressed together (24)")
    add("--height", type=int, default=480)
    add("--width", type=int, default=832)
    add("--layers", type=int, default=30)
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help="a small network on two simulated devices")
    return parser.parse_args(argv)


class Run:
    """The networks, the rows that were measured, and the file that they are written to."""

    def __init__(self, args: argparse.Namespace):
        self.begin, self.args = time.perf_counter(), args
        import jax

        from benchmarks.common import device
        from benchmarks.self_forcing_setup import Setup

        args.limit_arm, args.heads = args.arms[0], "all"
        self.setup = Setup(args, vae=False, sizes=_tiny_sizes() if args.tiny else None)
        self.devices = args.devices or jax.device_count()
        self.file = args.out / "spread.json"
        self.results: dict[str, Any] = {
            "command": sys.argv[1:],
            "device": device() | {"count": jax.device_count()},
            "link": link_of(self.devices, 2**16 if args.tiny else 2**26),
            "rows": [],
        }

    def measure(self) -> None:
        """Compiles some rows, times them one after the other, and goes on with the next ones."""
        rows = [(arm, plan) for arm in self.args.arms for plan in ("alone", *self.args.plans)]
        for few in itertools.batched(rows, self.args.together):
            compiling, late = {}, self._seconds() > self.args.budget
            with concurrent.futures.ThreadPoolExecutor(len(few)) as pool:
                for row in () if late else few:
                    compiling[row] = self._compiling(row, pool)
            for row in few:
                found = dict(zip(("arm", "plan"), row, strict=True))
                found["compiled_after_seconds"] = self._seconds()
                self.results["rows"].append(found)
                try:
                    if late or self._seconds() > self.args.budget:
                        raise TimeoutError(f"left out: {self.args.budget:.0f} s were over")
                    self._row(*row, compiling[row].result(), found)
                except Exception as error:
                    found["error"] = f"{type(error).__name__}: {str(error)[:400]}"
                self.results["seconds"] = self._seconds()
                self.file.write_text(json.dumps(self.results, indent=1) + "\n")

    def _seconds(self) -> float:
        return round(time.perf_counter() - self.begin, 1)

    def _made(self, arm: str, plan: str) -> tuple[Any, Any, Any]:
        """The arguments of a program: the step with its weights, an empty state, inputs of a block."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from models.self_forcing.block import Known
        from models.self_forcing.pipeline import generating_step

        devices = {}
        if plan != "alone":
            axis, *more = plan.split("+")
            devices = dict(plan=axis, devices=self.devices, share_weights="weights" in more)
        pipeline, request = self.setup.pipeline(arm, self.args.capacity, **devices)
        size = (request.latent_height, request.latent_width)
        form = (1, self.setup.sizes.dit.frames_per_block, *size)
        step = generating_step(pipeline.sampler, form, True)
        shape = (1, *form[:2], *request.done_BFZYX.shape[2:])
        unknown = Known(np.zeros(1, bool), np.zeros(shape, request.done_BFZYX.dtype))
        inputs = jax.tree.map(jnp.asarray, (jax.random.split(jax.random.key(1), 1), unknown))
        return jax.tree_util.Partial(step, pipeline.model), pipeline.start(request), inputs

    def _compiling(self, row: tuple[str, str], pool: concurrent.futures.Executor) -> Any:
        """A future of the row's compiled program; tracing is done here, and errors are in the future."""
        import jax
        import numpy as np

        from qvg_jax.loop import run_chunk

        def form(x):
            apart = isinstance(x.sharding, jax.sharding.NamedSharding)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if apart else None)

        try:
            forms = jax.tree.map(form, self._made(*row))
            return pool.submit(run_chunk.lower(*forms, np.int32(1)).compile)
        except Exception as error:
            failed: concurrent.futures.Future = concurrent.futures.Future()
            failed.set_exception(error)
            return failed

    def _row(self, arm: str, plan: str, program: Any, found: dict[str, Any]) -> None:
        import jax

        from benchmarks.noise import filled

        args = self.args
        step, state, inputs = self._made(arm, plan)
        lay = state.cache.layout
        count = 1 if plan == "alone" else self.devices
        found |= {"devices": count, "slots": lay.max_spans, "cache_bytes": _on_devices(state.cache)}
        found["program_bytes"] = _program_bytes(program)
        found["exchanges"] = exchanged(program.as_text(), count)
        if plan.startswith("ring"):
            found["ring"] = ring_bytes(
                found["exchanges"], lay, self._calls(), self._tokens(), count
            )

        def block(state):
            begin = time.perf_counter()
            state, latents = program(step, state, inputs, 1)
            jax.block_until_ready((state, latents))
            return time.perf_counter() - begin, state, latents

        found["block_seconds"] = {}
        for history in args.histories:
            state = dataclasses.replace(state, cache=filled(state.cache, history))
            times = []
            for _ in range(1 + args.repeats):
                spent, state, latents = block(state)
                times.append(round(spent, 4))
            found["block_seconds"][str(history)] = times[1:]
        if lay.max_spans and args.encodes:
            state = dataclasses.replace(state, cache=filled(state.cache, args.encodes))
            for _ in range(2):
                before = int(state.cache.num_spans)
                spent, state, latents = block(state)
            if int(state.cache.num_spans) > before:
                found["encoding_block_seconds"] = round(spent, 4)
        found["finite"] = bool(jax.numpy.isfinite(latents.astype("float32")).all())
        found["peak_bytes_so_far"] = [
            (d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()
        ]
        self._compare(found)

    def _compare(self, found: dict[str, Any]) -> None:
        """Adds the ratio to one device of the same arm, and what is predicted from its times."""
        from qvg_jax.cache.plan import Plan
        from qvg_jax.study.scale import Measured, predict

        alone = next(r for r in self.results["rows"] if r["arm"] == found["arm"])
        if found is alone or "block_seconds" not in alone:
            return
        few, many = min(self.args.histories), max(self.args.histories)
        middle = lambda row, h: statistics.median(row["block_seconds"][str(h)])  # noqa: E731
        found["speed"] = round(middle(alone, many) / middle(found, many), 3)
        share = max(found["cache_bytes"].values()) / max(alone["cache_bytes"].values())
        found["share_of_the_cache"] = round(share, 4)
        if few == many:
            return
        n = self.setup.sizes.dit.frames_per_block
        keys = {h: h + n for h in (few, many)}
        rate = (middle(alone, many) - middle(alone, few)) / (keys[many] - keys[few])
        attention = max(0.0, rate * keys[many])
        measured = Measured(
            network=max(0.0, middle(alone, many) - attention), attention=attention, **self._link()
        )
        axis, *more = found["plan"].split("+")
        work = self._work(found, many, shared="weights" in more)
        told = predict(Plan(**{axis: found["devices"]}), work, measured)
        found["predicted_seconds"] = round(told.seconds, 4)
        found["predicted_sent_bytes"] = told.sent
        found["measured_over_predicted"] = round(middle(found, many) / told.seconds, 3)

    def _link(self) -> dict[str, float]:
        link = self.results["link"]
        return dict(link=link["bytes_a_second"], latency=link["latency_seconds"])

    def _work(self, found: dict[str, Any], history: int, *, shared: bool) -> Any:
        """The workload of a block that encodes nothing."""
        import jax

        from benchmarks.scale import workload

        dit, options = self.setup.sizes.dit, self.setup.options
        vae = self.setup.sizes.vae.spatial_stride
        work = workload(
            split_arm(found["arm"])[0],
            history=history,
            span=options.span or 24,
            height=options.height // vae,
            width=options.width // vae,
            config=dit,
        )
        blocks = jax.tree.leaves(self.setup.model.blocks)
        layer = sum(x.nbytes for x in blocks) // dit.layers if shared else 0
        more = dict(slots=found["slots"], layer_bytes=layer)
        return dataclasses.replace(work, span_blocks=10**6, **more)

    def _calls(self) -> int:
        from models.self_forcing.config import SamplerConfig

        return self.setup.sizes.dit.layers * (len(SamplerConfig().steps) + 1)

    def _tokens(self) -> int:
        dit, vae = self.setup.sizes.dit, self.setup.sizes.vae.spatial_stride
        rows, columns = dit.grid(self.args.height // vae, self.args.width // vae)
        return dit.frames_per_block * rows * columns


def link_of(devices: int, size: int, rounds: int = 20) -> dict[str, float]:
    """Bytes a second that each device sends to the next, all at once, and seconds of a small step."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import Mesh, NamedSharding

    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("x",))
    ahead = [(d, (d + 1) % devices) for d in range(devices)]

    def around(x):
        return lax.fori_loop(0, rounds, lambda _, x: lax.ppermute(x, "x", ahead), x)

    run = jax.jit(jax.shard_map(around, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x")))
    spent = {}
    for elements in (1024, size // 2):
        x = jnp.zeros((devices, elements), jnp.bfloat16)
        x = jax.device_put(x, NamedSharding(mesh, jax.P("x")))
        jax.block_until_ready(run(x))
        begin = time.perf_counter()
        jax.block_until_ready(run(x))
        spent[elements] = (time.perf_counter() - begin) / rounds
    small, large = spent[1024], spent[size // 2]
    return {"bytes": size, "bytes_a_second": size / large, "latency_seconds": small}


def _on_devices(cache: Any) -> dict[str, int]:
    """Bytes of a cache on each device that has some of it."""
    import jax

    found: dict[str, int] = {}
    for x in jax.tree.leaves(cache):
        for shard in x.addressable_shards:
            name = str(shard.device)
            found[name] = found.get(name, 0) + shard.data.nbytes
    return found


def _program_bytes(program: Any) -> int | None:
    """Device memory of a program: arguments, results that are not arguments, temporaries."""
    told = program.memory_analysis()
    if told is None:
        return None
    new = told.output_size_in_bytes - told.alias_size_in_bytes
    return told.argument_size_in_bytes + new + told.temp_size_in_bytes


def _tiny_sizes() -> Any:
    """Sizes of networks that a laptop runs in seconds."""
    import jax.numpy as jnp

    from models.self_forcing.settings import released_sizes

    sizes = released_sizes()
    small = dict(width=64, heads=2, ffn_width=64, time_width=8, text_width=12, text_slots=7)
    return dataclasses.replace(
        sizes, dit=dataclasses.replace(sizes.dit, **small, dtype=jnp.float32)
    )


if __name__ == "__main__":
    sys.exit(main())
