"""Pocket world: a small world, a model of it with trained weights, and its training."""
