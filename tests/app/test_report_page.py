"""The film of a run, and report.html in a real browser."""

import io
import shlex

import numpy as np
import pytest
from PIL import Image

from models.pocket_world.entry import Options
from qvg_jax.app.command_line import command_line
from qvg_jax.app.film import REAL_SHOWN, Film
from qvg_jax.app.generate import generate
from qvg_jax.app.job import lockstep
from tests.app.test_report import HEIGHT, WIDTH, job


def crop(frame, view):
    left, top, right, bottom = view.box
    return frame[top:bottom, left:right]


def test_the_film_puts_each_difference_below_its_arm():
    run = job(tour=0, frames=20, names=("bf16", "coarse"))
    made = list(lockstep(run))[-1]
    film = Film(run)
    frame, scale = film.draw(made, 1), 4
    assert [v.name for v in film.views] == ["truth", "bf16", "coarse", "10 x difference, coarse"]
    shown = {v.name: crop(frame, v)[::scale, ::scale].astype(int) for v in film.views}
    np.testing.assert_array_equal(shown["truth"], made.truth_FHW3[1])
    assert shown["coarse"].shape == (HEIGHT, WIDTH, 3)
    change = np.clip(128 + 10 * (shown["coarse"] - shown["bf16"]), 0, 255)
    assert change.min() == 255  # brighter by 13 levels, everywhere
    np.testing.assert_array_equal(shown["10 x difference, coarse"], change)
    many = Film(job(names=("bf16", "coarse", "bf16", "coarse")))
    boxes = [v.box for v in many.views]
    assert boxes[5][0] == boxes[2][0] and boxes[5][1] > boxes[2][3]


def test_of_a_long_tour_the_film_shows_the_end():
    assert Film(job(tour=REAL_SHOWN)).first == 0
    assert Film(job(tour=REAL_SHOWN + 6)).first == 6


def test_the_command_is_what_differs_from_the_defaults():
    asked = Options(tour=64, compare=("rtn", "qvg:bits=4"), resume=True, actions="w-8, d-4")
    words = "qvg generate pocket-world --compare rtn,qvg:bits=4 --resume --tour 64"
    said = command_line("generate", "pocket-world", asked)
    assert sorted(shlex.split(said)) == sorted([*words.split(), "--actions", "w-8, d-4"])
    assert command_line("generate", "pocket-world", Options()) == "qvg generate pocket-world"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    generate(job(tour=2, frames=18), out, command="qvg generate it --like '<this>'")
    return out


def test_the_page_wipes_between_arms_and_asks_for_nothing(written, browser):
    page = browser.new_page(viewport={"width": 900, "height": 1000})
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url[:5]))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((written / "report.html").as_uri())
    page.evaluate("document.querySelector('video').currentTime = 1.5")
    page.locator("#frame").filter(has_text="11 of 18").wait_for()  # no eval: the policy forbids it

    def brightness():
        """Of the left and the right half."""
        picture = Image.open(io.BytesIO(page.locator("canvas").screenshot())).convert("L")
        grey = np.asarray(picture)[picture.height // 2 :].astype(float)  # below the labels
        return grey[:, : picture.width // 2].mean(), grey[:, picture.width // 2 :].mean()

    page.locator("#left").select_option(label="bf16")
    page.locator("#right").select_option(label="10 x difference, coarse")
    _, white = brightness()
    assert white > 225
    page.locator("#wipe").fill("100")  # all is of the left one
    assert max(brightness()) < 200
    page.locator("#wipe").fill("0")
    assert min(brightness()) > 225

    plot = page.locator("svg[data-plot]").first
    plot.scroll_into_view_if_needed()
    place = plot.bounding_box()
    page.mouse.move(place["x"] + place["width"] - 12, place["y"] + 50)
    said = page.locator(".hover:not([hidden])").inner_text()
    assert said.startswith("generated frame 18") and "coarse: " in said and " dB" in said
    assert "qvg generate it --like '<this>'" in page.locator("pre").first.inner_text()
    assert set(asked) <= {"file:", "data:"} and errors == []

    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    faults = axe.Axe().run(page).response["violations"]
    assert [f["id"] for f in faults if f["impact"] in ("serious", "critical")] == []
    page.close()
