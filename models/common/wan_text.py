"""How a prompt enters transformers grown from Wan2.1: by cross-attention in every layer.

Letters: L layers, B batch, U text slots, E text width, M model width, H heads, D head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class TextKV(NamedTuple):
    """Keys and values of the prompt for every layer's cross-attention: made once per prompt."""

    k_LBUHD: Float[Array, "L B U H D"]
    v_LBUHD: Float[Array, "L B U H D"]


class TextConditioned(nnx.Module):
    """A transformer's methods for the text that it reads by cross-attention.

    The transformer has `config`, `text` (a projection to the model width) and `blocks`, stacked
    layers that have a `cross_attn`.
    """

    def layer(self, index: int) -> nnx.Module:
        """One layer taken out of the stack, to look at."""
        graphdef, stacked = nnx.split(self.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], stacked))

    def encode_text(self, text_BUE: Float[Array, "B rows E"]) -> Float[Array, "B U M"]:
        """Zero-pads the text embedding to all slots and projects it to the model width."""
        slots, width = self.config.text_slots, self.config.text_width
        if text_BUE.ndim != 3 or text_BUE.shape[1] > slots or text_BUE.shape[2] != width:
            raise ValueError(
                f"text_BUE has shape {text_BUE.shape}; accepted: (B, at most {slots}, {width})"
            )
        padding = ((0, 0), (0, slots - text_BUE.shape[1]), (0, 0))
        return self.text(jnp.pad(text_BUE.astype(self.config.dtype), padding))

    def text_kv(self, text_BUE: Float[Array, "B rows E"]) -> TextKV:
        """Cross-attention keys and values of a prompt, for all layers.

        Args:
            text_BUE: text embedding without padding, at most `text_slots` rows.
        """
        encoded_BUM = self.encode_text(text_BUE)
        graphdef, stacked = nnx.split(self.blocks)

        def one_layer(_, state):
            return None, nnx.merge(graphdef, state).cross_attn.key_value(encoded_BUM)

        return TextKV(*jax.lax.scan(one_layer, None, stacked)[1])
