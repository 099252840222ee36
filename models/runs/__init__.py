"""What runs of several models share: checks of a request, checkpoint folders, prompts, latents on disk, decoding."""
