"""Checkpoint names of the transformer: diffusers' Wan names and what WorldPlay added to them."""

from models.common.wan_names import DIFFUSERS_RULES, bare_name, linear_rules
from models.common.weights import Weights
from models.worldplay.modeling import WorldPlayDiT

# The first matching rule counts: `time_proj` sits elsewhere here, for it follows a sum of two.
RULES = (
    *linear_rules(r"condition_embedder\.action_embedder\.linear_1", "action.up"),
    *linear_rules(r"condition_embedder\.action_embedder\.linear_2", "action.down"),
    *linear_rules(r"condition_embedder\.time_proj", "project"),
    *linear_rules(r"blocks\.(\d+)\.attn1\.to_out_prope\.0", "blocks.prope_out", 1),
    *DIFFUSERS_RULES,
)


WEIGHTS = Weights(WorldPlayDiT, RULES, rename=lambda name, _: bare_name(name))
skeleton, load_dit, random_dit = WEIGHTS.skeleton, WEIGHTS.load, WEIGHTS.random
