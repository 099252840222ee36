"""Self-Forcing: the causal, few-step Wan2.1-T2V-1.3B, with a cache that may be compressed."""

from models.common.wan_text import TextKV
from models.self_forcing.block import BlockNoise, State
from models.self_forcing.config import SamplerConfig, SelfForcingConfig
from models.self_forcing.history import History, make_cache, recall
from models.self_forcing.modeling import Output, SelfForcingDiT
from models.self_forcing.params import load_dit, random_dit, skeleton
from models.self_forcing.pipeline import Request, SelfForcing
from models.self_forcing.schedule import compressions, network_calls, plan_blocks

__all__ = [
    "BlockNoise",
    "History",
    "Output",
    "Request",
    "SamplerConfig",
    "SelfForcing",
    "SelfForcingConfig",
    "SelfForcingDiT",
    "State",
    "TextKV",
    "compressions",
    "load_dit",
    "make_cache",
    "network_calls",
    "plan_blocks",
    "random_dit",
    "recall",
    "skeleton",
]
