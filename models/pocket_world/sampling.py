"""How a block comes out of noise: the noise levels of a sampler, and one step between two of them."""

import dataclasses

import jax.numpy as jnp

OWN_FRAME_NOISE = 0.02  # noise level told with generated frames, in training and when sampling
SHIFT = 8.0


def shifted(u, shift: float = SHIFT):
    """Noise level s of u in [0, 1]: s(u) = shift u / (1 + (shift - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a block is denoised: few steps of second order, see `second_order_step`.

    Attributes:
        steps: denoising evaluations per block.
        shift: spacing of the noise levels s(u), u = 1 .. 0, see `shifted`. A large one spends the
            steps where a place never seen takes shape; known places do not care.
        context_noise: noise level told to the context pass of generated frames.
    """

    steps: int = 4
    shift: float = SHIFT
    context_noise: float = OWN_FRAME_NOISE

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}; accepted: a whole number of at least 1")

    def levels(self) -> tuple[float, ...]:
        """steps + 1 noise levels from 1 to 0."""
        return tuple(shifted(1 - i / self.steps, self.shift) for i in range(self.steps + 1))


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
