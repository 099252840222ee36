"""LingBot-World in the rooms of Self-Forcing: an image, a camera, a sink and a window."""

from models.lingbot.camera import camera_map, steps_of
from models.lingbot.config import LingBotConfig, history, sampler
from models.lingbot.modeling import LingBotDiT
from models.lingbot.pipeline import Request, generate, image_condition

__all__ = [
    "LingBotConfig",
    "LingBotDiT",
    "Request",
    "camera_map",
    "generate",
    "history",
    "image_condition",
    "sampler",
    "steps_of",
]
