"""The server of `qvg play`: one walk, any number of tabs.

NiceGUI (MIT, FastAPI below and Vue above, releases every few weeks) and not a page of our own: it
has keyboard events, pictures that change without flicker, selects and charts, serves
everything from its package without a CDN, and its socket reconnects by itself. What it costs
in latency is small beside a block; benchmarks/play.py measures from key press to picture.

All tabs see the same walk and each can steer it: the cache, which is what this is about, is there
once, and so is the processor. A tab that closes lets go of its keys and changes nothing else; the
walk waits for the next tab.
"""

import asyncio
import collections
import contextlib
import ipaddress
import secrets
import signal
import socket
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from nicegui import app as pages_app
from nicegui import core, run, ui
from starlette.middleware.gzip import GZipMiddleware

from qvg_jax.app.play.gate import Gate
from qvg_jax.app.play.limits import MESSAGE_BYTES
from qvg_jax.app.play.messages import guard_messages
from qvg_jax.app.play.page import Page
from qvg_jax.app.play.player import Player
from qvg_jax.app.play.screen import picture
from qvg_jax.app.play.walk import Seen, Walk, write_clip
from qvg_jax.codecs.accounting import pair_bits
from qvg_jax.codecs.presets import PAIRS, PRESETS

__all__ = ["codec_choices", "listen", "serve"]

RECONNECT_SECONDS = 5.0  # so long a tab whose socket broke is waited for; later it loads anew
MOST_CONNECTIONS = 256


def listen(host: str, port: int) -> socket.socket:
    """A socket for `serve`; port 0 takes any free one.

    Raises:
        ValueError: the host is empty, which sockets take for all addresses.
        OSError: the port is in use, or the host is not this machine's.
    """
    if not host.strip():
        raise ValueError(
            f"--host {host!r} is not accepted: give an address of this machine, 127.0.0.1 for this "
            "machine alone, 0.0.0.0 for all that reach it"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(64)
    except (OSError, OverflowError):
        sock.close()
        raise
    return sock


def codec_choices(walk: Walk) -> dict[str, str]:
    """The recipes that this world's spans can have, and the walk's own, with bits per element."""
    shape = walk.world.cache(walk.world.begin(0, walk.world.codec("bf16"))).layout.span_shape
    choices = {}
    for name in dict.fromkeys(("bf16", *PRESETS, *PAIRS, walk.codec)):
        with contextlib.suppress(ValueError):  # a group or a number of centroids that does not fit
            bits = pair_bits(walk.world.codec(name), shape)
            choices[name] = f"{name} · {bits:.2f} bits"
    return choices


def serve(walk: Walk, sock: socket.socket, *, host: str = "", show: bool = True) -> None:
    """Serves the page until Ctrl-C, SIGTERM or SIGHUP.

    An address that other machines reach asks for the token in the address that is printed.

    Args:
        walk: the walk; nothing of it is compiled yet.
        sock: from `listen`; closed at the end.
        host: the name by which the user calls the machine, accepted beside its addresses.
        show: whether to open a browser.
    """
    address, port = sock.getsockname()[:2]
    alone = ipaddress.ip_address(address).is_loopback
    token = None if alone else secrets.token_urlsafe(24)
    url = _url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address), port, token)
    hall = _Hall(walk, url, "" if alone else " to whoever has this address")
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.page("/", title=f"qvg play: {walk.world.model}", dark=True, language="en-US")(hall.enter)
    pages_app.on_startup(hall.open)
    if show:
        pages_app.on_startup(lambda: threading.Timer(0.2, webbrowser.open, [url]).start())
    ui.run_with(
        outer,
        show_welcome_message=False,
        tailwind=False,
        reconnect_timeout=RECONNECT_SECONDS,
        gzip_middleware_factory=None,  # the gate reads the page, so that it is zipped outside
    )
    guard_messages()
    core.sio.eio.max_http_buffer_size = MESSAGE_BYTES
    names = () if alone else (host, socket.gethostname())
    config = uvicorn.Config(
        GZipMiddleware(Gate(outer, token=token, names=names), minimum_size=1000),
        log_level="warning",
        proxy_headers=False,
        ws_max_size=MESSAGE_BYTES,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    try:
        with _ended_by_signals(server):
            server.run(sockets=[sock])
    finally:
        hall.close()
        sock.close()


def _url(address: str, port: int, token: str | None) -> str:
    place = f"[{address}]" if ":" in address else address
    return f"http://{place}:{port}" + (f"/?token={token}" if token else "")


@contextlib.contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Ends the server as Ctrl-C does when a scheduler or a closed terminal says so.

    uvicorn raises the signal once more at its end, and the default would end the process there,
    with the saved clips left behind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_):
        raise KeyboardInterrupt

    before = {}
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        handler = interrupt if number == signal.SIGTERM else server.handle_exit
        before.setdefault(number, signal.signal(number, handler))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Hall:
    """The tabs that are open, and the player that they watch."""

    def __init__(self, walk: Walk, url: str, reach: str):
        self._url, self._reach = url, reach
        self._player = Player(walk, self._told)
        self._codecs = codec_choices(walk)
        self._pages: list[Page] = []  # with a browser behind them
        self._loop: asyncio.AbstractEventLoop | None = None
        self._showing: asyncio.Task | None = None
        self._news = collections.deque(maxlen=1)  # the newest block that the loop has not seen
        self._told_already = False
        self._last: tuple[str, str, str | None] | None = None  # what is up
        self._twin: Seen | None = None  # block of the bf16 memory that is up, and its last picture
        self._last_twin: tuple[str, str] | None = None
        self._showing_twin: asyncio.Task | None = None
        self._begun = time.perf_counter()
        self._announced = False
        self._files = tempfile.TemporaryDirectory(prefix="qvg-play-")

    async def open(self) -> None:
        """Starts the walk when the server is there."""
        self._loop = asyncio.get_running_loop()
        print(
            f"qvg: {self._url} is open{self._reach}; compiling {self._player.walk.world.model} ...",
            flush=True,
        )
        self._player.start()

    def close(self) -> None:
        self._player.close()
        self._files.cleanup()

    async def enter(self) -> None:
        """Builds the page of a new tab."""
        page = Page(self._player, self._codecs, self._save)
        if self._last is not None:
            page.show(*self._last)
        if self._last_twin is not None:
            page.show_twin(*self._last_twin)
        page.client.on_connect(lambda: self._came(page))
        page.client.on_disconnect(lambda: self._went(page))

    def _came(self, page: Page) -> None:
        if page not in self._pages:
            self._pages.append(page)
        if self._last is not None:
            page.show(*self._last)
        if self._last_twin is not None:
            page.show_twin(*self._last_twin)
        self._refresh()

    def _went(self, page: Page) -> None:
        self._player.leave(page.client.id)
        if page in self._pages:
            self._pages.remove(page)
        self._refresh()

    def _told(self, seen: Seen | None) -> None:
        """In the player's thread."""
        if not self._announced and self._player.phase == "ready":
            self._announced = True
            seconds = time.perf_counter() - self._begun
            print(f"qvg: ready after {seconds:.1f} s (Ctrl-C ends)", flush=True)
        if seen is not None:
            self._news.append((seen, self._player.truth))
        if self._told_already:
            return  # blocks can be faster than pages: the loop would have no time for keys
        self._told_already = True
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._react)

    def _react(self) -> None:
        self._told_already = False
        if self._news:
            if self._showing is not None:
                self._showing.cancel()
            self._showing = self._loop.create_task(self._show(*self._news.popleft()))
        twin = self._player.twin_seen
        if twin is not None and twin is not self._twin:
            self._twin = twin
            if self._showing_twin is not None:
                self._showing_twin.cancel()
            self._showing_twin = self._loop.create_task(self._show_twin(twin))
        self._refresh()

    async def _show_twin(self, seen: Seen) -> None:
        """The frames of a block from the bf16 memory; only the last one while it is behind."""
        frames = seen.frames_FHW3 if not self._player.behind else seen.frames_FHW3[-1:]
        gap = min(1 / self._player.walk.world.fps, 0.9 * seen.seconds / len(frames))
        for i, frame in enumerate(frames):
            if i:
                await asyncio.sleep(gap)
            self._last_twin = f"{seen.number}-{seen.action}", picture(frame)
            for page in self._pages:
                page.show_twin(*self._last_twin)

    async def _show(self, seen: Seen, truth) -> None:
        """The frames of a block one after another: the first at once, all before the next block."""
        gap = min(1 / self._player.walk.world.fps, 0.9 * seen.seconds / len(seen.frames_FHW3))
        for i, frame in enumerate(seen.frames_FHW3):
            if i:
                await asyncio.sleep(gap)
            real = None if truth is None else picture(truth[i])
            self._last = f"{seen.number}-{seen.action}", picture(frame), real
            for page in self._pages:
                page.show(*self._last)

    def _refresh(self) -> None:
        for page in self._pages:
            page.refresh(len(self._pages))

    async def _save(self) -> str:
        frames = await asyncio.wrap_future(self._player.frames())
        path = Path(self._files.name, f"walk-{time.monotonic_ns()}.mp4")
        await run.io_bound(write_clip, path, frames, self._player.walk.world.fps)
        return str(path)
