"""The documentation builds without a warning, shows every public name, and fits a phone and a desktop."""

import importlib.util
import inspect
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import qvg_jax
from tests.support.pages import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SCREENS = ("index", "how-it-works", "use-it-in-your-model", "models", "benchmarks/replay")
SCREENS += ("api/cache", "notebooks/quickstart", "models/self-forcing")


def public_objects():
    """Public names, and methods and properties of public classes, that the reference shows."""
    for name in qvg_jax.__all__:
        value = getattr(qvg_jax, name)
        yield name, value
        if inspect.isclass(value) and value.__module__.startswith("qvg_jax"):
            for member, of in vars(value).items():
                if not member.startswith("_") and callable(of):
                    yield f"{name}.{member}", of


@pytest.mark.parametrize("name, value", list(public_objects()))
def test_public_names_have_docstrings(name, value):
    first, *_ = (inspect.getdoc(value) or "").split("\n\n")
    assert first.rstrip().endswith((".", ":")), f"{name}: {first!r} is no sentence"


def as_rst(text):
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs/docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.as_rst(text.split("\n"))


def test_docstrings_become_restructured_text():
    text = (
        "Says |x| of `a|b`s.\n\n    y = x ** 2\n\nReturns:\n    `part`: a number\n        of bytes."
    )
    assert as_rst(text) == [
        r"Says \|x\| of `a|b`\ s.", "", "", "::", "", "    y = x ** 2", "", "", "Returns:",
        "    *   `part`: a number", "        of bytes.",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder with the built pages."""
    pytest.importorskip("sphinx", reason="the dependency group docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_public_name_has_an_entry(site):
    _, _, _, _, entries = (site / "objects.inv").read_bytes().split(b"\n", 4)
    shown = {line.split(" ")[0] for line in zlib.decompress(entries).decode().splitlines()}
    for name in qvg_jax.__all__:
        value = getattr(qvg_jax, name)
        entry = value.__name__ if inspect.ismodule(value) else f"qvg_jax.{name}"
        assert entry in shown, name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pages_load_nothing_from_elsewhere_and_fit_the_screen(site):
    """At 390 and 1440 pixels: nothing sticks out, nothing fails to load, no picture is missing."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (390, 1440):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            asked = []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            for name in SCREENS:
                tab.goto((site / f"{name}.html").as_uri())
                assert tab.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
                broken = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
                assert tab.evaluate(broken) == [], name
                assert len(tab.screenshot()) > 10_000
            assert not [url for url in asked if not url.startswith(("file:", "data:"))]
            tab.close()
        browser.close()


def test_every_page_is_one_of_the_repository():
    """Pages that bring in a file name one that exists."""
    for page in Path(ROOT, "docs").rglob("*.md"):
        first = page.read_text().split("\n", 1)[0]
        if first.startswith("<!-- page: "):
            assert (ROOT / first.split()[2]).is_file(), page
