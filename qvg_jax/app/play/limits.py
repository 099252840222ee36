"""Limits of the server of `qvg play`: how often, how much, and how many at once.

A person with a key held down sends two messages for each press. The limits are far above that, and
far below what would fill the memory or keep the walk's processor from the walk.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Bucket", "Limits", "body_within", "counted"]

MESSAGE_BYTES = 64 << 10  # of one message to the server; the page's own have some hundred
PACKETS = "0123456"  # kinds of Engine.IO packets


class Bucket:
    """A rate with a reserve: `take()` is true `burst` times at once, and then `rate` times a second."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._then = float(burst), clock()

    def take(self) -> bool:
        """Whether one more is within the rate; if so, it is counted."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._then) * self._rate)
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


@dataclasses.dataclass
class Limits:
    """What all visitors together may ask of one server.

    Attributes:
        pages: pages that are built; each takes some 40 kB until its tab is closed.
        posts: messages of browsers that cannot open a web socket.
        messages: makes the bucket of one web socket's messages.
        sockets: web sockets that may be open at once.
        message_bytes: size of a message to the server.
    """

    pages: Bucket = dataclasses.field(default_factory=lambda: Bucket(10, 60))
    posts: Bucket = dataclasses.field(default_factory=lambda: Bucket(50, 400))
    messages: Callable[[], Bucket] = lambda: Bucket(50, 400)
    sockets: int = 64
    message_bytes: int = MESSAGE_BYTES
    open_sockets: int = 0

    class Exceeded(Exception):
        """A request above a limit: the HTTP status, and one sentence."""

        def __init__(self, status: int, sentence: str):
            super().__init__(sentence)
            self.status = status


async def body_within(scope: Any, receive: Any, limits: Limits) -> Any:
    """`receive` with the request's whole body, read here.

    Raises:
        Limits.Exceeded: too many requests, or a body that is too large; the rest is not read.
    """
    page, post = scope["path"] == "/", scope["method"] == "POST"
    if (page and not limits.pages.take()) or (post and not limits.posts.take()):
        raise Limits.Exceeded(429, "too many requests; wait a second")
    if not post:
        return receive
    sizes = [value for name, value in scope["headers"] if name == b"content-length"]
    too_large = Limits.Exceeded(413, f"a message has at most {limits.message_bytes} bytes")
    if any(not size.isdigit() or int(size) > limits.message_bytes for size in sizes):
        raise too_large
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > limits.message_bytes:
            raise too_large
    given = False

    async def whole() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return whole


@contextlib.contextmanager
def counted(receive: Any, send: Any, limits: Limits) -> Iterator[Any]:
    """`receive` of a web socket that is closed when its messages come too fast or are none at all.

    The page's messages are text that begins with the digit of an Engine.IO packet.

    Raises:
        Limits.Exceeded: too many web sockets are open already.
    """
    if limits.open_sockets >= limits.sockets:
        raise Limits.Exceeded(503, f"{limits.sockets} tabs are open, and no more fit")
    limits.open_sockets += 1
    bucket = limits.messages()

    async def counting() -> Any:
        message = await receive()
        if message["type"] != "websocket.receive":
            return message
        if not bucket.take():
            why = 1008, "too many messages"
        elif (message.get("text") or " ")[0] not in PACKETS:
            why = 1003, "not a message of this page"
        else:
            return message
        await send({"type": "websocket.close", "code": why[0], "reason": why[1]})
        return {"type": "websocket.disconnect", "code": why[0]}

    try:
        yield counting
    finally:
        limits.open_sockets -= 1
