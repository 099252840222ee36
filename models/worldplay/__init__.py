"""HY-WorldPlay on Wan2.2-TI2V-5B: a world to walk through, its memory compressed or not."""

from models.worldplay.block import BlockInput, Frames, State
from models.worldplay.cameras import CameraPath, action_ids, intrinsics, parse_actions, walk
from models.worldplay.config import SamplerConfig, WorldPlayConfig
from models.worldplay.history import History, make_cache
from models.worldplay.latents import denormalise, normalise
from models.worldplay.memory import recall
from models.worldplay.modeling import Output, WorldPlayDiT
from models.worldplay.params import load_dit, random_dit, skeleton
from models.worldplay.pipeline import WorldPlay
from models.worldplay.request import Request
from models.worldplay.retrieval import ball_points, select_frames
from models.worldplay.schedule import compressions, network_calls

__all__ = [
    "BlockInput",
    "CameraPath",
    "Frames",
    "History",
    "Output",
    "Request",
    "SamplerConfig",
    "State",
    "WorldPlay",
    "WorldPlayConfig",
    "WorldPlayDiT",
    "action_ids",
    "ball_points",
    "compressions",
    "denormalise",
    "intrinsics",
    "load_dit",
    "make_cache",
    "network_calls",
    "normalise",
    "parse_actions",
    "random_dit",
    "recall",
    "select_frames",
    "skeleton",
    "walk",
]
