"""Attention of a new block to itself and to everything in a cache: one softmax over all regions.

The room imports the cache, the codecs and the kernels, and never a model. Begin with `api.py`: `attend`,
its definition and the choice of what computes it; the other modules each serve one way of computing it.
"""
