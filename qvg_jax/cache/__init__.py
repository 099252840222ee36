"""The KV cache as a pytree: its state, the functions that change it, and views for reading it."""
