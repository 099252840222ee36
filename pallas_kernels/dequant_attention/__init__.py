"""Attention over a history that is decoded segment by segment."""

from pallas_kernels.dequant_attention.api import Queries, prepare, prepare_tokens, visit
from pallas_kernels.dequant_attention.schedule import (
    Schedule,
    combine_splits,
    log_sum_exp,
    schedule_for,
    splits_for,
)

__all__ = [
    "Queries",
    "Schedule",
    "combine_splits",
    "log_sum_exp",
    "prepare",
    "prepare_tokens",
    "schedule_for",
    "splits_for",
    "visit",
]
