"""The KV cache as a pytree of fixed shapes: sink, compressed spans, window, and the positions of all tokens.

Functions `cache -> cache` change it, views bring RoPE along for reading. The room imports codecs and knows
nothing of attention. Begin with `state.py`, then `operations.py`: append, compress, evict.
"""
