"""Attention of a new block to itself and to everything in a cache."""
