"""Visitors of the page of `qvg play` in a real browser: many of them, cut off, framed, with a token."""

import contextlib
import http.client
import http.server
import re
import socket
import threading
import urllib.parse

import pytest

from tests.support.fake_world import fake_page
from tests.support.tab import Tab, real_time

pytestmark = real_time

slow = pytest.mark.slow
TABS = 200


def resident(process):
    """MiB of memory that a process holds."""
    with open(f"/proc/{process.pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with fake_page(tmp_path_factory.mktemp("served")) as (address, process):
        yield address, process


@pytest.mark.nightly
def test_two_hundred_tabs_leave_the_memory_flat(browser, server):
    address, process = server
    sizes = []
    for i in range(TABS):
        tab = Tab(browser, address)
        assert tab.complaints == []
        tab.page.close()
        if i % 50 == 49:
            tab = Tab(browser, address)
            tab.page.wait_for_timeout(6_000)  # tabs that may come back are kept for 5 s
            tab.page.close()
            sizes.append(resident(process))
    print("MiB after 50, 100, 150, 200 tabs:", [round(size) for size in sizes])
    assert sizes[-1] - sizes[0] < 8


class Cable:
    """A way to the server that can be cut: every connection ends, and no new one goes through."""

    def __init__(self, address):
        host, port = address.removeprefix("http://").split(":")
        self._goal, self._cut, self._open = (host, int(port)), False, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                if self._cut:
                    here.close()
                    continue
                there = socket.create_connection(self._goal)
                self._open += [here, there]
                for a, b in ((here, there), (there, here)):
                    threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, a, b):
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
        for end in (a, b):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self._cut = True
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def mend(self):
        self._cut = False

    def close(self):
        self._listener.close()
        self.cut()


@slow
@pytest.mark.parametrize("seconds", [1, 12])  # shorter and longer than a tab is waited for
def test_a_broken_socket_recovers_and_the_walk_is_where_it_was(browser, server, seconds):
    with contextlib.closing(Cable(server[0])) as cable:
        tab, other = Tab(browser, cable.address), Tab(browser, server[0])
        begin = tab.settled()
        tab.tap("w")
        tab.wait_for_turn(f"{begin}-w")
        tab.page.keyboard.down("d")  # held while the line breaks: it must not walk on for ever
        tab.wait_for_block(begin + 3)
        cable.cut()
        end = other.settled()
        tab.page.wait_for_timeout(1000 * seconds)
        tab.page.keyboard.up("d")
        assert other.settled() == end
        cable.mend()
        tab.reconnected()
        tab.wait_for_turn(f"{end - 1}-d")
        tab.tap("a")
        tab.wait_for_turn(f"{end}-a")
        assert tab.settled() == other.blocks() == end + 1
        assert tab.complaints == other.complaints == []
        tab.page.close()
        other.page.close()


@contextlib.contextmanager
def foreign_page(text):
    """Another server of this machine with one page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@slow
def test_another_page_neither_frames_nor_reads_nor_opens_the_socket(browser, server):
    address, _ = server
    goal = address.removeprefix("http://")
    text = f"""<iframe src="{address}"></iframe><script>
    const said = (name, done) => done.then(() => name + ' worked', () => name + ' refused');
    const socket = new Promise((yes, no) => {{
      const ws = new WebSocket('ws://{goal}/_nicegui_ws/socket.io/?EIO=4&transport=websocket');
      ws.onopen = yes; ws.onerror = no;
    }});
    window.all = Promise.all([said('socket', socket), said('read', fetch('{address}')),
      said('post', fetch('{address}/_nicegui_ws/socket.io/?EIO=4&transport=polling'))]);
    </script>"""
    with foreign_page(text) as foreign:
        page = browser.new_page()
        page.goto(foreign)
        results = page.evaluate("window.all")
        assert results == ["socket refused", "read refused", "post refused"]
        page.wait_for_timeout(1000)
        assert all("chip" not in frame.content() for frame in page.frames[1:])
        page.close()


@slow
def test_a_page_for_others_opens_by_its_token_and_keeps_it_to_itself(browser, tmp_path):
    with fake_page(tmp_path, host="0.0.0.0") as (address, _):
        place = urllib.parse.urlsplit(address)
        connection = http.client.HTTPConnection(place.netloc, timeout=20)
        connection.request("GET", "/")
        assert connection.getresponse().status == 403
        tab = Tab(browser, address)
        assert tab.page.url == f"http://{place.netloc}/"
        token = place.query.removeprefix("token=")
        assert len(token) == 32 and token not in tab.page.content()
        assert token not in tab.page.evaluate("document.cookie")
        begin = tab.settled()
        tab.tap("w")
        tab.wait_for_turn(f"{begin}-w")
        tab.page.reload()
        tab.wait_for("ready")
        assert tab.complaints == []
        tab.page.close()
