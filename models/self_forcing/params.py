"""Checkpoint names of the transformer: the original ones (Wan, Self-Forcing) and diffusers'."""

from models.common.wan_names import RULES, bare_name
from models.common.weights import Weights
from models.self_forcing.modeling import SelfForcingDiT

WEIGHTS = Weights(SelfForcingDiT, RULES, rename=lambda name, _: bare_name(name))
skeleton, load_dit, random_dit = WEIGHTS.skeleton, WEIGHTS.load, WEIGHTS.random
