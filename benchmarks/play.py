"""`qvg play` as a person has it: milliseconds from a key press to the block's first frame.

    uv run --group dev python benchmarks/play.py                # with a young memory, and with a full one
    uv run --group dev python benchmarks/play.py --codec bf16 --presses 100

It starts the command, opens its page in headless Chromium and presses real keys. The clock runs in
the page, from the keydown event to the load event of the first picture of that press's block, so
it counts the way to the server and back, the block, the PNG, and a browser that draws. All of it
shares the machine's processors with the model.

- tap: the walk stands still; a key is pressed at a random moment after the last block.
- turn: another key is held, so a block is under way; it ends before the new one can begin.

With --compare the page makes every block from a bf16 memory, too, after the one that was asked for: a
press may have to wait for that one. With --json the numbers go to a file.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

REPO = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WATCH = """() => {
  const frame = document.querySelector('.frame'), image = frame.querySelector('img');
  window.press = null; window.delays = [];
  addEventListener('keydown', e => {
    if (e.key !== window.held) window.press = {key: e.key, from: performance.now(),
      after: parseInt(frame.dataset.turn)};
  }, true);
  image.addEventListener('load', () => {
    const [number, action] = frame.dataset.turn.split('-');
    if (press && action === press.key && parseInt(number) > press.after) {
      delays.push(performance.now() - press.from); window.press = null;
    }
  });
}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presses", type=int, default=24, help="of each kind (24)")
    parser.add_argument("--codec", default="auto", help="(auto)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (4)")
    parser.add_argument("--memory", type=int, default=256, help="frames to remember (256)")
    parser.add_argument("--tours", default="64,320", help="real frames before (64,320)")
    parser.add_argument("--compare", action="store_true", help="with a bf16 memory beside it")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    args = parser.parse_args()
    rows = [row for tour in map(int, args.tours.split(",")) for row in measure(tour, args)]
    print(f"{len(os.sched_getaffinity(0))} processors, load {os.getloadavg()[0]:.1f}, {args.codec}")
    print("tour  memory now  what  presses  median ms  p95 ms  longest ms  s/block")
    for r in rows:
        print(
            f"{r['tour']:4}  {r['remembered']:10}  {r['what']:4}  {r['presses']:7}"
            f"  {r['median_ms']:9.0f}  {r['p95_ms']:6.0f}  {r['longest_ms']:10.0f}"
            f"  {r['block_seconds']:7.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(tour, args):
    """Both kinds of press, with a memory as it is after `tour` frames."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"benchmarks/play.py needs a browser: one of {', '.join(BROWSERS)}")
    command = [sys.executable, "-m", "qvg_jax", "play", "--no-browser", "--port", "0"]
    command += ["--codec", args.codec, "--steps", str(args.steps)]
    command += ["--memory", str(args.memory), "--tour", str(tour)]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            address = re.search(r"http://\S+", server.stdout.readline())[0]
            with sync_playwright() as play:
                chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
                page = chromium.new_page(viewport={"width": 1360, "height": 860})
                page.goto(address)
                page.wait_for_selector(".chip.ready", timeout=300_000)
                page.wait_for_timeout(1500)
                if args.compare:
                    page.get_by_test_id("compare").click()
                    same = page.get_by_test_id("follows").filter(has_text="the same block")
                    same.wait_for(timeout=300_000)
                page.evaluate(WATCH)
                rows = [press(page, what, args.presses, tour) for what in ("tap", "turn")]
                chromium.close()
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
    return rows


def press(page, what, presses, tour):
    """Presses keys at random moments; a turn goes to the side while another key is held."""
    rng = random.Random(0)
    blocks = []
    page.evaluate("delays.length = 0")
    if what == "turn":
        page.evaluate("window.held = 'd'")
        page.keyboard.down("d")
        page.wait_for_timeout(2000)
    for i in range(presses):
        page.wait_for_timeout(rng.uniform(600, 1600))
        page.keyboard.press("wwss"[i % 4])
        page.wait_for_function("n => delays.length === n", arg=i + 1, timeout=60_000)
        blocks.append(float(re.search(r"([\d.]+) s", seen(page, "speed"))[1]))
        if what == "tap":
            page.wait_for_timeout(700)  # the other frames of the block
    if what == "turn":
        page.keyboard.up("d")
        page.wait_for_timeout(3000)
    delays = sorted(page.evaluate("delays"))
    return {
        "tour": tour,
        "remembered": seen(page, "room"),
        "what": what,
        "presses": presses,
        "median_ms": statistics.median(delays),
        "p95_ms": delays[min(len(delays) - 1, round(0.95 * len(delays)))],
        "longest_ms": delays[-1],
        "block_seconds": statistics.median(blocks),
    }


def seen(page, name):
    return page.get_by_test_id(name).inner_text()


if __name__ == "__main__":
    main()
