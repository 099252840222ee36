"""How a block comes out of noise: the noise levels of a sampler, and one step between two of them."""

import dataclasses

import jax.numpy as jnp

OWN_FRAME_NOISE = 0.02  # noise level told with generated frames, in training and when sampling
FREE_SHARPNESS = 0.08  # of walks through places never seen, measured: BENCHMARKS.md
FREE_OVERLAP = 0.7  # of the same walks, measured: docs/benchmarks/free-running.md
_TRAINED_BLOCKS = 40  # of history; training saw 24 and 56


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a block is denoised: few steps of second order, see `second_order_step`.

    Attributes:
        steps: denoising evaluations per block.
        shift: spacing of the noise levels s(u) = shift u / (1 + (shift - 1) u), u = 1 .. 0. A large
            one spends the steps where a place never seen takes shape; known places do not care.
        context_noise: noise level told to the context pass of generated frames.
        sharpness: how much larger logits of attention become with every doubling of a history that
            is longer than those of training. Over many more keys the same logits spread wider, and
            what is invented turns pale; a place that is remembered is found without.
        overlap: above 0, the last of `steps` evaluates patches whose centres are the corners of the
            others, so that the borders of what is invented lie inside of them: `overlap.py`. The number is its
            noise level, over that of the evaluation before. A single step stays as it is.
    """

    steps: int = 4
    shift: float = 8.0
    context_noise: float = OWN_FRAME_NOISE
    sharpness: float = 0.0
    overlap: float = 0.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}; accepted: a whole number of at least 1")
        if self.sharpness < 0:
            raise ValueError(f"sharpness={self.sharpness}; accepted: a number of at least 0")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap={self.overlap}; accepted: at least 0 and below 1")

    @property
    def overlapping(self) -> bool:
        """Whether the last evaluation is of overlapping patches."""
        return self.overlap > 0 and self.steps > 1

    def levels(self) -> tuple[float, ...]:
        """Noise levels from 1 to 0, or to the level at which overlapping patches are evaluated."""
        steps = self.steps - self.overlapping
        u = [1 - i / steps for i in range(steps + 1)]
        levels = tuple(self.shift * x / (1 + (self.shift - 1) * x) for x in u)
        return (*levels[:-1], self.overlap * levels[-2]) if self.overlapping else levels

    def logit_scale(self, blocks, head_dim: int):
        """Factor of the logits when attending to `blocks` blocks; None is 1 / sqrt(head_dim)."""
        if not self.sharpness:
            return None
        doublings = jnp.log2(jnp.maximum(blocks / _TRAINED_BLOCKS, 1.0))
        return (1 + self.sharpness * doublings) / head_dim**0.5


def second_order_step(x, clean, slope, now, then):
    """Takes x from noise level `now` to `then` along the flow of a prediction that changes with s.

    The flow dx/ds = (x - c(s)) / s of x = (1 - s) clean + s noise is d(x/s) / d(1/s) = c(s). With
    c(s) = clean + slope (s - now) the integral is exact:
        x' / s' = x / s + (clean - slope now) (1/s' - 1/s) + slope log(s / s').
    Slope 0 is Euler's step. The slope through the last two predictions costs no evaluation
    (two-step Adams-Bashforth, as in DPM-Solver++(2M), arXiv 2211.01095), and matters where a
    place is invented: Euler's few steps leave it pale.
    """
    ratio = then / now
    level = clean - slope * now
    bend = then * jnp.log(1 / jnp.where(then > 0, ratio, 1.0))
    return x * ratio + level * (1 - ratio) + slope * bend
