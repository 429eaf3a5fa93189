"""The engine's lock: re-entrant, and fair to threads that wait."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from granite_paged.engine.lock import FairLock


def test_a_lock_is_the_threads_own_from_taking_it_until_giving_it_back() -> None:
    lock = FairLock()
    assert not lock.is_mine
    with lock:
        assert lock.is_mine
    assert not lock.is_mine
    assert lock.acquire_now()
    assert lock.is_mine
    lock.release()
    assert not lock.is_mine


def test_a_lock_that_was_taken_twice_is_given_back_twice() -> None:
    lock = FairLock()
    with lock:
        with lock:
            assert lock.is_mine
        assert lock.is_mine
    assert not lock.is_mine


def test_a_lock_of_another_thread_is_not_taken_and_not_waited_for() -> None:
    lock, taken, over = FairLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            over.wait(timeout=2)

    holding = threading.Thread(target=hold)
    holding.start()
    taken.wait(timeout=2)
    assert not lock.acquire_now()
    assert not lock.is_mine
    assert holding.is_alive()
    over.set()
    holding.join(timeout=2)


def test_a_thread_that_asks_for_the_lock_again_comes_after_who_waits() -> None:
    lock = FairLock()
    seen: list[int] = []

    def wait(number: int) -> None:
        with lock:
            seen.append(number)

    with ThreadPoolExecutor(1) as pool:
        for number in range(10):
            with lock:
                waiting = pool.submit(wait, number)
                time.sleep(0.02)
            with lock:
                assert seen == list(range(number + 1))
            waiting.result(timeout=10)


def test_a_thread_may_take_the_lock_again_while_others_wait() -> None:
    lock = FairLock()
    with ThreadPoolExecutor(1) as pool:
        with lock:
            waiting = pool.submit(lock.__enter__)
            time.sleep(0.05)
            with lock:
                assert lock.acquire_now()
                lock.release()
            assert lock.is_mine
        waiting.result(timeout=10)
        assert not lock.is_mine
        assert not lock.acquire_now()
        pool.submit(lock.release).result(timeout=10)
    assert lock.acquire_now()
    lock.release()
