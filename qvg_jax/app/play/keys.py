"""Which of the keys that people press and hold is the next action of a walk."""

from collections.abc import Hashable

__all__ = ["Keys"]


class Keys:
    """Which action comes next.

    The queue is one press long and the newest wins; of several keys that are down, the one pressed last.
    """

    def __init__(self):
        self._pressed: str | None = None
        self._down: dict[tuple[Hashable, str], None] = {}  # in the order of presses

    def press(self, who: Hashable, action: str) -> None:
        """`who` has pressed the key of an action."""
        self._pressed = action
        self._down.pop((who, action), None)
        self._down[who, action] = None

    def release(self, who: Hashable, action: str) -> None:
        """`who` has let go of it."""
        self._down.pop((who, action), None)

    def leave(self, who: Hashable) -> None:
        """`who` has let go of everything: the tab is closed or has lost the keyboard."""
        self._down = {key: None for key in self._down if key[0] != who}

    def clear(self) -> None:
        """Nothing is pressed."""
        self._pressed = None
        self._down.clear()

    def next(self) -> str | None:
        """The next action; takes the press that waited."""
        action, self._pressed = self._pressed, None
        return action or next((action for _, action in reversed(self._down)), None)
