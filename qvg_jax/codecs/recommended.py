"""Which recipe a model's cache uses unless its user names another."""

__all__ = ["CAUTIOUS", "MEASURED", "recommended"]

# The recipe that a model's own loop supports (docs/benchmarks); every other model gets `CAUTIOUS`, which
# has the smallest errors on tensors that no recipe was made for (docs/benchmarks/evidence.md).
# Pocket world runs on CPUs: its recipe is above 40 dB to bf16 at nearly the speed of bf16. `trellis`
# is closer and smaller, but encodes too slowly for a demonstration.
# Reward-Forcing sees nine frames, too few to compress any.
MEASURED = {"pocket-world": "midrise-k2v4", "reward-forcing": "bf16"}
CAUTIOUS = "dither"


def recommended(model: str | None = None) -> str:
    """The name of the recipe that the evidence supports for a model.

    Args:
        model: as the command names it, such as "pocket-world"; None or any other is a model in
            whose loop nothing was measured.
    """
    return MEASURED.get(model or "", CAUTIOUS)
