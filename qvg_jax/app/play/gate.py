"""The gate in front of the page of `qvg play`: an ASGI application that refuses strangers.

A page on this machine is within reach of every other page that the browser has open. So the gate
asks of each request, and of each web socket before it opens:

- Host: an address of this machine. A name of somebody else's that was pointed at it (DNS
  rebinding) is refused.
- Origin, Sec-Fetch-Site: this page itself, if the browser says who asks. Other pages may link here
  and nothing else.
- Token: on an address that other machines reach, the secret of the printed address. It moves to a
  cookie with the first visit, so that neither the address bar nor the page keeps it.

How much may be asked is the matter of `limits`, what a browser may load that of `browser_rules`.
"""

import hmac
import http.cookies
import ipaddress
import re
import secrets
import urllib.parse
from collections.abc import Iterable
from typing import Any

from qvg_jax.app.play.browser_rules import rules, with_nonce
from qvg_jax.app.play.limits import Limits, body_within, counted

__all__ = ["Gate"]

PLACES = ("/favicon.ico", "/_nicegui/", "/_nicegui_ws/")  # beside the page itself, "/"
SOCKETS = "/_nicegui_ws/"
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE)


class Refusal(Exception):
    """A request that is not answered with the page: its status and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Gate:
    """An ASGI application that asks who calls before another one answers.

    Attributes:
        token: the secret of the address; None where only this machine reaches it.
    """

    def __init__(
        self,
        app: Any,
        *,
        token: str | None = None,
        names: Iterable[str] = (),
        limits: Limits | None = None,
    ):
        """Puts the gate before an application.

        Args:
            app: the ASGI application behind it.
            token: the secret to ask for. With None only names and addresses of the loopback
                interface are accepted as Host, otherwise every numeric address.
            names: names of this machine that are accepted as Host, too.
            limits: how much may be asked; None for the usual.
        """
        self.token = token
        self._app, self._names = app, {name.lower() for name in names}
        self._limits = limits or Limits()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one connection, as ASGI has it."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Any, receive: Any, send: Any) -> None:
        nonce = secrets.token_urlsafe(16)
        try:
            host = self._check_caller(scope)
            headers = rules(nonce, host)
            if (goal := self._entry(scope)) is not None:
                return await _answer(send, 303, "", [*headers, *goal])
            self._check_place(scope)
            receive = await body_within(scope, receive, self._limits)
        except Refusal as refusal:
            return await _answer(send, refusal.status, refusal.sentence, rules(nonce, ""))
        except Limits.Exceeded as error:
            return await _answer(send, error.status, str(error), rules(nonce, ""))
        # NiceGUI would write such headers into the page.
        asked = [h for h in scope["headers"] if not h[0].startswith(b"x-forwarded-")]
        scope = {**scope, "headers": asked}
        if scope["path"] == "/":
            send = with_nonce(send, nonce)
        await self._app(scope, receive, _adding(send, headers))

    async def _socket(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            self._check_caller(scope)
            self._check_token(scope)
            if not scope["path"].startswith(SOCKETS):
                raise Refusal(404, "no web socket is there")
            with counted(receive, send, self._limits) as receive:
                await self._app(scope, receive, send)
        except (Refusal, Limits.Exceeded):
            await send({"type": "websocket.close", "code": 1008})  # before it opens: a 403

    def _check_caller(self, scope: Any) -> str:
        """The request's Host, if it is this machine and the request comes from its own page."""
        hosts = _values(scope, b"host")
        match = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None or not self._is_here(match[1].strip("[]").lower()):
            raise Refusal(403, "this server answers to the address that it has printed only")
        host = hosts[0].lower()
        for origin in _values(scope, b"origin"):
            if origin.lower() not in (f"http://{host}", f"https://{host}"):
                raise Refusal(403, "other pages have no access to this one")
        site = _values(scope, b"sec-fetch-site")
        visit = _values(scope, b"sec-fetch-dest") == ["document"] and scope["type"] == "http"
        if not (visit and scope["method"] in ("GET", "HEAD")) and site not in (
            [], ["same-origin"], ["none"],
        ):  # fmt: skip
            raise Refusal(403, "other pages have no access to this one")
        return host

    def _is_here(self, name: str) -> bool:
        if name == "localhost" or name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.token is not None or address.is_loopback

    def _check_place(self, scope: Any) -> None:
        self._check_token(scope)
        path, sockets = scope["path"], scope["path"].startswith(SOCKETS)
        if path != "/" and not (path.startswith(PLACES) and path.isprintable()):
            raise Refusal(404, "there is no such page")
        if scope["method"] not in (("GET", "POST") if sockets else ("GET", "HEAD")):
            raise Refusal(405, "this method is not accepted")

    def _cookie(self, scope: Any) -> str:
        """The name of the cookie with the token: cookies do not know ports, so it has the port."""
        return f"qvg_play_{(scope.get('server') or ('', 0))[1]}"

    def _check_token(self, scope: Any) -> None:
        if self.token is None:
            return
        jar = http.cookies.SimpleCookie()
        for value in _values(scope, b"cookie"):
            try:
                jar.load(value)
            except http.cookies.CookieError:
                continue
        cookie = jar.get(self._cookie(scope))
        if cookie is None or not self._is_token(cookie.value):
            raise Refusal(403, "open the address that `qvg play` has printed, with its token")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self.token or "").encode())

    def _entry(self, scope: Any) -> list[tuple[bytes, bytes]] | None:
        """Headers that bring a visitor with the token from the printed address to the page."""
        query = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
        if self.token is None or scope["path"] != "/" or "token" not in query:
            return None
        if not self._is_token(query["token"][0]):
            raise Refusal(403, "this token is not the one that `qvg play` has printed")
        # Lax and not Strict: who follows a link in a chat is sent on from there, too.
        cookie = f"{self._cookie(scope)}={self.token}; Path=/; HttpOnly; SameSite=Lax"
        return [(b"location", b"/"), (b"set-cookie", cookie.encode())]


def _values(scope: Any, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _adding(send: Any, headers: list[tuple[bytes, bytes]]) -> Any:
    """`send` that gives every answer these headers, in place of the answer's own of the same names."""
    names = {name for name, _ in headers}

    async def adding(message: Any) -> None:
        if message["type"] == "http.response.start":
            kept = [h for h in message["headers"] if h[0].lower() not in names]
            # Nobody else reads what this server answers, whatever the page behind would allow.
            kept = [h for h in kept if not h[0].lower().startswith(b"access-control-")]
            message = {**message, "headers": [*kept, *headers]}
        await send(message)

    return adding


async def _answer(send: Any, status: int, text: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Sends a page of one line, and ends the connection: a body may not have been read."""
    body = f"qvg play: {text}\n".encode() if text else b""
    own = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    own += [(b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})
