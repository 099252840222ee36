"""The server of `qvg play` over real sockets, with a world of one line behind it."""

import asyncio
import contextlib
import html
import http.client
import json
import re
import signal
import time

import pytest

from tests.support.fake_world import fake_page

pytest.importorskip("nicegui", reason="NiceGUI is not installed")
socketio = pytest.importorskip("socketio")
SOCKETS = "/_nicegui_ws/socket.io/?EIO=4&transport="


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Yields (address, process); after all tests its terminal was clean and its folder is gone."""
    folder = tmp_path_factory.mktemp("served")
    with fake_page(folder) as (address, process):
        yield address, process
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        out = process.stdout.read()
        assert out.isascii() and "\x1b" not in out and "Traceback" not in out, out
    assert list(folder.iterdir()) == []  # the clips that were saved


def ask(address, path="/", method="GET", body=None, **headers):
    """(status, headers, body) of one request."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


class Socket:
    """A tab without a browser: the page's id, and a web socket that speaks for it."""

    def __init__(self, address, *, origin=None):
        self.address, self.headers = address, {"Origin": origin} if origin else {}
        self.messages = []

    async def __aenter__(self):
        page = await asyncio.to_thread(ask, self.address)
        self.page = html.unescape(page[2])
        self.id = re.search(r"client_id\W+([0-9a-f-]{36})", self.page)[1]
        self.client = socketio.AsyncClient(reconnection=False)
        self.client.on("*", lambda event, data: self.messages.append((event, data)))
        await self.connect()
        return self

    async def connect(self):
        query = f"client_id={self.id}&tab_id=t&document_id=d&implicit_handshake=true"
        await self.client.connect(
            f"{self.address}?{query}&next_message_id=0",
            headers=self.headers,
            socketio_path="/_nicegui_ws/socket.io",
            transports=["websocket"],
        )

    async def __aexit__(self, *_):
        await self.client.disconnect()

    async def until(self, text):
        """Waits for a message with a text in it."""
        for _ in range(200):
            if any(text in str(message) for message in self.messages):
                return
            await asyncio.sleep(0.05)
        raise AssertionError((text, self.messages))

    async def press(self, key, up=True):
        """Sends what the page's keyboard element sends for a key."""
        found = re.search(r'"(\d+)":{"tag":"nicegui-keyboard".*?"listener_id":"([^"]+)"', self.page)
        event = {"key": key, "code": f"Key{key.upper()}", "repeat": False, "location": 0}
        event |= dict(altKey=False, ctrlKey=False, shiftKey=False, metaKey=False)
        for action in ("keydown", "keyup")[: 1 + up]:
            args = [json.dumps(event | {"action": action})]
            message = {"client_id": self.id, "id": int(found[1]), "listener_id": found[2]}
            await self.client.emit("event", message | {"args": args})


def test_other_names_pages_and_sockets_are_refused(server):
    address, _ = server
    assert ask(address)[0] == 200
    for headers in (
        dict(Host="evil.example"),
        dict(Origin="http://evil.example"),
        dict(Sec_Fetch_Site="cross-site", Sec_Fetch_Dest="iframe"),
    ):
        assert ask(address, **headers)[0] == 403
        assert ask(address, SOCKETS + "polling", **headers)[0] == 403
        upgrade = dict(Connection="Upgrade", Upgrade="websocket", Sec_WebSocket_Version="13")
        upgrade |= dict(Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAAAA==", **headers)
        assert ask(address, SOCKETS + "websocket", **upgrade)[0] == 403


def test_the_answers_carry_the_rules_for_browsers(server):
    address, _ = server
    for path in ("/", "/nowhere", "/_nicegui/nowhere", SOCKETS + "polling"):
        _, headers, _ = ask(address, path)
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-frame-options"] == "DENY"
    text = ask(address)[2]
    assert re.search(r"<html[^>]* lang=\"en", text)
    assert len(set(re.findall(r"<script nonce=\"([^\"]+)\"", text))) == 1
    assert len(re.findall(r"<script[\s>]", text)) == text.count("<script nonce=")


def test_paths_and_large_posts_are_answered_in_one_line(server):
    address, _ = server
    for path in ("/%1b[31mred", "/_nicegui/%1b[31mred", "/..%2f..%2fetc/passwd", "/x"):
        status, _, text = ask(address, path)
        assert status == 404 and text == "qvg play: there is no such page\n"
    begin = time.monotonic()
    with contextlib.suppress(ConnectionError):  # the answer may come before all is sent
        status, _, _ = ask(address, SOCKETS + "polling", "POST", b"4" * 5_000_000)
        assert status == 413
    assert time.monotonic() - begin < 5
    sid = re.search(r'"sid":"([^"]+)"', ask(address, SOCKETS + "polling")[2])[1]
    for body in (b"\x00garbage", b"4{", b"9", b"42[", b""):
        assert ask(address, SOCKETS + f"polling&sid={sid}", "POST", body)[0] in (200, 400)
    assert ask(address)[0] == 200


def test_garbage_on_a_socket_leaves_the_server_well(server):
    async def talk():
        async with Socket(server[0], origin=server[0]) as tab:
            say = tab.client.emit
            for message in ("garbage", 1, None, [], {}, {"client_id": tab.id}, {"client_id": "x"}):
                for event in ("event", "log", "ack", "javascript_response", "handshake", "nothing"):
                    await say(event, message)
            red = {"client_id": tab.id, "level": "error", "message": "\x1b[31mred\nline"}
            await say("log", red)
            await say("event", {"client_id": tab.id, "id": 4, "listener_id": "x", "args": ["{"]})
            await asyncio.sleep(0.3)
            assert tab.client.connected
            async with Socket(server[0]) as other:
                assert other.id != tab.id

    asyncio.run(talk())


def test_a_flood_of_messages_closes_its_own_socket_only(server):
    async def talk():
        async with Socket(server[0]) as flood, Socket(server[0]) as quiet:
            for _ in range(1000):
                if not flood.client.connected:
                    break
                await flood.client.emit("ack", {"client_id": flood.id, "next_message_id": 0})
            await asyncio.sleep(0.5)
            assert not flood.client.connected and quiet.client.connected
            await flood.connect()  # the tab comes back, as a browser does
            assert flood.client.connected

    asyncio.run(talk())


def test_a_tab_whose_socket_broke_finds_the_walk_where_others_took_it(server):
    async def talk():
        async with Socket(server[0]) as broken, Socket(server[0]) as other:
            await other.press("d")
            await broken.until("-d'")
            await broken.client.disconnect()
            broken.messages.clear()
            await other.press("a")
            await other.until("-a'")
            await broken.connect()
            await broken.until("-a'")

    asyncio.run(talk())


def test_a_socket_cannot_press_keys_for_another_tab(server):
    async def talk():
        async with Socket(server[0]) as mine, Socket(server[0]) as theirs:
            mine.id, mine.page = theirs.id, theirs.page
            await mine.press("w")
            await asyncio.sleep(0.7)
            assert "-w'" not in str(theirs.messages)
            await theirs.press("w")  # the same message on its own socket
            await theirs.until("-w'")

    asyncio.run(talk())


def blocks(address):
    """How many blocks the walk has."""
    return int(re.search(r"block (\d+): ", ask(address)[2])[1])


def test_blocks_that_are_faster_than_pages_leave_time_for_keys(server):
    async def talk():
        async with Socket(server[0]) as tab:
            before = await asyncio.to_thread(blocks, server[0])
            await tab.press("s", up=False)
            await asyncio.sleep(3)
            during = await asyncio.to_thread(blocks, server[0])  # within its time limit
            assert during > before + 20
        # The tab is gone, and with it the key that was down.
        for _ in range(40):
            await asyncio.sleep(0.25)
            end = await asyncio.to_thread(blocks, server[0])
            if end == during:
                return
            during = end
        raise AssertionError("the walk goes on")

    asyncio.run(talk())
