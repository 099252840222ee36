"""Names and shapes of released checkpoints, written out from their specifications."""


def longcat_shapes(c):
    """The shape of every tensor of a LongCat checkpoint, by its name."""
    M, C, D, N = c.width, c.condition_width, c.head_dim, c.ffn_width
    shapes = {"x_embedder.proj.weight": (M, c.latent_channels, 1, *c.patch)}
    shapes |= {"x_embedder.proj.bias": (M,)}
    matrices = {
        "t_embedder.mlp.0": (C, c.time_width),
        "t_embedder.mlp.2": (C, C),
        "y_embedder.y_proj.0": (M, c.text_width),
        "y_embedder.y_proj.2": (M, M),
        "final_layer.adaLN_modulation.1": (2 * M, C),
        "final_layer.linear": (c.out_channels * c.patch[0] * c.patch[1], M),
    }
    for i in range(c.layers):
        at = f"blocks.{i}."
        matrices |= {
            at + "adaLN_modulation.1": (6 * M, C),
            at + "attn.qkv": (3 * M, M),
            at + "attn.proj": (M, M),
            at + "cross_attn.q_linear": (M, M),
            at + "cross_attn.kv_linear": (2 * M, M),
            at + "cross_attn.proj": (M, M),
        }
        for kind in ("attn", "cross_attn"):
            shapes |= {f"{at}{kind}.{name}_norm.weight": (D,) for name in "qk"}
        shapes |= {f"{at}pre_crs_attn_norm.{name}": (M,) for name in ("weight", "bias")}
        shapes |= {f"{at}ffn.{name}.weight": (N, M) for name in ("w1", "w3")}
        shapes |= {f"{at}ffn.w2.weight": (M, N)}
    for name, shape in matrices.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    return shapes


def wan_shapes(c):
    """The shape of every tensor of a Wan 2.1 transformer with original names checkpoint, by its name."""
    M, ffn = c.width, c.ffn_width
    shapes = {
        "patch_embedding.weight": (M, c.latent_channels, 1, *c.patch),
        "patch_embedding.bias": (M,),
        "head.modulation": (1, 2, M),
    }
    matrices = {
        "text_embedding.0": (M, c.text_width),
        "text_embedding.2": (M, M),
        "time_embedding.0": (M, c.time_width),
        "time_embedding.2": (M, M),
        "time_projection.1": (6 * M, M),
        "head.head": (c.out_channels * c.patch[0] * c.patch[1], M),
    }
    for i in range(c.layers):
        at = f"blocks.{i}."
        for kind in ("self_attn", "cross_attn"):
            matrices |= {f"{at}{kind}.{name}": (M, M) for name in "qkvo"}
            shapes |= {f"{at}{kind}.norm_{name}.weight": (M,) for name in "qk"}
        matrices |= {at + "ffn.0": (ffn, M), at + "ffn.2": (M, ffn)}
        shapes |= {at + "modulation": (1, 6, M)}
        shapes |= {at + "norm3.weight": (M,), at + "norm3.bias": (M,)}
    for name, shape in matrices.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    return shapes


def worldplay_shapes(c):
    """The shape of every tensor of a WorldPlay checkpoint, by its name."""
    M, patch = c.width, c.patch[0] * c.patch[1]
    shapes = {
        "patch_embedding.weight": (M, c.latent_channels, 1, *c.patch),
        "patch_embedding.bias": (M,),
        "scale_shift_table": (1, 2, M),
    }
    matrices = {"condition_embedder.time_proj": (6 * M, M), "proj_out": (c.out_channels * patch, M)}
    for name, width in (("time", c.time_width), ("action", c.time_width), ("text", c.text_width)):
        at = f"condition_embedder.{name}_embedder.linear_"
        matrices |= {at + "1": (M, width), at + "2": (M, M)}
    for i in range(c.layers):
        at = f"blocks.{i}."
        for kind in ("attn1", "attn2"):
            names = ("to_q", "to_k", "to_v", "to_out.0")
            matrices |= {f"{at}{kind}.{name}": (M, M) for name in names}
            shapes |= {f"{at}{kind}.norm_{name}.weight": (M,) for name in "qk"}
        matrices |= {at + "attn1.to_out_prope.0": (M, M)}
        matrices |= {at + "ffn.net.0.proj": (c.ffn_width, M), at + "ffn.net.2": (M, c.ffn_width)}
        shapes |= {at + "scale_shift_table": (1, 6, M)}
        shapes |= {at + "norm2.weight": (M,), at + "norm2.bias": (M,)}
    for name, shape in matrices.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    return shapes
