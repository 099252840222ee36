"""Sizes of the umT5 text encoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """Structure of the encoder.

    Args:
        vocabulary: rows of the token table.
        width: channels of a token.
        heads: attention heads.
        head_dim: channels of a head; heads * head_dim need not be `width`.
        ffn_width: hidden channels of the feed-forward part.
        layers: blocks.
        buckets: relative position buckets, half of them for each direction.
        max_distance: distance in tokens from which on all positions share a bucket.
        epsilon: added to the mean square in every norm.
        dtype: dtype of activations and parameters.
    """

    vocabulary: int
    width: int
    heads: int
    head_dim: int
    ffn_width: int
    layers: int
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.bfloat16

    def __post_init__(self):
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"buckets={self.buckets}, max_distance={self.max_distance}; accepted: buckets a "
                "multiple of 4 and max_distance above a quarter of them"
            )

    @classmethod
    def xxl(cls, *, dtype: DTypeLike = jnp.bfloat16) -> "UMT5Config":
        """The encoder of google/umt5-xxl, as used by Wan2.1: 5,680,910,336 parameters."""
        return cls(
            vocabulary=256384,
            width=4096,
            heads=64,
            head_dim=64,
            ffn_width=10240,
            layers=24,
            dtype=dtype,
        )

    @classmethod
    def from_json(
        cls, fields: Mapping[str, Any], *, dtype: DTypeLike = jnp.bfloat16
    ) -> "UMT5Config":
        """Config from the field names of Wan's text encoder.

        Args:
            fields: `vocab`, `dim`, `dim_attn`, `dim_ffn`, `num_heads`, `num_layers`, `num_buckets`
                and `shared_pos`, which must be false. Dropout is not used at inference.

        Raises:
            ValueError: one bias table for all layers (T5 rather than umT5), or the attention width
                is not a multiple of the heads.
        """
        if fields.get("shared_pos"):
            raise ValueError("shared_pos=True; accepted: False, a bias table per layer as in umT5")
        head_dim, rest = divmod(fields["dim_attn"], fields["num_heads"])
        if rest:
            raise ValueError(
                f"num_heads={fields['num_heads']} must divide dim_attn={fields['dim_attn']}; "
                f"got remainder {rest}"
            )
        return cls(
            vocabulary=fields["vocab"],
            width=fields["dim"],
            heads=fields["num_heads"],
            head_dim=head_dim,
            ffn_width=fields["dim_ffn"],
            layers=fields["num_layers"],
            buckets=fields["num_buckets"],
            dtype=dtype,
        )
