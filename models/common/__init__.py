"""Parts that several models share."""

from models.common.checkpoint import (
    CheckpointError,
    Rule,
    as_stored,
    check,
    checkpoint_files,
    conv_kernel,
    linear_kernel,
    load,
    patch_kernel,
    vector,
)

__all__ = [
    "CheckpointError",
    "Rule",
    "as_stored",
    "check",
    "checkpoint_files",
    "conv_kernel",
    "linear_kernel",
    "load",
    "patch_kernel",
    "vector",
]
