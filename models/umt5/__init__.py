"""The umT5 text encoder of Wan models, its tokenizer, and a way to use it without keeping it."""

from models.umt5.config import UMT5Config
from models.umt5.modeling import UMT5, relative_buckets
from models.umt5.params import load_umt5
from models.umt5.pipeline import borrow_umt5, drop, encode_prompts, encode_tokens
from models.umt5.tokenizer import PromptTooLongWarning, Tokenizer, Tokens, clean_prompt

__all__ = [
    "UMT5",
    "PromptTooLongWarning",
    "Tokenizer",
    "Tokens",
    "UMT5Config",
    "borrow_umt5",
    "clean_prompt",
    "drop",
    "encode_prompts",
    "encode_tokens",
    "load_umt5",
    "relative_buckets",
]
