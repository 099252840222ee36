"""`qvg play` in a real browser, over real sockets."""

import base64
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.support.tab import Tab, real_time
from tests.support.tiny_world import random_weights

pytestmark = real_time

REPO = Path(__file__).resolve().parents[2]

TOUR = 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(random_weights(tmp_path_factory.mktemp("weights")))


@contextlib.contextmanager
def served(weights, folder, *argv):
    """The command in a process of its own; yields (address, process), stops it as Ctrl-C does."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, as a user has
    env |= dict(PYTHONPATH=str(REPO), XDG_CACHE_HOME=str(folder / "cache"))
    command = [
        sys.executable,
        "-m",
        "qvg_jax.app.cli",
        "play",
        "--weights",
        weights,
        "--no-browser",
    ]
    command += ["--port", "0", "--tour", str(TOUR), "--memory", "64", *argv]
    process = subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        line = process.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address, line + process.stdout.read()
        yield address[0], process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with served(weights, folder) as (address, process):
        ready = process.stdout.readline()  # without a browser, the tests can be done before it is
        assert "ready after" in ready, ready + process.stdout.read()
        yield address
    out = process.stdout.read()
    assert process.returncode == 0 and "Traceback" not in out, out
    assert re.search(r"ended after \d+ blocks", out), out
    assert {p.name for p in folder.iterdir()} <= {"cache"}  # nothing is left lying about


@pytest.fixture
def tab(browser, server):
    """tab() opens one more; they are closed at the end, and none of them had a script error."""
    tabs = []

    def open_tab():
        tabs.append(Tab(browser, server))
        return tabs[-1]

    yield open_tab
    for one in tabs:
        one.page.close()
        assert one.complaints == []


def megabytes(text):
    return float(text.removesuffix(" MB"))


def test_small_frames_are_lossless_and_large_ones_small():
    screen = pytest.importorskip("qvg_jax.app.play.screen", reason="NiceGUI is not installed")
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    for image, kind in ((frame, "png"), (frame.repeat(10, 0).repeat(10, 1), "jpeg")):
        head, data = screen.picture(image).split(",")
        assert head == f"data:image/{kind};base64"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert np.abs(shown.astype(int) - image).mean() <= (0 if kind == "png" else 10)


@pytest.mark.slow
def test_the_page_needs_nothing_from_elsewhere(server):
    with urllib.request.urlopen(server, timeout=20) as answer:
        text = answer.read().decode()
    assert answer.status == 200 and "<title>qvg play: pocket-world</title>" in text
    loaded = re.findall(r"""(?:src|href)=["'](https?:)?//""", text)
    assert loaded == [] and '@import url("http' not in text


@pytest.mark.slow
def test_a_browser_that_goes_away_in_the_middle_of_a_request(server):
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as half:
        half.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")  # and never the rest
    with urllib.request.urlopen(server, timeout=20) as answer:
        assert answer.status == 200


@pytest.mark.slow
def test_a_key_is_a_block_and_the_meter_counts_it(tab):
    me = tab()
    begin = me.settled()
    before = megabytes(me.text("bf16"))
    picture = me.page.locator(".frame > img").get_attribute("src")
    for i, (key, action) in enumerate(
        [("w", "w"), ("ArrowRight", "d"), (" ", "stay"), ("E", "up")]
    ):
        me.tap(key)
        me.wait_for_turn(f"{begin + i}-{action}")
    assert me.settled() == begin + 4
    assert me.page.locator(".frame > img").get_attribute("src") != picture
    assert megabytes(me.text("bf16")) > before >= 0.1
    assert re.match(r"[\d.]+×", me.text("times")) and "bits per element" in me.text("bits")
    assert {url.split("/")[2] for url in me.asked if url.startswith("http")} == {
        me.page.url.split("/")[2]
    }
    # Keys that a script presses never scroll; a person's would.
    for key in ("ArrowDown", " "):
        me.page.keyboard.press(key)
    me.wait_for_block(begin + 5)
    assert me.page.evaluate("scrollY") == 0


@pytest.mark.slow
def test_keys_that_mean_something_else_do_not_walk(tab):
    me = tab()
    begin = me.settled()
    for key in ("Control+d", "Alt+w", "x", "Tab", "Escape"):
        me.page.keyboard.press(key)
    me.page.get_by_test_id("seed").click()
    me.page.keyboard.press("w")  # into the field, which takes digits only
    assert me.settled() == begin


@pytest.mark.slow
def test_a_held_key_goes_on_until_it_is_let_go(tab):
    me = tab()
    begin = me.settled()
    me.page.keyboard.down("s")
    me.wait_for_block(begin + 3)
    me.page.keyboard.up("s")
    end = me.settled()
    assert end >= begin + 3
    me.page.get_by_test_id("pad-a").evaluate(  # a click on a pad is a press
        "pad => ['pointerdown', 'pointerup'].forEach(type => pad.dispatchEvent(new Event(type)))"
    )
    me.wait_for_turn(f"{end}-a")
    assert me.settled() == end + 1


@pytest.mark.slow
def test_many_presses_at_once_leave_the_newest(tab):
    me = tab()
    begin = me.settled()
    me.page.evaluate(
        """() => { for (let i = 0; i < 60; i++) for (const type of ['keydown', 'keyup'])
        document.dispatchEvent(new KeyboardEvent(type, {key: 'wasd'[i % 4], bubbles: true})) }"""
    )
    me.wait_for_block(begin + 1)
    end = me.settled()
    assert begin < end < begin + 30  # 60 presses; the newest won, and nothing piled up
    assert me.turn() == f"{end - 1}-d"


@pytest.mark.slow
def test_two_tabs_see_one_walk_and_a_closed_one_lets_go(tab):
    me, you = tab(), tab()
    begin = me.settled()
    assert "2 tabs" in me.page.locator(".push").first.inner_text()
    you.tap("d")
    me.wait_for_turn(f"{begin}-d")
    you.wait_for_turn(f"{begin}-d")
    you.page.keyboard.down("w")
    me.wait_for_block(begin + 3)
    you.page.close()  # with the key down
    end = me.settled()
    me.tap("a")
    me.wait_for_turn(f"{end}-a")
    me.page.reload()
    me.wait_for("ready")
    me.wait_for_turn(f"{end}-a")  # a new tab sees where the walk is
    assert me.blocks() == end + 1


@pytest.mark.slow
def test_a_window_without_the_keyboard_lets_go(tab):
    me = tab()
    begin = me.settled()
    me.page.keyboard.down("w")
    me.wait_for_block(begin + 2)
    me.page.evaluate("window.dispatchEvent(new Event('blur'))")
    end = me.settled()
    assert me.settled() == end
    me.page.keyboard.up("w")


@pytest.mark.slow
def test_the_codec_changes_mid_walk_for_every_tab(tab):
    me, you = tab(), tab()
    me.page.keyboard.down("d")
    me.wait_for_block(14)  # a span is compressed
    me.page.keyboard.up("d")
    blocks, before = me.settled(), megabytes(me.text("is"))
    assert "2.31 bits" in me.text("bits")
    me.choose("bf16")
    you.page.wait_for_function(
        "() => document.querySelector('[data-testid=bits]').innerText.startsWith('16.00')"
    )
    me.wait_for("ready")
    assert megabytes(me.text("is")) > 1.5 * before and me.blocks() == blocks
    assert "bf16" in you.page.locator(".q-select").inner_text()
    you.tap("a")
    me.wait_for_turn(f"{blocks}-a")
    me.choose("midrise-k1v3")
    me.page.wait_for_function(
        "() => document.querySelector('[data-testid=bits]').innerText.startsWith('2.31')"
    )
    me.tap("s")  # the select has given the keyboard back
    me.wait_for_turn(f"{blocks + 1}-s")


@pytest.mark.slow
def test_a_new_world_and_a_seed_that_is_none(tab):
    me = tab()
    me.page.keyboard.press("d")
    field = me.page.get_by_test_id("seed")
    field.fill("-3")
    me.page.get_by_test_id("go").click()
    me.page.get_by_text("a whole number from 0").wait_for()
    field.fill("7")
    me.page.get_by_test_id("go").click()
    me.page.wait_for_function(
        "() => document.querySelector('[data-testid=speed]').innerText.endsWith('seed 7')"
    )
    me.wait_for("ready")
    assert me.settled() == TOUR // 4
    me.tap("w")
    me.wait_for_turn(f"{TOUR // 4}-w")


@pytest.mark.slow
def test_the_page_says_what_is_remembered_walks_back_and_compares_with_bf16(tab):
    me = tab()
    page, named = me.page, me.page.get_by_test_id
    begin = me.settled()
    for i, key in enumerate("dd"):
        me.tap(key)
        me.wait_for_turn(f"{begin + i}-{key}")
    named("back").click()
    me.wait_for_block(begin + 3)
    named("back").filter(has_text="walk back").wait_for()
    assert "remembered" in named("place").get_attribute("class")
    assert me.text("place").startswith("remembered")
    assert "× in the long run" in me.text("longrun")

    named("compare").click()
    named("follows").filter(has_text="the same block in both").wait_for()
    page.wait_for_selector(f'.twin[data-turn="{me.turn()}"]')
    page.locator("#wipe").fill("20")
    assert page.evaluate("document.documentElement.style.getPropertyValue('--wipe')") == "20%"
    assert page.locator(".twin").evaluate("e => getComputedStyle(e).clipPath").startswith("inset(0")
    named("compare").click()
    page.locator(".twin").wait_for(state="hidden")


@pytest.mark.slow
def test_the_page_can_be_used_without_a_mouse_and_fits(tab):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    me = tab()
    begin = me.settled()
    pad = me.page.get_by_role("button", name="wait (space)")
    pad.focus()
    for i, key in enumerate(("Enter", " ")):  # either presses the button, and walks no second time
        me.page.keyboard.press(key)
        me.wait_for_turn(f"{begin + i}-stay")
    assert me.settled() == begin + 2
    assert pad.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"  # where the keys go
    for width in (390, 768, 1024, 1140, 1440):
        me.page.set_viewport_size({"width": width, "height": 860})
        assert me.page.evaluate("document.documentElement.scrollWidth") == width
    faults = axe.Axe().run(me.page).response["violations"]
    serious = [f for f in faults if f["impact"] in ("serious", "critical")]
    assert [(f["id"], [node["html"] for node in f["nodes"]]) for f in serious] == []


@pytest.mark.slow
def test_the_walk_is_saved_as_mp4(tab, tmp_path):
    me = tab()
    blocks = me.settled()
    with me.page.expect_download() as download:
        me.page.get_by_test_id("save").click()
    assert download.value.suggested_filename == "walk.mp4"
    download.value.save_as(tmp_path / "walk.mp4")
    with av.open(str(tmp_path / "walk.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 4 * blocks
