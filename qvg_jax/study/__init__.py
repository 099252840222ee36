"""Choosing a codec for a model: captured keys, values and queries, and the errors of codecs on them."""
