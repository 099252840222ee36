"""Codecs: pure functions that make a span of keys or values small and give it back.

`smoothing/` takes out of a span what can be predicted, `quantize/` stores the rest in a few bits, `chain`
joins them, presets name recipes. The room imports kernels only. Begin with `base.py`: what a codec is.
"""
