"""The prompt as keys and values, and what becomes of its padding.

The released model zeroes padded text *after* its own projection and leaves it visible: each padded
row has key RMSNorm(key bias) and value = value bias, and they take a real share of the softmax. As
all padded rows are alike, one of them with ln(their number) added to its logit stands for all.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.longcat.modeling import LongCatDiT, TextKV


def read_text(
    model: LongCatDiT,
    text_BUE: Float[Array, "B U E"],
    mask_BU: Int[Array, "B U"] | Bool[Array, "B U"] | None = None,
    *,
    rows: int | None = None,
) -> TextKV:
    """Keys and values of prompts for all layers.

    Args:
        model: the transformer.
        text_BUE: the text encoder's output, padded to U rows (512 as released).
        mask_BU: nonzero for real tokens; None takes all rows as real.
        rows: keep this many rows and let one padded row stand for all others: the same result for
            less work, if every prompt's real tokens lie in the first rows - 1; see `kept_rows`.
            None keeps all.

    Raises:
        ValueError: shapes that do not fit, or `rows` out of range or without a mask.
    """
    config = model.config
    B, U = text_BUE.shape[:2]
    if text_BUE.ndim != 3 or text_BUE.shape[2] != config.text_width:
        raise ValueError(
            f"text_BUE has shape {text_BUE.shape}; accepted: (B, U, {config.text_width})"
        )
    if mask_BU is None:
        if rows is not None:
            raise ValueError(f"rows={rows} needs mask_BU, which says what is padding")
        return model.text_kv(model.text(text_BUE), jnp.zeros((B, U), jnp.float32))
    if mask_BU.shape != (B, U):
        raise ValueError(f"mask_BU has shape {mask_BU.shape}; accepted: {(B, U)}")
    if rows is not None and not 1 <= rows <= U:
        raise ValueError(f"rows={rows} is not accepted: give 1 to {U}")
    real_BU = mask_BU != 0
    padded_B1 = U - real_BU.sum(1, keepdims=True)
    kept = slice(None, rows)
    text_BUM, real_BU = model.text(text_BUE[:, kept]), real_BU[:, kept]
    if not config.zero_pad:
        bias_BU = jnp.where(real_BU, 0.0, -jnp.inf)
    else:
        text_BUM = text_BUM * real_BU[..., None].astype(text_BUM.dtype)
        bias_BU = jnp.zeros(real_BU.shape, jnp.float32)
        if rows is not None:
            # Of the padded rows that are left, the first stands for all and the rest is hidden.
            first_BU = ~real_BU & (jnp.cumsum(~real_BU, axis=1) == 1)
            count_BU = jnp.broadcast_to(padded_B1, real_BU.shape).astype(jnp.float32)
            hidden_BU = jnp.where(first_BU, jnp.log(jnp.maximum(count_BU, 1.0)), -jnp.inf)
            bias_BU = jnp.where(real_BU, bias_BU, hidden_BU)
    return model.text_kv(text_BUM, bias_BU.astype(jnp.float32))


def kept_rows(mask_BU: Int[np.ndarray, "B U"], multiple: int = 64) -> int:
    """The least `rows` for `read_text`, rounded up so that few programs are compiled.

    Args:
        mask_BU: nonzero for real tokens, on the host.
        multiple: granularity.
    """
    mask_BU = np.asarray(mask_BU) != 0
    last = np.where(mask_BU.any(1), mask_BU.shape[1] - np.argmax(mask_BU[:, ::-1], axis=1), 0)
    return int(min(mask_BU.shape[1], -(-(last.max(initial=0) + 1) // multiple) * multiple))
