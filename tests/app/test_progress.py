"""Progress of a run: words at once, no long silence, and what they say."""

import contextlib
import time
from types import SimpleNamespace

import jax
import pytest

from qvg_jax.app import progress
from qvg_jax.app.compile_watch import COMPILING, watching_compiler
from qvg_jax.app.progress import Progress, saying, ticking

SIZE = SimpleNamespace(bf16=8e6, in_use=SimpleNamespace(total=2e6))


def job(play=None):
    arms = (SimpleNamespace(name="bf16"), SimpleNamespace(name="qvg"))
    return SimpleNamespace(tour=8, frames=16, arms=arms, play=play)


def made(first):
    names = ("bf16", "qvg")
    return SimpleNamespace(
        first=first, count=4, bytes=dict.fromkeys(names, SIZE), seconds=dict.fromkeys(names, 0.5)
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    monkeypatch.setattr(progress, "REDRAWN", 0.05)


def until(done):
    """Waits for the clock's thread, which may be late on a busy machine."""
    for _ in range(400):
        if done():
            return True
        time.sleep(0.05)
    return False


def test_the_clock_ticks_while_the_body_runs_and_not_after():
    ticks = []
    with ticking(ticks.append, 0.02):
        assert until(lambda: len(ticks) >= 2)
    count = len(ticks)
    time.sleep(0.1)
    assert len(ticks) == count and 0.02 <= ticks[0] < ticks[1]


def test_the_clock_survives_an_output_that_nobody_reads():
    calls = []

    def broken(seconds):
        calls.append(seconds)
        raise BrokenPipeError

    with ticking(broken, 0.02):
        assert until(lambda: len(calls) >= 2)


def test_words_come_at_once_and_again(capsys):
    with saying("loading"):
        assert capsys.readouterr().out == "loading\n"
        text = []
        assert until(
            lambda: text.append(capsys.readouterr().out) or "loading, 0 s" in "".join(text)
        )


def test_lines_say_what_is_compiled_what_is_made_and_how_fast():
    now = Progress(job())
    assert now.line() == "preparing the first block, 0 s"
    now.begins("qvg")
    assert now.line() == "compiling the step of qvg, 0 s"
    now.update(made(0))
    now.begins("bf16")
    want = "4 of 24 frames: bf16 8.0 frames/s, 2.0 MB; qvg 8.0 frames/s, 2.0 MB"
    assert now.line() == want
    assert until(lambda: now.line() == f"{want}; next block of bf16, 0 s")
    now.update(made(20))
    assert now.line().startswith("24 of 24 frames") and now.line().endswith("writing the report")
    other = Progress(job(play=lambda arm, xs: None))
    other.begins("bf16")
    assert other.line() == "loading and compiling the first block of bf16, 0 s"


def test_without_a_terminal_a_long_compilation_is_not_silent(capsys):
    text = []
    with Progress(job()) as now:
        now.begins("qvg")
        assert until(
            lambda: (
                text.append(capsys.readouterr().out)
                or "".join(text).count("compiling the step of qvg, ") >= 2
            )
        )


def test_on_a_terminal_the_bars_count_the_seconds(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    text = []
    with Progress(job()) as now:
        now.begins("qvg")
        assert until(
            lambda: (
                text.append(capsys.readouterr().err)
                or "compiling the step of qvg, 0 s" in "".join(text)
            )
        )
        now.update(made(0))
    text = "".join(text) + capsys.readouterr().err
    assert "qvg " in text and "4/24" in text and "8.0 frames/s" in text


def test_compilation_is_said_while_it_lasts():
    with watching_compiler() as compiling:
        assert compiling() is None
        progress, seen = Progress(job(play=True), compiling), []
        progress.begins("qvg")
        jax.monitoring.record_scalar(COMPILING, 0.0, fun_name="step")
        seen.append(progress.line())
        jax.monitoring.record_event_duration_secs(COMPILING, 1.0, fun_name="step")
        seen.append(progress.line())
        assert seen[0] == "compiling the step of qvg, 0 s" and "loading and compiling" in seen[1]

        def traced(x):  # runs while nothing is compiled; the callback, once it is
            return x + len(seen)

        with monitored(lambda event: seen.append(compiling()) if event == COMPILING else None):
            jax.jit(traced)(1.0)
    assert len(seen) > 2 and all(s is not None and s >= 0 for s in seen[2:])  # JAX says so itself
    assert compiling() is None


@contextlib.contextmanager
def monitored(look):
    def listener(event, value, **_):
        look(event)

    jax.monitoring.register_scalar_listener(listener)
    try:
        yield
    finally:
        jax.monitoring.unregister_scalar_listener(listener)
