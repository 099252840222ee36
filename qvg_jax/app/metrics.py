"""How far frames are from other frames: PSNR and SSIM of 8-bit RGB, frame by frame."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from skimage.metrics import mean_squared_error, structural_similarity

__all__ = ["METRICS", "PSNR_CAP", "Metric", "psnr", "ssim", "to_uint8"]

type Metric = Callable[[np.ndarray, np.ndarray], float]  # metric(frame_HW3, reference_HW3)

# dB given to equal frames, so that means stay finite. One sample in a million, wrong by one step,
# is 108 dB; of the frames of a small model the worst such case is 91 dB.
PSNR_CAP = 100.0


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in [-1, 1] as they are written: rounded to 0 .. 255, NaN as 0."""
    levels = np.nan_to_num((np.asarray(frames, np.float32) + 1.0) * 127.5, nan=0.0)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def psnr(frame_HW3: UInt8[np.ndarray, "H W 3"], reference_HW3: UInt8[np.ndarray, "H W 3"]) -> float:
    """10 log10(255^2 / MSE) in dB, at most `PSNR_CAP`, which equal frames get."""
    error = mean_squared_error(reference_HW3, frame_HW3)
    return min(PSNR_CAP, 10 * math.log10(255.0**2 / error)) if error else PSNR_CAP


def ssim(frame_HW3: UInt8[np.ndarray, "H W 3"], reference_HW3: UInt8[np.ndarray, "H W 3"]) -> float:
    """Mean structural similarity over a 7 x 7 window and the three channels; 1 for equal frames.

    Source: Wang et al., "Image Quality Assessment", IEEE TIP 13(4), 2004, as in scikit-image.
    """
    return float(structural_similarity(reference_HW3, frame_HW3, channel_axis=-1, data_range=255))


METRICS: tuple[Metric, ...] = (psnr, ssim)  # of every run
