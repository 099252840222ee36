"""A tab of the page of `qvg play` in a real browser, as a person sees and uses it."""

import re

import pytest

# Frames pass by and keys are let go of in real time, which a busy machine stretches.
real_time = pytest.mark.flaky(reruns=2, reruns_delay=2)
MS = 30_000  # that anything may take on a busy machine


class Tab:
    """A tab of the page, as a person sees and uses it."""

    def __init__(self, browser, address):
        self.page = browser.new_page(viewport={"width": 1360, "height": 860})
        self.page.set_default_timeout(MS)
        self.asked, self.complaints, self.documents = [], [], 0
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self.heard)
        self.page.on("framenavigated", self.navigated)
        self.page.goto(address)
        self.wait_for("ready")
        self.connected()

    def navigated(self, frame):
        """Count the documents that the tab has shown."""
        self.documents += 1

    def heard(self, message):
        """Browsers tell the console what the content security policy has stopped."""
        if message.type == "error" and "Content Security Policy" in message.text:
            self.complaints.append(message.text)

    def wait_for(self, phase):
        self.page.wait_for_selector(f".chip.{phase}")

    def connected(self):
        """Wait until presses are heard: NiceGUI drops events while its websocket is not open."""
        self.page.wait_for_function("window.did_handshake && window.socket.connected")

    def reconnected(self):
        """Wait until presses are heard after a break, in the old document or in a reloaded one."""
        before = None
        while before != (before := self.documents):
            self.connected()
            self.page.wait_for_timeout(1500)  # a server that has forgotten the tab reloads it

    def text(self, name):
        return self.page.get_by_test_id(name).inner_text()

    def blocks(self):
        """How many blocks the walk has."""
        return int(re.match(r"block (\d+)", self.text("speed"))[1])

    def turn(self):
        """Number and action of the block whose frames are up."""
        return self.page.locator(".frame").get_attribute("data-turn")

    def wait_for_turn(self, turn):
        self.page.wait_for_selector(f'.frame[data-turn="{turn}"]')

    def wait_for_block(self, number):
        self.page.wait_for_function(
            "n => parseInt(document.querySelector('[data-testid=speed]').innerText.slice(6)) >= n",
            arg=number,
        )

    def settled(self):
        """The number of blocks after all presses have been played."""
        while True:
            before = self.blocks()
            last = re.search(r"([\d.]+) s", self.text("speed"))  # of the last block
            self.page.wait_for_timeout(1000 + 2000 * float(last[1] if last else 0))
            self.wait_for("ready")
            if self.blocks() == before:
                return before

    def tap(self, key):
        """Press and let go of a key within one task of the browser: one block, however busy it is."""
        self.page.evaluate(
            """key => ['keydown', 'keyup'].forEach(type =>
            document.dispatchEvent(new KeyboardEvent(type, {key, bubbles: true})))""",
            key,
        )

    def choose(self, codec):
        self.page.locator(".q-select").click()
        self.page.get_by_role("option", name=re.compile(f"^{re.escape(codec)} ")).click()
