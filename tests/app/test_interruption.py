"""Signals are remembered while files are written, and behave as before afterwards."""

import signal
import threading

import pytest

from qvg_jax.app.interruption import SIGNALS, Interruption


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_the_second_one_interrupts(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interruption() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(number) is before and len(SIGNALS) == 3


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone():
    before = [signal.getsignal(number) for number in SIGNALS]

    def look():
        with Interruption():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    seen = []
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == before
