"""Which codec for these keys and values: candidates measured on captured K, V and Q, and their Pareto front.

For every candidate: bits per element as stored, relative error ||x - x_hat|| / ||x|| of K and of V, and the
relative error of what attention makes of them with the real queries. The last is what a model sees: noise
on V averages out over the tokens that a query looks at, noise on K moves where it looks. Means hide what
breaks a model, so the worst layer, the worst queries and what becomes of the largest values count as much.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qvg_jax.codecs import presets
from qvg_jax.codecs.accounting import pair_bits
from qvg_jax.codecs.base import Codec
from qvg_jax.codecs.fitted import fitted
from qvg_jax.errors import UserError, told_to_user
from qvg_jax.files import replacing
from qvg_jax.study.capture import Captured, rotated

__all__ = [
    "Bench",
    "CLIPPED",
    "Score",
    "candidates",
    "draw",
    "pareto",
    "recommended",
    "restored",
    "tune",
]

CLUSTERED = (
    "qvg",
    "qvg-pro",
    "qvg-asym",
    "dither",
    "midrise",
    "midrise-k1v3",
    "midrise2",
    "midrise-1bit",
)
OTHERS = (
    "rtn",
    "kivi",
    "quarot",
    "turboquant",
    "pca",
    "klt",
    "klt-tiny",
    "trellis",
    "trellis-tiny",
)
CENTROIDS = (16, 32, 64, 128, 256)
WORST = 0.999  # the quantile of the queries' errors that is called the worst
LARGEST = 1e-3  # share of the elements that are called the largest
CLIPPED = 0.9  # a codec that keeps less of the largest values than this is said to clip


@dataclasses.dataclass(frozen=True)
class Score:
    """Errors and size of a codec on captured tensors.

    Attributes:
        recipe: NAME or NAME:SETTING=VALUE:..., as the command takes it.
        bits: per element, K and V together, everything stored counted.
        key_error, value_error, attention_error: relative L2.
        loop: dB to the bf16 run of the model, if it was run.
        best: on the Pareto front of bits and all errors of attention.
        median_layer, worst_layer: of the layers' relative L2 of attention.
        worst_queries: the error of one query in a thousand, over the RMS of its head's outputs.
        peaks: what the largest elements of K or V become, as a share; 1 unless they are clipped.
    """

    recipe: str
    bits: float
    key_error: float
    value_error: float
    attention_error: float
    loop: float | None = None
    best: bool = False
    median_layer: float = 0.0
    worst_layer: float = 0.0
    worst_queries: float = 0.0
    peaks: float = 1.0


def candidates(span_tokens: int) -> list[str]:
    """`CLUSTERED` recipes with every number of centroids that a span allows, and `OTHERS`."""
    numbers = [k for k in CENTROIDS if k <= span_tokens // 8] or [max(1, span_tokens // 8)]
    return [f"{name}:num_centroids={k}" for name in CLUSTERED for k in numbers] + list(OTHERS)


def restored(
    codec: Codec, x_LBHTD: Float[np.ndarray, "L B H T D"], span_tokens: int
) -> Float[Array, "L B H T D"]:
    """The tensors after encoding and decoding, span by span as a cache does; the rest exact.

    Tokens beyond the last whole span stay as they are, like a window.
    """
    layers, batch, heads, tokens, dim = x_LBHTD.shape
    x = jnp.asarray(x_LBHTD, jnp.bfloat16).reshape(layers * batch, heads, tokens, dim)
    spans = tokens // span_tokens
    cut = x[:, :, : spans * span_tokens].reshape(*x.shape[:2], spans, span_tokens, dim)

    def one(state, span_BHTD):
        packed, state = codec.encode(span_BHTD, state)
        return state, codec.decode(packed, jnp.float32)

    start = codec.init((layers * batch, heads, span_tokens, dim), x.dtype)
    _, out = jax.jit(lambda s, xs: jax.lax.scan(one, s, xs))(start, jnp.moveaxis(cut, 2, 0))
    out = jnp.moveaxis(out, 0, 2).reshape(*x.shape[:2], spans * span_tokens, dim)
    rest = x[:, :, spans * span_tokens :].astype(jnp.float32)
    return jnp.concatenate([out, rest], 2).reshape(x_LBHTD.shape)


@jax.jit
def _outputs(q_LBHQD: Array, k_LBHTD: Array, v_LBHTD: Array) -> Array:
    """softmax(q k / sqrt(D)) v, layer by layer."""

    def layer(qkv):
        q, k, v = qkv
        b, h, t, d = k.shape
        q = q.reshape(b, h, -1, d)
        weights = jax.nn.softmax(jnp.einsum("bhqd,bhtd->bhqt", q, k) / math.sqrt(d), -1)
        return jnp.einsum("bhqt,bhtd->bhqd", weights, v)

    return jax.lax.map(layer, (q_LBHQD, k_LBHTD, v_LBHTD))


def _relative(x: Any, exact: Any) -> float:
    x, exact = (np.asarray(a, np.float64) for a in (x, exact))
    return float(np.linalg.norm(x - exact) / max(np.linalg.norm(exact), 1e-30))


def _peaks(x: Any, exact: Any) -> float:
    """<x, exact> / <exact, exact> over the largest elements of each layer; the least of the layers."""
    shares = []
    for a, b in zip(np.asarray(x, np.float64), np.asarray(exact, np.float64), strict=True):
        count = max(1, int(LARGEST * b.size))
        at = np.argpartition(np.abs(b).ravel(), -count)[-count:]
        a, b = a.ravel()[at], b.ravel()[at]
        shares.append(float(a @ b / max(b @ b, 1e-30)))
    return min(shares)


def _pair(recipe: str) -> tuple[Codec, Codec]:
    with told_to_user():
        return presets.parse_pair(recipe)


class Bench:
    """Captured tensors with their exact attention output, to score recipes on.

    Raises:
        UserError: `span_tokens` is not between 1 and the captured tokens.
    """

    def __init__(self, captured: Captured, span_tokens: int):
        tokens = captured.k_LBHTD.shape[3]
        if not 1 <= span_tokens <= tokens:
            raise UserError(f"span_tokens={span_tokens} is not accepted: give 1 to {tokens}")
        self.captured, self.span_tokens = captured, span_tokens
        self._exact = self._attention(captured.k_LBHTD, captured.v_LBHTD)

    def _attention(self, k: Any, v: Any) -> Array:
        pairing, f32 = self.captured.pairing, jnp.float32
        turn = jax.vmap(lambda x, t: rotated(x, t, pairing), (0, None))
        q = turn(jnp.asarray(self.captured.q_LBHQD, f32), jnp.asarray(self.captured.turn_q))
        k = turn(jnp.asarray(k, f32), jnp.asarray(self.captured.turn_k))
        return _outputs(q, k, jnp.asarray(v, f32))

    def bits(self, recipe: str) -> float:
        """Bits per element of one recipe on these spans, K and V together.

        Raises:
            ValueError: an unknown recipe, or one that these spans do not allow.
        """
        _, batch, heads, _, dim = self.captured.k_LBHTD.shape
        return pair_bits(_pair(recipe), (batch, heads, self.span_tokens, dim))

    def score(self, recipe: str) -> Score:
        """Encodes and decodes K and V with one recipe.

        Raises:
            ValueError: as `bits`.
        """
        pair = _pair(recipe)
        k, v = (
            restored(codec, x, self.span_tokens)
            for codec, x in zip(pair, (self.captured.k_LBHTD, self.captured.v_LBHTD), strict=True)
        )
        exact, out = (np.asarray(x, np.float64) for x in (self._exact, self._attention(k, v)))
        layers = [_relative(a, b) for a, b in zip(out, exact, strict=True)]
        size = np.sqrt(np.mean(np.sum(exact**2, -1), -1, keepdims=True))
        each = np.linalg.norm(out - exact, axis=-1) / np.maximum(size, 1e-30)
        return Score(
            recipe=recipe,
            bits=self.bits(recipe),
            key_error=_relative(k, self.captured.k_LBHTD),
            value_error=_relative(v, self.captured.v_LBHTD),
            attention_error=_relative(out, exact),
            median_layer=float(np.median(layers)),
            worst_layer=max(layers),
            worst_queries=float(np.quantile(each, WORST)),
            peaks=min(_peaks(k, self.captured.k_LBHTD), _peaks(v, self.captured.v_LBHTD)),
        )


def pareto(scores: Iterable[Score]) -> list[Score]:
    """The scores by size, each marked whether no smaller one has all errors of attention as small."""

    def errors(s: Score) -> tuple[float, ...]:
        return s.attention_error, s.worst_layer, s.worst_queries

    out: list[Score] = []
    for s in sorted(scores, key=lambda s: (s.bits, *errors(s))):
        beaten = any(all(a <= b for a, b in zip(errors(o), errors(s), strict=True)) for o in out)
        out.append(dataclasses.replace(s, best=not beaten))
    return out


def recommended(scores: Sequence[Score]) -> Score | None:
    """The recipe that does best over all columns; None if all clip the largest values.

    Recipes are ranked in each column (median layer, worst layer, worst queries, and the loop where it
    was run); the least sum of ranks wins, and of equal ones the smaller recipe. A recipe that clips
    is not recommended, however small its errors are.
    """
    fit = [s for s in scores if s.peaks >= CLIPPED]
    if any(s.loop is not None for s in fit):
        fit = [s for s in fit if s.loop is not None]
    columns: list[Callable[[Score], float]] = [
        lambda s: s.median_layer,
        lambda s: s.worst_layer,
        lambda s: s.worst_queries,
        lambda s: -(s.loop or 0.0),
    ]

    def ranks(s: Score) -> int:
        return sum(sum(column(o) < column(s) for o in fit) for column in columns)

    return min(fit, key=lambda s: (ranks(s), s.bits), default=None)


def tune(
    captured: Captured,
    span_tokens: int,
    recipes: Iterable[str] | None = None,
    *,
    budget: float = math.inf,
    progress: Callable[[Score], None] | None = None,
    refused: Callable[[str, str], None] | None = None,
) -> list[Score]:
    """Scores all recipes within a budget of bits per element; smallest first.

    A recipe that these tensors do not allow is left out, and the others go on.

    Args:
        captured: from `load_captured`.
        span_tokens: tokens that are compressed together.
        recipes: None is `candidates(span_tokens)`.
        budget: recipes above it are left out.
        progress: called with every score.
        refused: called with every recipe that is left out, and with the reason.

    Raises:
        ValueError: a recipe that is unknown, or none that is possible here and within the budget.
    """
    bench = Bench(captured, span_tokens)
    scores, reasons = [], {}
    if recipes is not None:
        for recipe in recipes:
            _pair(recipe)  # an unknown one ends it all before the first is measured
    head_dim = captured.k_LBHTD.shape[-1]
    for recipe in candidates(span_tokens) if recipes is None else recipes:
        try:
            with told_to_user():
                recipe = fitted(recipe, head_dim)
                if (bits := bench.bits(recipe)) > budget:
                    if refused is not None:
                        refused(recipe, f"{bits:.3f} bits are more than {budget:g}")
                    continue
                score = bench.score(recipe)
        except UserError as error:
            reasons[recipe] = str(error)
            if refused is not None:
                refused(recipe, str(error))
            continue
        scores.append(score)
        if progress is not None:
            progress(score)
    if not scores and recipes is not None and reasons:
        raise UserError("; ".join(f"{recipe}: {why}" for recipe, why in reasons.items()))
    if not scores:
        raise UserError(f"budget={budget} bits: no recipe is that small; accepted: a larger one")
    return pareto(scores)


def draw(path: str | os.PathLike, scores: Iterable[Score]) -> None:
    """Attention error over bits per element, the Pareto front joined by a line, as PNG.

    Names of the front stand beside their points, on the side where the axes have room.
    """
    scores = list(scores)
    bits = [s.bits for s in scores]
    middle = (min(bits) + max(bits)) / 2
    figure = Figure((9, 5.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    front = [s for s in scores if s.best]
    axes.plot([s.bits for s in front], [s.attention_error for s in front], color="#1f77d0", lw=1.2)
    for s in scores:
        axes.plot(s.bits, s.attention_error, "o", ms=5, color="#1f77d0" if s.best else "#9aa2ae")
        if s.best:
            left = s.bits > middle
            axes.annotate(
                s.recipe, (s.bits, s.attention_error), (-6, -5) if left else (6, 5),
                textcoords="offset points", fontsize=8, ha="right" if left else "left",
                va="top" if left else "bottom",
            )  # fmt: skip
    axes.set(xlabel="bits per element", ylabel="relative error of attention", yscale="log")
    axes.set_title(
        "Recipes on the captured K, V and Q; the line joins the best of each size", loc="left"
    )
    axes.margins(0.06, 0.1)
    axes.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
