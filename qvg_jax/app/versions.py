"""Versions of this package and of what it uses, for `qvg --version` and for reports."""

import importlib.metadata
import platform

__all__ = ["own_version", "versions"]

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "av", "scikit-image", "matplotlib", "pillow")


def own_version() -> str:
    """The version of this package; "not installed" where only the source tree is there."""
    try:
        return importlib.metadata.version("qvg-jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of everything that the bytes of a report depend on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"qvg_jax": own_version(), "python": platform.python_version()} | found
