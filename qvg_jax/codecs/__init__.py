"""Codecs: what makes a span of keys or values small, and gives it back."""
