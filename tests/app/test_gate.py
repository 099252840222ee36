"""Who may ask the server of `qvg play`, and how much: the gate alone, with no page behind it."""

import asyncio

import pytest

from qvg_jax.app.play.gate import Gate
from qvg_jax.app.play.limits import Bucket, Limits

HERE, TOKEN = "127.0.0.1:8080", "s3cret-token"
PAGE = b"<p>page</p><script>1</script><script type='x'>2</script>"


async def page(scope, receive, send):
    """What is behind the gate: a page, or a socket that is opened and read until it ends."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        return
    received = await receive() if scope["method"] == "POST" else {}
    kind = [(b"content-type", b"text/html"), (b"access-control-allow-origin", b"*")]
    await send({"type": "http.response.start", "status": 200, "headers": kind})
    told = next((v for k, v in scope["headers"] if k == b"x-forwarded-prefix"), b"")
    await send({"type": "http.response.body", "body": received.get("body", PAGE) + told})


def ask(gate, path="/", *, headers=(), host=HERE, method="GET", query="", kind="http", incoming=()):
    """Sends one request; returns what came back: (status, headers, body), or the socket's events."""
    raw = [(b"host", host.encode())] if host is not None else []
    raw += [(k.encode(), v.encode()) for k, v in headers]
    scope = {
        "type": kind,
        "path": path,
        "method": method,
        "headers": raw,
        "query_string": query.encode(),
        "server": ("127.0.0.1", 8080),
    }
    events = iter([*incoming, {"type": "websocket.disconnect"}])
    sent = []

    async def receive():
        return next(events)

    async def send(message):
        sent.append(message)

    asyncio.run(gate(scope, receive, send))
    if kind == "websocket":
        return [(m["type"].removeprefix("websocket."), m.get("code")) for m in sent]
    body = b"".join(m.get("body", b"") for m in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


FOREIGN = [
    dict(host="evil.example"),
    dict(host="evil.example:8080"),  # a name that was pointed at this machine
    dict(host="127.0.0.1.evil.example"),
    dict(host="203.0.113.5:8080"),
    dict(host=""),
    dict(host=None),
    dict(host="localhost, evil.example"),
    dict(headers=[("host", HERE)]),  # twice
    dict(headers=[("origin", "http://evil.example")]),
    dict(headers=[("origin", "http://127.0.0.1:3000")]),  # another server of this machine
    dict(headers=[("origin", "http://localhost:8080")]),  # not the name that was asked
    dict(headers=[("origin", "null")]),
    dict(headers=[("origin", f"file://{HERE}")]),
    dict(headers=[("sec-fetch-site", "cross-site"), ("sec-fetch-dest", "script")]),
    dict(headers=[("sec-fetch-site", "same-site"), ("sec-fetch-dest", "iframe")]),
    dict(headers=[("sec-fetch-site", "cross-site"), ("sec-fetch-dest", "image")]),
]


@pytest.mark.parametrize("request_", FOREIGN, ids=str)
def test_strangers_reach_neither_page_nor_polling_nor_socket(request_):
    gate = Gate(page)
    for path, method in (("/", "GET"), ("/_nicegui_ws/socket.io/", "POST"), ("/_nicegui/x", "GET")):
        status, headers, body = ask(gate, path, method=method, **request_)
        assert status == 403 and PAGE not in body and body.startswith(b"qvg play: ")
        assert headers[b"x-frame-options"] == b"DENY"
    events = ask(gate, "/_nicegui_ws/socket.io/", kind="websocket", **request_)
    assert events == [("close", 1008)]  # never accepted


OWN = [
    dict(),
    dict(host="localhost:9999"),  # a port forwarded by ssh
    dict(host="[::1]:8080"),
    dict(headers=[("origin", f"http://{HERE}"), ("sec-fetch-site", "same-origin")]),
    dict(host="LocalHost:8080", headers=[("origin", "http://localhost:8080")]),
]


@pytest.mark.parametrize("request_", OWN, ids=str)
def test_the_page_itself_is_let_in(request_):
    gate = Gate(page)
    assert ask(gate, **request_)[0] == 200
    events = ask(gate, "/_nicegui_ws/socket.io/", kind="websocket", **request_)
    assert events == [("accept", None)]


def test_a_link_from_elsewhere_is_followed_and_nothing_else():
    visit = [("sec-fetch-site", "cross-site"), ("sec-fetch-dest", "document")]
    assert ask(Gate(page), headers=visit)[0] == 200
    sockets = "/_nicegui_ws/socket.io/"
    assert ask(Gate(page), sockets, headers=visit, method="POST")[0] == 403
    assert ask(Gate(page), sockets, headers=visit, kind="websocket") == [("close", 1008)]


def test_headers_forbid_frames_foreign_files_and_foreign_scripts():
    status, headers, body = ask(Gate(page), headers=[("x-forwarded-prefix", "/><script>")])
    policy = dict(
        part.split(" ", 1) for part in headers[b"content-security-policy"].decode().split("; ")
    )
    assert status == 200 and policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == f"'self' ws://{HERE} wss://{HERE}"
    assert "unsafe-inline" not in policy["script-src"]
    nonce = policy["script-src"].split("'nonce-")[1].split("'")[0]
    assert (
        body
        == (
            f'<p>page</p><script nonce="{nonce}">1</script>'
            f"<script nonce=\"{nonce}\" type='x'>2</script>"
        ).encode()
    )
    assert b"access-control-allow-origin" not in headers  # whatever the page behind allows
    again = ask(Gate(page))[1][b"content-security-policy"]
    assert nonce not in again.decode()


@pytest.mark.parametrize("path", ["/x", "/_nicegui/\x1b[31m", "/_nicegui", "//", "/index.html"])
def test_unknown_places_are_answered_here(path):
    status, _, body = ask(Gate(page), path)
    assert status == 404 and body == b"qvg play: there is no such page\n"


@pytest.mark.parametrize(
    "path, method",
    [("/", "POST"), ("/", "TRACE"), ("/_nicegui_ws/", "PUT"), ("/_nicegui/x", "POST")],
)
def test_other_methods_are_refused(path, method):
    assert ask(Gate(page), path, method=method)[0] == 405


def test_without_the_token_nothing_is_shown():
    gate = Gate(page, token=TOKEN, names=["my-machine"])
    host = "192.0.2.7:8080"
    for path in ("/", "/_nicegui/x", "/_nicegui_ws/socket.io/"):
        for headers in [], [("cookie", "qvg_play_8080=wrong")], [("cookie", '";=\x00, qvg')]:
            status, _, body = ask(gate, path, host=host, headers=headers)
            assert status == 403 and TOKEN.encode() not in body
    assert ask(gate, "/_nicegui_ws/socket.io/", host=host, kind="websocket") == [("close", 1008)]
    assert ask(gate, query="token=wrong", host=host)[0] == 403
    assert ask(gate, query="token=%C3%A9", host=host)[0] == 403


def test_the_token_of_the_address_becomes_a_cookie():
    gate = Gate(page, token=TOKEN, names=["my-machine"])
    for host in ("192.0.2.7:8080", "my-machine:8080", "localhost:8080"):
        status, headers, body = ask(gate, query=f"token={TOKEN}", host=host)
        assert (status, headers[b"location"], body) == (303, b"/", b"")
        cookie = headers[b"set-cookie"].decode()
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie
        mine = [("cookie", f"other=1; {cookie.split(';')[0]}")]
        status, _, body = ask(gate, host=host, headers=mine)
        assert status == 200 and TOKEN.encode() not in body
        events = ask(gate, "/_nicegui_ws/x", host=host, headers=mine, kind="websocket")
        assert events == [("accept", None)]
    # Rebinding takes a name, and the cookie does not help a foreign one.
    assert ask(gate, host="evil.example", headers=mine)[0] == 403


def test_a_message_that_is_too_large_is_refused_before_it_is_read():
    post = dict(path="/_nicegui_ws/socket.io/", method="POST")
    gate, small = (
        Gate(page, limits=Limits(message_bytes=10)),
        {"type": "http.request", "body": b"x" * 6},
    )
    length = [("content-length", "5000000")]
    assert ask(gate, **post, headers=length)[0] == 413  # nothing was there to be read
    assert ask(gate, **post, headers=[("content-length", "-1")])[0] == 413
    pieces = [small | {"more_body": True}, small]
    assert ask(gate, **post, incoming=pieces)[0] == 413
    pieces = [{"type": "http.request", "body": b"x", "more_body": True}, small]
    status, _, body = ask(gate, **post, incoming=pieces)
    assert status == 200 and body == b"x" * 7


def test_a_bucket_fills_up_at_its_rate():
    now = [0.0]
    bucket = Bucket(2, 3, lambda: now[0])
    assert [bucket.take() for _ in range(5)] == [True] * 3 + [False] * 2
    now[0] = 1.0
    assert [bucket.take() for _ in range(4)] == [True] * 2 + [False] * 2
    now[0] = 100.0
    assert sum(bucket.take() for _ in range(9)) == 3


def test_too_many_pages_posts_messages_and_sockets():
    never = lambda burst: Bucket(0, burst)  # noqa: E731
    limits = Limits(pages=never(2), posts=never(1), messages=lambda: never(3), sockets=1)
    gate, sockets = Gate(page, limits=limits), "/_nicegui_ws/socket.io/"
    assert [ask(gate)[0] for _ in range(3)] == [200, 200, 429]
    empty = {"type": "http.request", "body": b""}
    assert [ask(gate, sockets, method="POST", incoming=[empty])[0] for _ in range(2)] == [200, 429]
    message = {"type": "websocket.receive", "text": "2"}
    socket = dict(path=sockets, kind="websocket")
    for _ in range(2):  # the first has given its place back
        assert ask(gate, **socket, incoming=[message] * 3) == [("accept", None)]
    events = ask(gate, **socket, incoming=[message] * 4)
    assert events == [("accept", None), ("close", 1008)]
    limits.open_sockets = 1
    assert ask(gate, **socket) == [("close", 1008)]


@pytest.mark.parametrize(
    "message",
    [dict(text="\x1b[31m"), dict(text=""), dict(text="9"), dict(bytes=b"4\xff", text=None)],
)
def test_a_socket_that_sends_garbage_is_closed(message):
    incoming = [{"type": "websocket.receive", **message}]
    events = ask(Gate(page), "/_nicegui_ws/x", kind="websocket", incoming=incoming)
    assert events == [("accept", None), ("close", 1003)]
