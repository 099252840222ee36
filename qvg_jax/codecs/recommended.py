"""Which recipe a model's cache uses unless its user names another."""

__all__ = ["CAUTIOUS", "MEASURED", "recommended"]

# The best recipe in a model's own loop (docs/benchmarks); every other model gets `CAUTIOUS`.
MEASURED = {"pocket-world": "trellis"}
CAUTIOUS = "midrise"


def recommended(model: str | None = None) -> str:
    """The name of the recipe that the evidence supports for a model.

    Args:
        model: as the command names it, such as "pocket-world"; None or any other is a model in
            whose loop nothing was measured.
    """
    return MEASURED.get(model or "", CAUTIOUS)
