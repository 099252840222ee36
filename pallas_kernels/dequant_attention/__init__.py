"""Attention over a history that is decoded segment by segment."""

from pallas_kernels.dequant_attention.api import (
    Queries,
    finish,
    prepare,
    prepare_tokens,
    splits_for,
    visit,
)
from pallas_kernels.dequant_attention.schedule import Schedule, join, schedule_for

__all__ = [
    "Queries", "Schedule", "finish", "join", "prepare", "prepare_tokens", "schedule_for",
    "splits_for", "visit",
]  # fmt: skip
