"""Self-Forcing: the causal, few-step Wan2.1-T2V-1.3B, with a cache that may be compressed."""
