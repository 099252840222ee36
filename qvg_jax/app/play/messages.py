"""Messages of the page's web sockets: a tab speaks for itself, and garbage costs one line at most.

NiceGUI trusts the tab's id inside a message. Here a message passes only if its socket is that tab's.
"""

import functools
import logging
from typing import Any

from nicegui import core

__all__ = ["guard_messages", "printable"]

LONGEST = 300  # characters of somebody else's text in the log

log = logging.getLogger(__name__)


def printable(text: Any) -> str:
    """Text of strangers for a terminal: control characters escaped, and cut to a line."""
    text = str(text)[: 4 * LONGEST]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


class _OneLine(logging.Filter):
    """Errors about garbage on a socket as one line, without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        said = printable(record.getMessage())
        if record.exc_info and record.exc_info[1] is not None:
            said = f"{said} ({printable(record.exc_info[1])})"
        record.msg, record.args, record.exc_info, record.exc_text = said, (), None, None
        return True


def guard_messages() -> None:
    """Puts the checks before NiceGUI's handlers of messages, once for the process."""
    handlers = core.sio.handlers["/"]
    for name in ("handshake", "event", "javascript_response", "ack", "log"):
        if not hasattr(handlers[name], "__wrapped__"):
            handlers[name] = _guarded(name, handlers[name])
    for name in ("engineio.server", "socketio.server"):
        logger = logging.getLogger(name)
        if not any(isinstance(f, _OneLine) for f in logger.filters):
            logger.addFilter(_OneLine())


def _guarded(name: str, handler: Any) -> Any:
    @functools.wraps(handler)
    async def guarded(sid: str, message: Any = None, *_: Any) -> Any:
        if not isinstance(message, dict):
            return False
        if name != "handshake" and message.get("client_id") not in core.sio.rooms(sid):
            return False
        if name == "log":
            message = {**message, "message": printable(message.get("message"))}
        try:
            result = handler(sid, message)
            return await result if hasattr(result, "__await__") else result
        except Exception as error:  # the page itself sends none of these
            log.warning("a message that the page does not send: %s", printable(repr(error)))
            return False

    return guarded
