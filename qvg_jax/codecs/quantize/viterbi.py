"""The cheapest path through a shift-register trellis, for all tokens at once.

The register holds L bits. Step d shifts the k bits of code d in from the right, and what the register
then holds, s, stands for the level levels[s]. So a code can be read from any place: the register
is the last L bits, whatever was before.

Axes: N tokens, D steps, S = 2^L states, P = 2^k codes of a step.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

__all__ = ["cheapest_path", "closed_path"]


def cheapest_path(
    x_ND: Float[Array, "N D"],
    levels_S: Float[Array, "S"],
    bits: int,
    memory_N: Int32[Array, "N"] | None = None,
) -> Int32[Array, "N D"]:
    """Returns the register contents s_1 .. s_D with the least sum_d (x_d - levels[s_d])^2.

    Viterbi's algorithm: for every state the cheapest path that ends there, extended step by step.
    The P predecessors of a state differ in the bits that it shifts out, so they are P slices.
    Per element and token 2 S operations for the minimum, 3 S for the distance.

    Args:
        x_ND: what the levels should come near.
        levels_S: a level for every state.
        bits: k, at most log2 S.
        memory_N: the S / P bits that the register keeps of what was before the first step, and
            also those that it keeps after the last one. None leaves both free.

    Returns:
        The register after every step.
    """
    (n, _), states = x_ND.shape, levels_S.shape[0]
    codes, kept = 2**bits, states // 2**bits
    cost_NS = jnp.zeros((n, states), jnp.float32)
    if memory_N is not None:
        low_S = jnp.arange(states, dtype=jnp.int32) % kept
        allowed_NS = low_S[None] == memory_N[:, None]
        cost_NS = jnp.where(allowed_NS, 0, jnp.inf).astype(jnp.float32)

    def step(cost_NS: Array, x_N: Array) -> tuple[Array, Array]:
        out_NPK = cost_NS.reshape(n, codes, kept)  # the code that leaves comes first
        best_NK, left_NK = out_NPK[:, 0], jnp.zeros((n, kept), jnp.uint8)
        for p in range(1, codes):
            less_NK = out_NPK[:, p] < best_NK
            best_NK = jnp.where(less_NK, out_NPK[:, p], best_NK)
            left_NK = jnp.where(less_NK, jnp.uint8(p), left_NK)
        away_NS = jnp.square(x_N[:, None] - levels_S[None])
        return jnp.repeat(best_NK, codes, axis=1) + away_NS, left_NK

    cost_NS, left_DNK = lax.scan(step, cost_NS, x_ND.T)
    if memory_N is not None:
        cost_NS = jnp.where(allowed_NS, cost_NS, jnp.inf)

    def back(s_N: Array, left_NK: Array) -> tuple[Array, Array]:
        kept_N = s_N >> bits
        left_N = jnp.take_along_axis(left_NK, kept_N[:, None], axis=1)[:, 0]
        return left_N.astype(jnp.int32) * kept + kept_N, s_N

    last_N = jnp.argmin(cost_NS, axis=1).astype(jnp.int32)
    _, s_DN = lax.scan(back, last_N, left_DNK, reverse=True)
    return s_DN.T


def closed_path(
    x_ND: Float[Array, "N D"], levels_S: Float[Array, "S"], bits: int, around: int = 16
) -> Int32[Array, "N D"]:
    """Returns a path that ends as it begins, so that the codes of a token are a ring and need no start.

    What the register holds at the seam is taken from the free path through the last and the first
    `around` steps: a register forgets, so this is nearly what the whole ring would say. Costs
    1 + 2 around / D paths in place of the S / P of trying every start.

    Args:
        x_ND, levels_S, bits: as in `cheapest_path`.
        around: steps on both sides of the seam; as many as there are is best.

    Returns:
        As `cheapest_path`, with s_1 a successor of s_D.
    """
    around = min(around, x_ND.shape[1])
    seam_ND = jnp.concatenate([x_ND[:, -around:], x_ND[:, :around]], axis=1)
    kept = levels_S.shape[0] // 2**bits
    memory_N = cheapest_path(seam_ND, levels_S, bits)[:, around - 1] % kept
    return cheapest_path(x_ND, levels_S, bits, memory_N)
