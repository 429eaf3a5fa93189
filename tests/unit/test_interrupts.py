"""Ctrl-C waits for the end of a block; a second one does not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from granite_paged.engine.interrupts import interrupts_wait


@pytest.fixture(autouse=True)
def _default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_first_waits_for_the_end() -> None:
    reached: list[str] = []

    @interrupts_wait()
    def work() -> None:
        press()
        reached.append("end")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["end"]
    with pytest.raises(KeyboardInterrupt):
        press()


def test_the_second_interrupts_at_once() -> None:
    @interrupts_wait()
    def work() -> None:
        press()
        press()
        pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_inner_block_leaves_it_to_the_outer_one() -> None:
    reached: list[str] = []

    @interrupts_wait()
    def work() -> None:
        interrupts_wait()(press)()
        reached.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["outer"]


def test_an_error_of_the_block_is_the_context_of_the_interrupt() -> None:
    @interrupts_wait()
    def work() -> None:
        press()
        raise ValueError("of the block")

    with pytest.raises(KeyboardInterrupt) as raised:
        work()
    assert isinstance(raised.value.__context__, ValueError)


def test_nothing_changes_without_ctrl_c() -> None:
    with pytest.raises(ValueError, match="of the block"), interrupts_wait():
        raise ValueError("of the block")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_program_is_left_alone() -> None:
    heard: list[Any] = []
    mine = lambda *arguments: heard.append(arguments)  # noqa: E731
    signal.signal(signal.SIGINT, mine)
    with interrupts_wait():
        press()
        assert len(heard) == 1
    assert signal.getsignal(signal.SIGINT) is mine


def test_a_handler_that_the_block_sets_stays() -> None:
    mine = lambda *arguments: None  # noqa: E731
    with interrupts_wait():
        signal.signal(signal.SIGINT, mine)
    assert signal.getsignal(signal.SIGINT) is mine


def test_other_threads_have_no_handler() -> None:
    seen: list[Any] = []

    def look() -> None:
        with interrupts_wait():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
