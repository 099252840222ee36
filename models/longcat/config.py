"""Sizes of the LongCat-Video transformer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from msgspec import Meta, Struct

from qvg_jax.attention.tiles import TileRule
from qvg_jax.reading.schema import Size, checked


class _Tiles(Struct, kw_only=True, forbid_unknown_fields=True):
    """The field `bsa_params` of LongCat's `config.json`, with the defaults of its code."""

    sparsity: float | None = 0.875
    cdf_threshold: float | None = None
    chunk_3d_shape_q: tuple[Size, Size, Size] = (4, 4, 8)
    chunk_3d_shape_k: tuple[Size, Size, Size] = (4, 4, 8)


class _File(Struct, kw_only=True):
    """The fields of LongCat's `config.json` that decide shapes or arithmetic."""

    depth: Annotated[int, Meta(ge=1, le=1024)]
    hidden_size: Size
    num_heads: Annotated[int, Meta(ge=1, le=1024)]
    mlp_ratio: Annotated[int, Meta(gt=0, le=64)] | Annotated[float, Meta(gt=0, le=64)] = 4
    in_channels: Size = 16
    out_channels: Size = 16
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    frequency_embedding_size: Size = 256
    adaln_tembed_dim: Size = 512
    caption_channels: Size = 4096
    text_tokens_zero_pad: bool = False
    enable_bsa: bool | None = False
    bsa_params: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LongCatConfig:
    """Everything that decides the shapes and the arithmetic of the transformer.

    The height and width of the video are not here: any grid that the patch divides works.

    Attributes:
        layers, width, heads: size of the transformer; head_dim = width / heads.
        mlp_ratio: decides `ffn_width`.
        latent_channels, out_channels: channels of the latent video, in and out.
        patch: (rows, columns) of latent pixels per token; one latent frame deep.
        time_width: width of the sinusoid of the timestep.
        condition_width: width of the timestep embedding that modulates every layer.
        text_width: width of the text embedding.
        zero_pad: whether padded text is zeroed and stays visible (True, as released) or is hidden.
        eps: added to the variance in every norm.
        rope_theta: base of the RoPE frequencies.
        dtype: dtype of the weights and of the activations between the float32 islands.
        attention, precision: how attention to the cache is computed, see `qvg_jax.attend`.
        tiles: which key tiles a tile of queries reads in the plain and the joint pass, as the refinement at
            720p has it; None is dense attention. The cached pass refuses it.

    Raises:
        ValueError: sizes that do not fit together.

    Source: LongCat-Video (arXiv 2510.22200), released configuration.
    """

    layers: int
    width: int
    heads: int
    mlp_ratio: int | float = 4
    latent_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int] = (2, 2)
    time_width: int = 256
    condition_width: int = 512
    text_width: int = 4096
    zero_pad: bool = True
    eps: float = 1e-6
    rope_theta: float = 10000.0
    dtype: DTypeLike = jnp.bfloat16
    attention: str | None = None
    precision: str | None = None
    tiles: TileRule | None = None

    def __post_init__(self):
        if self.width % self.heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"width={self.width} must be heads={self.heads} times an even head size >= 6"
            )
        if self.time_width % 2:
            raise ValueError(f"time_width={self.time_width} must be even: cosines and sines")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.width // self.heads

    @property
    def ffn_width(self) -> int:
        """Two thirds of width x mlp_ratio, rounded up to a multiple of 256: 11,008 for 4,096."""
        inner = int(2 * int(self.width * self.mlp_ratio) / 3)
        return -(-inner // 256) * 256

    @classmethod
    def longcat_video(cls, *, dtype: DTypeLike = jnp.bfloat16) -> "LongCatConfig":
        """The released checkpoint: 13,581,071,424 parameters in 1,022 tensors."""
        return cls(layers=48, width=4096, heads=32, dtype=dtype)

    @classmethod
    def from_json(
        cls, sizes: Mapping[str, Any], *, dtype: DTypeLike = jnp.bfloat16
    ) -> "LongCatConfig":
        """The configuration written with the original key names (`depth`, `hidden_size`, ...).

        Args:
            sizes: the mapping found in the checkpoint's `config.json`. Keys that do not change the
                arithmetic are ignored.
            dtype: dtype of weights and activations.

        Raises:
            ValueError: a variant whose arithmetic differs (patches over time), block-sparse attention
                without its parameters or with wrong ones, or a size is missing.
        """
        file = checked(sizes, _File)
        if file.patch_size[0] != 1:
            raise ValueError(
                f"patch_size={file.patch_size} is not supported; need (1, rows, columns)"
            )
        return cls(
            layers=file.depth,
            width=file.hidden_size,
            heads=file.num_heads,
            mlp_ratio=file.mlp_ratio,
            latent_channels=file.in_channels,
            out_channels=file.out_channels,
            patch=file.patch_size[1:],
            time_width=file.frequency_embedding_size,
            condition_width=file.adaln_tembed_dim,
            text_width=file.caption_channels,
            zero_pad=file.text_tokens_zero_pad,
            dtype=dtype,
            tiles=_tiles(file),
        )

    def grid(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Token rows and columns of one latent frame; raises if the patch does not divide it."""
        rows, columns = self.patch
        if latent_height % rows or latent_width % columns:
            raise ValueError(
                f"latent height x width {latent_height} x {latent_width} must be a multiple of "
                f"the patch {rows} x {columns}"
            )
        return latent_height // rows, latent_width // columns


def _tiles(file: _File) -> TileRule | None:
    if not file.enable_bsa:  # the released file has the parameters and leaves them off
        return None
    if file.bsa_params is None:
        raise ValueError("enable_bsa=True without bsa_params; accepted: with sparsity and tiles")
    asked = checked(file.bsa_params, _Tiles, "bsa_params")
    return TileRule(
        query_tile=asked.chunk_3d_shape_q,
        key_tile=asked.chunk_3d_shape_k,
        sparsity=asked.sparsity,
        mass=asked.cdf_threshold,
    )
