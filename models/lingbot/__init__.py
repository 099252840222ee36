"""LingBot-World in the rooms of Self-Forcing: an image, a camera, a sink and a window."""
