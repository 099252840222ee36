"""Stored names of transformers grown from Wan2.1: the original ones and those of diffusers."""

import re

import numpy as np

from models.common.checkpoint import Rule, linear_kernel, patch_kernel


def _first_axis_off(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[1:])  # [1, n, M] -> [n, M]; any other first axis raises


def linear_rules(pattern: str, path: str, layer: int | None = None) -> tuple[Rule, Rule]:
    """The rules for weight and bias of a linear layer; `pattern` and `path` as in `Rule`."""
    return (
        Rule(pattern + r"\.weight", path + ".kernel", linear_kernel, layer),
        Rule(pattern + r"\.bias", path + ".bias", layer=layer),
    )


def _attention(ours: str, theirs: str, q: str, k: str, v: str, o: str) -> tuple[Rule, ...]:
    at = r"blocks\.(\d+)\." + theirs + r"\."
    matrices = zip("qkvo", (q, k, v, o), strict=True)
    return (
        *(r for name, stored in matrices for r in linear_rules(at + stored, f"{ours}.{name}", 1)),
        Rule(at + r"norm_q\.weight", f"{ours}.norm_q.weight", layer=1),
        Rule(at + r"norm_k\.weight", f"{ours}.norm_k.weight", layer=1),
    )


_BOTH = (
    Rule(r"patch_embedding\.weight", "patch.kernel", patch_kernel),
    Rule(r"patch_embedding\.bias", "patch.bias"),
)

WAN_RULES = (
    *_BOTH,
    *linear_rules(r"text_embedding\.0", "text.up"),
    *linear_rules(r"text_embedding\.2", "text.down"),
    *linear_rules(r"time_embedding\.0", "time.up"),
    *linear_rules(r"time_embedding\.2", "time.down"),
    *linear_rules(r"time_projection\.1", "time.project"),
    Rule(r"blocks\.(\d+)\.modulation", "blocks.modulation", _first_axis_off, 1),
    *_attention("blocks.self_attn", "self_attn", "q", "k", "v", "o"),
    Rule(r"blocks\.(\d+)\.norm3\.weight", "blocks.cross_norm.scale", layer=1),
    Rule(r"blocks\.(\d+)\.norm3\.bias", "blocks.cross_norm.bias", layer=1),
    *_attention("blocks.cross_attn", "cross_attn", "q", "k", "v", "o"),
    *linear_rules(r"blocks\.(\d+)\.ffn\.0", "blocks.ffn.up", 1),
    *linear_rules(r"blocks\.(\d+)\.ffn\.2", "blocks.ffn.down", 1),
    Rule(r"head\.modulation", "head.modulation", _first_axis_off),
    *linear_rules(r"head\.head", "head.project"),
)

# Mind the trap: the affine norm before cross-attention is `norm3` in Wan and `norm2` in diffusers.
DIFFUSERS_RULES = (
    *_BOTH,
    *linear_rules(r"condition_embedder\.text_embedder\.linear_1", "text.up"),
    *linear_rules(r"condition_embedder\.text_embedder\.linear_2", "text.down"),
    *linear_rules(r"condition_embedder\.time_embedder\.linear_1", "time.up"),
    *linear_rules(r"condition_embedder\.time_embedder\.linear_2", "time.down"),
    *linear_rules(r"condition_embedder\.time_proj", "time.project"),
    Rule(r"blocks\.(\d+)\.scale_shift_table", "blocks.modulation", _first_axis_off, 1),
    *_attention("blocks.self_attn", "attn1", "to_q", "to_k", "to_v", r"to_out\.0"),
    Rule(r"blocks\.(\d+)\.norm2\.weight", "blocks.cross_norm.scale", layer=1),
    Rule(r"blocks\.(\d+)\.norm2\.bias", "blocks.cross_norm.bias", layer=1),
    *_attention("blocks.cross_attn", "attn2", "to_q", "to_k", "to_v", r"to_out\.0"),
    *linear_rules(r"blocks\.(\d+)\.ffn\.net\.0\.proj", "blocks.ffn.up", 1),
    *linear_rules(r"blocks\.(\d+)\.ffn\.net\.2", "blocks.ffn.down", 1),
    Rule(r"scale_shift_table", "head.modulation", _first_axis_off),
    *linear_rules(r"proj_out", "head.project"),
)

# The two namings share only the patch embedding, so one table reads both.
RULES = WAN_RULES + tuple(r for r in DIFFUSERS_RULES if r not in _BOTH)


def bare_name(name: str) -> str:
    """Strips what wrappers put in front: `model.` once, `_fsdp_wrapped_module.` anywhere."""
    return re.sub(r"^model\.", "", name.replace("_fsdp_wrapped_module.", ""))
