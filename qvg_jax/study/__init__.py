"""Choosing a codec for a model: its keys, values and queries, captured, and the errors of codecs on them.

The room imports codecs; the commands `qvg capture` and `qvg tune` are above it. Begin with `capture.py`,
the file of captured tensors, then `tune.py`, which measures recipes on it.
"""
