"""Seconds of a denoising evaluation on several GPUs, predicted from what one H100 took.

What goes in was measured at the true size, on one H100 80GB with jax 0.11.2 (docs/benchmarks/longcat.md and
attention.md, 2026-11-26 and 2026-11-28). Devices divide heads and hidden channels, and add up results of all
tokens three times in a layer. With r = (n - 1) / n, T tokens of both branches, width M and b bytes an element
    seconds = (network + attention) / n + 3 layers 2 r b T M / link.
"""

from models.longcat.config import LongCatConfig
from models.longcat.settings import Settings
from models.runs.predicted import LINKS, reading_of
from qvg_jax.study.scale import Measured

__all__ = ["SOURCE", "evaluation_seconds"]

SOURCE = (
    "seconds of a denoising evaluation: predicted from times of one H100 (docs/benchmarks/longcat.md, "
    f"attention.md), {LINKS}"
)

# Seconds of attention of 7,800 queries and 32 heads to 45,240 keys, by what reads the cache.
ATTENTION = {"bf16": 10.1e-3, "mosaic": 10.0e-3, "mosaic_fp8": 7.32e-3}
QUERIES, KEYS, LAYERS = 7_800, 45_240, 48
# An evaluation of both branches took 1.462 s in bf16, with 96 calls of attention to 37,440 keys.
NETWORK = 1.462 - 96 * ATTENTION["bf16"] * 37_440 / KEYS
LINK = Measured(network=0.0, attention=0.0).link


def evaluation_seconds(settings: Settings, arm: str, count: int) -> float | None:
    """Seconds of an evaluation of both branches on so many devices, which may be one.

    None where nothing was measured: networks of another width, and codecs that no kernel reads.

    Args:
        settings: of the run.
        arm: which cache.
        count: of devices.
    """
    dit, released = settings.sizes.dit, LongCatConfig.longcat_video()
    way = reading_of(*settings.codecs[arm], dit.head_dim)
    if (dit.width, dit.heads) != (released.width, released.heads) or way is None:
        return None
    _, frames, _, rows, columns = settings.clip
    frame = rows * columns // 4
    keys, new = frames * frame, (frames - settings.segments.given_latents) * frame
    share = dit.layers / LAYERS * new / QUERIES
    attention = ATTENTION[way] * 2 * LAYERS * share * keys / KEYS
    added = 3 * dit.layers * 2 * (count - 1) / count * 2 * 2 * new * dit.width
    return (NETWORK * share + attention) / count + added / LINK
