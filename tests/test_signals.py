"""Signals that come while something is done whole are handled behind it, each once."""

from __future__ import annotations

import signal
import threading

import pytest

from fastft.signals import Held

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture
def handled():
    """The signals that handlers of a program's own were called with, in order."""
    called: list[int] = []
    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        signal.signal(number, lambda number, frame: called.append(number))
    yield called
    for number, handler in before.items():
        signal.signal(number, handler)


def test_they_wait_for_the_end_and_come_in_their_order(handled):
    stock = [signal.getsignal(number) for number in NUMBERS]
    with Held():
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1):
            signal.raise_signal(number)
        assert handled == []
    assert handled == [signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1]
    assert [signal.getsignal(number) for number in NUMBERS] == stock


def test_one_inside_another_waits_for_the_outer_one(handled):
    with Held():
        with Held():
            signal.raise_signal(signal.SIGINT)
        assert handled == []
    assert handled == [signal.SIGINT]


def test_what_a_handler_raises_comes_out_and_all_handlers_are_back(handled):
    def stop(number, frame):
        raise InterruptedError(number)

    signal.signal(signal.SIGTERM, stop)
    with pytest.raises(InterruptedError), Held():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
    assert handled == [signal.SIGINT] and signal.getsignal(signal.SIGTERM) is stop


def test_an_error_inside_comes_out(handled):
    with pytest.raises(ZeroDivisionError), Held():
        raise ZeroDivisionError
    signal.raise_signal(signal.SIGINT)
    assert handled == [signal.SIGINT]


def test_what_the_program_leaves_to_the_system_is_left_to_it():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with Held():
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    signal.signal(signal.SIGUSR1, before)


def test_other_threads_leave_handlers_alone(handled):
    stock = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with Held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [stock]
