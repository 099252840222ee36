"""One of the processes of a run: `python two_processes.py PORT PROCESSES PROCESS VERSIONS [DYING]`.

It rolls out a small cache spread over the devices of all processes, and prints the last block. The process DYING
ends in the middle.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from models.runs.devices import check_versions, join_processes
from models.self_forcing.entry import Options

port, processes, process, versions, *dying = sys.argv[1:]
options = Options(coordinator=f"127.0.0.1:{port}", processes=int(processes), process=int(process))
join_processes(options)

import qvg_jax as qvg  # noqa: E402
from qvg_jax.app.lost_devices import leave, told_of_lost_devices  # noqa: E402
from qvg_jax.errors import LostDeviceError  # noqa: E402
from tests.support.spread_caches import BATCH, CODECS, ROPE, SIZES, TOKENS, block  # noqa: E402


def step(state, i):
    k, v, _ = (jnp.asarray(x) for x in block(0))
    positions = jnp.full((BATCH, TOKENS, 1), i, jnp.float32)
    out = qvg.attend(k[0], state.view(positions, ROPE), k[0], v[0], layer=0)
    state = qvg.compress(qvg.append(state, k + out[None], v - out[None], positions))
    return state, out


check_versions(versions)
plan = qvg.Plan(spans=jax.device_count())
assert jax.device_count() == int(processes) * jax.local_device_count()
cache = qvg.KVCache.create(**SIZES | CODECS, sharding=plan if plan.devices > 1 else None)


def end(done, total, state):
    if [process] == dying:
        os._exit(9)


try:
    with told_of_lost_devices(options):
        blocks = np.arange(8, dtype=np.float32)
        cache, out = qvg.rollout(step, cache, blocks, chunk=4, progress=end)
except LostDeviceError as error:
    print(error, file=sys.stderr)
    leave(2)
print("spans", int(cache.num_spans), "out", *np.asarray(out)[-1].ravel()[:8].tolist())
