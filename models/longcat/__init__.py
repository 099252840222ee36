"""LongCat-Video: long video by segments, with a condition cache that may be compressed."""

from models.longcat.condition import build_condition, condition_of, view_condition
from models.longcat.config import LongCatConfig
from models.longcat.lora import merge_lora
from models.longcat.modeling import LongCatDiT, Output, TextKV
from models.longcat.params import load_dit, random_dit, skeleton
from models.longcat.passes import cached_forward, clip_forward
from models.longcat.pipeline import LongCat, Prompt
from models.longcat.schedule import Schedule, continuation, distilled, refinement, standard
from models.longcat.segments import Segments, first_clip, long_video
from models.longcat.sharding import heads_mesh, placement, spread
from models.longcat.text import kept_rows, read_text

__all__ = [
    "LongCat",
    "LongCatConfig",
    "LongCatDiT",
    "Output",
    "Prompt",
    "Schedule",
    "Segments",
    "TextKV",
    "build_condition",
    "cached_forward",
    "clip_forward",
    "condition_of",
    "continuation",
    "distilled",
    "first_clip",
    "heads_mesh",
    "kept_rows",
    "load_dit",
    "long_video",
    "merge_lora",
    "placement",
    "random_dit",
    "read_text",
    "refinement",
    "skeleton",
    "spread",
    "standard",
    "view_condition",
]
