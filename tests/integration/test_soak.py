"""The engine in random traffic with faults, as `nox -s soak` does for an hour; and what it sees."""

from __future__ import annotations

from typing import Any

import pytest

from granite_paged.engine.engine import Engine
from granite_paged.engine.executor import Executor
from granite_paged.engine.request import Request
from granite_paged.engine.rows import RowPool
from granite_paged.engine.running import RunningJobs
from tests.helpers import soak
from tests.helpers.soak import Memory, Soak, SoakFailed

SECONDS = 8.0
MB = 10**6


@pytest.fixture(scope="module")
def soaking() -> Soak:
    return Soak(seed=1, size=12)


def test_traffic_with_faults_changes_no_answer_and_leaves_memory_flat(soaking: Soak) -> None:
    soaking.run(SECONDS)


def leak_a_page(patch: pytest.MonkeyPatch) -> None:
    """Pages of a cancelled request are not given back."""
    release = RunningJobs.release
    calls = 0

    def forgetful(self: RunningJobs, sequence: int) -> None:
        nonlocal calls
        calls += 1
        if calls != 5:
            release(self, sequence)

    patch.setattr(RunningJobs, "release", forgetful)


def leak_a_row(patch: pytest.MonkeyPatch) -> None:
    """A row that is given back is lost."""
    give = RowPool.give
    patch.setattr(RowPool, "give", lambda self, row: None if row == 2 else give(self, row))


def leak_requests(patch: pytest.MonkeyPatch) -> None:
    """Something outside the engine keeps every request."""
    kept: list[Request] = []
    submit = Engine.submit

    def keeping(self: Engine, *args: Any, **kwargs: Any) -> Request:
        kept.append(submit(self, *args, **kwargs))
        return kept[-1]

    patch.setattr(Engine, "submit", keeping)


def answer_something_else(patch: pytest.MonkeyPatch) -> None:
    """A draw returns another token."""
    drawn = Executor._drawn

    def other(self: Executor, logits: Any, jobs: Any, **options: Any) -> Any:
        return drawn(self, logits.roll(1, dims=-1), jobs, **options)

    patch.setattr(Executor, "_drawn", other)


@pytest.mark.parametrize(
    "fault",
    [leak_a_page, leak_a_row, leak_requests, answer_something_else],
    ids=lambda f: f.__name__,
)
def test_the_soak_sees(fault: Any, soaking: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    soaking.run_engine(memory.warm_up)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        soaking.run_engine(memory.look)


@pytest.mark.parametrize(("last", "is_flat"), [(504, True), (506, False), (400, True)])
def test_memory_is_flat_if_the_last_third_is_at_most_1_percent_above_the_first(
    last: int, is_flat: bool
) -> None:
    """One high value among several is no growth."""
    memory = Memory([500 * MB, 500 * MB, 900 * MB, *[1] * 3, last * MB, last * MB, 900 * MB])
    assert memory.growth == pytest.approx(last / 500 - 1)
    if is_flat:
        memory.check_flat()
    else:
        with pytest.raises(SoakFailed, match="memory grew by"):
            memory.check_flat()


def test_a_failed_soak_ends_with_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Soak, seconds: float) -> None:
        assert seconds == 2
        raise SoakFailed("pages leaked")

    monkeypatch.setattr(Soak, "__init__", lambda self, *args: setattr(self, "rounds", 3))
    monkeypatch.setattr(Soak, "run", fail)
    monkeypatch.setattr("sys.argv", ["soak", "2", "--seed", "7"])
    assert soak.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "soak: failed in round 4 of seed 7: pages leaked"
    )
