"""Attention over a history that is decoded segment by segment."""

from pallas_kernels.dequant_attention.api import Queries, finish, prepare, splits_for, visit

__all__ = ["Queries", "finish", "prepare", "splits_for", "visit"]
