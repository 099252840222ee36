"""Stored names of umT5, Wan's and Hugging Face's, and where their tensors go."""

from models.common import Rule, linear_kernel
from models.common.weights import Weights
from models.umt5.modeling import UMT5

_WAN = r"blocks\.(\d+)\."
_HF = r"encoder\.block\.(\d+)\.layer\."

_BLOCK = (
    ("norm1", "norm1.weight", "0.layer_norm"),
    ("attn.q", "q.kernel", "0.SelfAttention.q"),
    ("attn.k", "k.kernel", "0.SelfAttention.k"),
    ("attn.v", "v.kernel", "0.SelfAttention.v"),
    ("attn.o", "o.kernel", "0.SelfAttention.o"),
    (
        "pos_embedding.embedding",
        "position_bias",
        "0.SelfAttention.relative_attention_bias",
    ),
    ("norm2", "norm2.weight", "1.layer_norm"),
    ("ffn.gate.0", "gate.kernel", "1.DenseReluDense.wi_0"),
    ("ffn.fc1", "up.kernel", "1.DenseReluDense.wi_1"),
    ("ffn.fc2", "down.kernel", "1.DenseReluDense.wo"),
)


def _rule(pattern: str, path: str, layer: int | None = None, alias: bool = False) -> Rule:
    if path.endswith(".kernel"):
        return Rule(pattern, path, linear_kernel, layer, alias)
    return Rule(pattern, path, layer=layer, alias=alias)


def _escape(name: str) -> str:
    return name.replace(".", r"\.") + r"\.weight"


RULES = (
    *(_rule(_WAN + _escape(wan), f"blocks.{path}", 1) for wan, path, _ in _BLOCK),
    *(_rule(_HF + _escape(hf), f"blocks.{path}", 1) for _, path, hf in _BLOCK),
    _rule(
        r"(token_embedding|shared|encoder\.embed_tokens)\.weight",
        "token_embedding.embedding",
        alias=True,
    ),
    _rule(r"(norm|encoder\.final_layer_norm)\.weight", "norm.weight"),
)

# Parts of a full encoder-decoder checkpoint that text conditioning does not use.
IGNORE = (r"decoder\..*", r"lm_head\.weight")


WEIGHTS = Weights(UMT5, RULES, ignore=IGNORE)
load_umt5 = WEIGHTS.load
