"""Codecs: pure functions that make a span of keys or values small and give it back.

`smoothing/` takes out of a span what can be predicted, `quantize/` stores the rest in a few bits, `chain`
joins them, presets name recipes. Below this room are only the lowest one and the kernels. Begin with `base.py`.
"""
