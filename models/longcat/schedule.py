"""Noise levels of a clip: which timesteps the network is told, and how far each step goes.

Everything is computed on the host, once. sigma is the fraction of noise: x = (1 - sigma) x0 +
sigma noise, and the timestep is 1000 sigma.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

TRAIN_STEPS = 1000
SHIFT = 12.0  # of the released scheduler; 1 is straight


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """J network evaluations.

    Attributes:
        timesteps: float32 [J], falling, 0..1000.
        sigmas: float32 [J + 1], the noise fraction before each step, and 0 at the end.
        guided: whether the schedule may be used with guidance; a distilled one may not.
    """

    timesteps: Float[np.ndarray, "J"]
    sigmas: Float[np.ndarray, "J+1"]
    guided: bool = True

    @property
    def steps(self) -> int:
        """Network evaluations, J."""
        return len(self.timesteps)


def shifted(raw: Float[np.ndarray, "J"], shift: float = SHIFT) -> Float[np.ndarray, "J"]:
    """shift s / (1 + (shift - 1) s), float32: leans the levels towards noise."""
    raw = raw.astype(np.float32)
    return (shift * raw / (1 + (shift - 1) * raw)).astype(np.float32)


def raw_levels(steps: int) -> Float[np.ndarray, "J"]:
    """J levels from 1 to 0.001, both included, before the shift.

    Raises:
        ValueError: `steps` < 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} is not accepted: give 1 or more")
    return np.linspace(1.0, 1 / TRAIN_STEPS, steps, dtype=np.float32)


def raw_distilled_levels(steps: int) -> Float[np.ndarray, "J"]:
    """J of the 50 levels 1, 0.98, ..., 0.02 that the step LoRA was trained on.

    Raises:
        ValueError: `steps` outside 1..50.
    """
    if not 1 <= steps <= 50:
        raise ValueError(f"steps={steps} is not accepted: give 1 to 50, the levels of the LoRA")
    grid = np.arange(50, 0, -1, dtype=np.float32) / np.float32(50)
    return grid[np.arange(steps) * 50 // steps]


def _schedule(timesteps: np.ndarray, *, guided: bool = True) -> Schedule:
    sigmas = np.append(timesteps / np.float32(TRAIN_STEPS), np.float32(0))
    return Schedule(timesteps, sigmas.astype(np.float32), guided)


def _from_levels(raw: np.ndarray, shift: float, *, guided: bool = True) -> Schedule:
    sigmas = shifted(raw, shift)
    timesteps = sigmas * np.float32(TRAIN_STEPS)
    return Schedule(timesteps, np.append(sigmas, np.float32(0)), guided)


def standard(steps: int = 50, shift: float = SHIFT) -> Schedule:
    """The plain schedule, for text and image to video.

    Source: LongCat-Video (arXiv 2510.22200), released pipelines.
    """
    return _from_levels(raw_levels(steps), shift)


def continuation(steps: int = 50, shift: float = SHIFT) -> Schedule:
    """The schedule of video continuation: 56 evaluations for steps=50.

    What the standard schedule has above 500, then ten even steps from 500 down to 50.

    Source: LongCat-Video (arXiv 2510.22200), released pipelines.
    """
    above = standard(steps, shift).timesteps
    tail = np.arange(500, 0, -50, dtype=np.float32)
    return _schedule(np.concatenate([above[above > 500], tail]))


def distilled(steps: int = 16, shift: float = SHIFT) -> Schedule:
    """The few-step schedule of the step LoRA, without guidance.

    Source: LongCat-Video (arXiv 2510.22200), released pipelines.
    """
    return _from_levels(raw_distilled_levels(steps), shift, guided=False)


def refinement(steps: int = 50, threshold: float = 0.5, shift: float = SHIFT) -> Schedule:
    """What is left of the standard schedule below a noise fraction, the threshold first.

    Args:
        steps: of the standard schedule it is cut from.
        threshold: noise fraction that the start has.
        shift: as for `standard`.

    Raises:
        ValueError: `threshold` outside 0..1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is not accepted: give a fraction in (0, 1]")
    start = np.float32(threshold * TRAIN_STEPS)
    below = standard(steps, shift).timesteps
    return _schedule(np.concatenate([[start], below[below < start]]).astype(np.float32))
