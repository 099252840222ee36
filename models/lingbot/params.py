"""Checkpoint names of the transformer: Wan's, and those of the camera's layers."""

from models.common.wan_names import RULES as SHARED_RULES
from models.common.wan_names import bare_name, linear_rules
from models.common.weights import Weights
from models.lingbot.modeling import LingBotDiT

# The camera map is cut into patches as (channel, row, column), channel slowest, so the stored matrix
# fits `to_patches` as it is.
RULES = (
    *linear_rules(r"patch_embedding_wancamctrl", "camera_in"),
    *linear_rules(r"c2ws_hidden_states_layer1", "camera.up"),
    *linear_rules(r"c2ws_hidden_states_layer2", "camera.down"),
    *linear_rules(r"blocks\.(\d+)\.cam_injector_layer1", "blocks.camera.up", 1),
    *linear_rules(r"blocks\.(\d+)\.cam_injector_layer2", "blocks.camera.down", 1),
    *linear_rules(r"blocks\.(\d+)\.cam_scale_layer", "blocks.camera_scale", 1),
    *linear_rules(r"blocks\.(\d+)\.cam_shift_layer", "blocks.camera_shift", 1),
    *SHARED_RULES,
)

WEIGHTS = Weights(LingBotDiT, RULES, rename=lambda name, _: bare_name(name))
