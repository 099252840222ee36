"""The setting in which two runs differ, in words."""

from typing import Any

__all__ = ["difference"]

LONGEST = 80  # characters of a setting in a message


def difference(theirs: Any, ours: Any, name: str = "") -> str | None:
    """The innermost entry that differs between two trees of JSON types, in words; None if none does."""
    if theirs == ours:
        return None
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            inner = f"{name}.{key}" if name else key
            if (key in theirs) != (key in ours):
                return f"{inner}, now without it" if key in theirs else f"no {inner}, now with it"
            if differs := difference(theirs[key], ours[key], inner):
                return differs
    return f"{name}={_excerpt(theirs, ours)}, now it is {_excerpt(ours, theirs)}"


def _excerpt(value: Any, other: Any) -> str:
    """A value as Python writes it; of a long one, what is around its first difference from another."""
    text, against = repr(value), repr(other)
    if len(text) <= LONGEST:
        return text
    same = next(
        (i for i, (a, b) in enumerate(zip(text, against, strict=False)) if a != b), len(against)
    )
    begin = max(0, min(same, len(text)) - LONGEST // 2)
    end = begin + LONGEST
    return ("..." if begin else "") + text[begin:end] + ("..." if end < len(text) else "")
