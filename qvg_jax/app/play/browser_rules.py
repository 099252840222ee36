"""Rules that the page of `qvg play` gives the browser: what it may load, and who may frame it.

The content security policy, and why it is not tighter:

- Scripts: files of this server, and the inline scripts that carry the answer's own nonce. A script
  or an `onerror=` that got into the page in any other way does not run.
- 'unsafe-eval': NiceGUI sends event handlers and properties as text, which the browser evaluates,
  and Vue compiles its templates in the browser.
- Styles 'unsafe-inline': Quasar, ECharts and NiceGUI set `style` attributes and add style elements.
- Pictures from `data:`: frames travel as data URLs.
- Everything else is this server's or nothing: no foreign host, no frame, no form, no plug-in.
"""

import re
from typing import Any

__all__ = ["rules", "with_nonce"]

SCRIPT = re.compile(rb"<script(?=[\s>])")


def rules(nonce: str, host: str) -> list[tuple[bytes, bytes]]:
    """Headers of one answer.

    Args:
        nonce: the secret that this answer's inline scripts carry.
        host: the checked Host of the request; "" for an answer that opens no socket.
    """
    socket = f" ws://{host} wss://{host}" if host else ""  # 'self' is http only in older browsers
    policy = {
        "default-src": "'none'",
        "script-src": f"'self' 'nonce-{nonce}' 'unsafe-eval'",
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data:",
        "font-src": "'self'",
        "connect-src": f"'self'{socket}",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-frame-options": "DENY",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def with_nonce(send: Any, nonce: str) -> Any:
    """`send` that puts the nonce into the scripts of the page that the server has made.

    Nothing that a visitor wrote is in that text: the gate lets no address but "/" reach it, and
    NiceGUI escapes what the page's elements say.
    """
    start: dict[str, Any] = {}
    parts: list[bytes] = []

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                body = SCRIPT.sub(f'<script nonce="{nonce}"'.encode(), b"".join(parts))
                headers = [h for h in start["headers"] if h[0].lower() != b"content-length"]
                headers.append((b"content-length", str(len(body)).encode()))
                await send({**start, "headers": headers})
                await send({"type": "http.response.body", "body": body})
        else:
            await send(message)

    return sending
