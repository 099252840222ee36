"""Calls beside the main thread: in order, one at a time, and no error is lost."""

import threading
import time

import pytest

from qvg_jax.app.background import Background


def test_calls_keep_their_order_and_never_overlap():
    done, running = [], []

    def call(i):
        running.append(i)
        time.sleep(0.02)
        assert running == [i]
        running.clear()
        done.append((i, threading.current_thread() is threading.main_thread()))

    with Background() as later:
        for i in range(5):
            later(call, i)
    assert done == [(i, False) for i in range(5)]


def test_the_caller_goes_on_meanwhile():
    go = threading.Event()
    with Background() as later:
        later(go.wait, 10)  # would take ten seconds if the caller had to wait
        go.set()
        later.wait()
    assert go.is_set()


def fail(text):
    raise OSError(text)


def test_errors_come_out_of_the_next_call_or_of_the_end():
    with pytest.raises(OSError, match="first"), Background() as later:
        later(fail, "first")
        later(print, "never")
    with pytest.raises(OSError, match="last"), Background() as later:
        later(fail, "last")


def test_an_error_of_the_caller_is_not_hidden_and_the_call_is_finished():
    done = []

    def slow():
        time.sleep(0.05)
        done.append(True)
        raise OSError("hidden")

    with pytest.raises(KeyboardInterrupt), Background() as later:
        later(slow)
        raise KeyboardInterrupt
    assert done == [True]
