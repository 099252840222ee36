"""The Wan2.1 video VAE: encoder and decoder as streams with a fixed-shape past."""

from models.wan_vae.config import WanVAEConfig
from models.wan_vae.layers import Past
from models.wan_vae.modeling import WanVAE, to_uint8
from models.wan_vae.params import load_wan_vae

__all__ = ["Past", "WanVAE", "WanVAEConfig", "load_wan_vae", "to_uint8"]
