"""LPIPS, the perceptual distance of two frames, by the package of its authors (extra `lpips`)."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from qvg_jax.errors import MissingExtraError

__all__ = ["load_lpips"]


def load_lpips() -> Callable[[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W 3"]], float]:
    """A function `lpips(frame, reference)`; 0 for equal frames.

    The network is VGG-16 on frames in [-1, 1]. The package brings its own weights and downloads
    those of VGG-16 when it is used first. Papers that feed frames in [0, 1] have other values.

    Raises:
        MissingExtraError: the package is not installed.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features", CVPR 2018.
    """
    try:
        import lpips as package  # pyrefly: ignore[missing-import]
        import torch  # pyrefly: ignore[missing-import]
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"--lpips needs {error.name}", "lpips") from error
    network = package.LPIPS(net="vgg", verbose=False).eval()

    def tensor(frame_HW3: np.ndarray):
        return torch.from_numpy(frame_HW3.transpose(2, 0, 1)[None] / np.float32(127.5) - 1)

    def lpips(frame_HW3: np.ndarray, reference_HW3: np.ndarray) -> float:
        with torch.no_grad():
            return float(network(tensor(frame_HW3), tensor(reference_HW3)))

    return lpips
