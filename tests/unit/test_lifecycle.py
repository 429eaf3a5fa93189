"""How jobs end and start over: what is freed, and whose fault it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from granite_paged.engine.job import SampleJob, State
from granite_paged.engine.lifecycle import JobLifecycle
from granite_paged.engine.prefix_cache import Hit
from granite_paged.errors import RequestTooLarge, StepFailed
from granite_paged.paging.allocator import PageAllocator

PAGES, PAGE = 6, 4


def make(*, rows: int = 4, longest: int = 99) -> JobLifecycle:
    """Return a lifecycle over `PAGES` pages of `PAGE` tokens."""
    prefix: Any = mock.Mock(sequences=[])
    prefix.checkpoints.return_value, prefix.evict.return_value = {}, []
    limits: Any = SimpleNamespace(
        queue=9, longest=longest, rows=rows, swap_bytes=0, chunk_tokens=8, shapes=None
    )
    device: Any = mock.Mock()
    return JobLifecycle(device, PageAllocator(PAGES + 1, PAGE), prefix, limits)


def sample(number: int = 1, *, limit: int = 9) -> SampleJob:
    request: Any = SimpleNamespace(
        number=number, prompt=(1, 2, 3), stop_tokens=(), namespace="", params=None
    )
    return SampleJob(request=request, tokens=[1, 2, 3], max_stored=20, limit=limit)


def started(life: JobLifecycle, number: int = 1) -> SampleJob:
    """Return a job that decodes."""
    job = sample(number)
    assert life.running.place(job, Hit())
    job.placed.stored = job.placed.target
    life.running.end_prefill(job)
    return job


def waiting(life: JobLifecycle, number: int = 1) -> SampleJob:
    job = sample(number)
    life.queue.add(job)
    return job


def check(life: JobLifecycle) -> None:
    life.running.check_valid()
    life.queue.check_valid()


# -- what fits ----------------------------------------------------------------------------------


def test_a_sequence_may_take_every_page_but_the_null_page() -> None:
    life = make()
    life.check_fits(PAGES * PAGE)
    with pytest.raises(RequestTooLarge, match="7 needed, 6 free; raise max_tokens"):
        life.check_fits(PAGES * PAGE + 1)


def test_a_sequence_may_have_as_many_tokens_as_the_model_has_positions() -> None:
    life = make(longest=10)
    life.check_fits(10)
    with pytest.raises(RequestTooLarge, match=r"3 needed, 3 free; .* may have 10 tokens, got 11"):
        life.check_fits(11)


# -- ends ---------------------------------------------------------------------------------------


def test_a_job_that_ends_frees_what_it_holds_and_lets_its_followers_wait() -> None:
    life = make()
    job, followers = started(life), [sample(), sample()]
    job.followers = list(followers)
    life.finish(job)
    assert (job.state, job.placement, job.followers) == (State.DONE, None, [])
    assert life.running.rows.free == 4
    assert life.queue.jobs() == followers
    check(life)


def test_a_waiting_job_that_ends_leaves_the_queue() -> None:
    life = make()
    job = waiting(life)
    life.finish(job)
    assert (job.state, len(life.queue)) == (State.DONE, 0)


def test_a_job_ends_once() -> None:
    life = make()
    job = started(life)
    life.finish(job)
    job.followers = [sample()]
    life.finish(job)
    life.fail(job, ValueError())
    assert (len(life.queue), life.failures) == (0, [])


def test_a_job_that_fails_ends_with_its_siblings_and_is_reported_once() -> None:
    class Beam(SampleJob):
        siblings: Any = None

    life = make()
    beam, sibling, other = Beam(**_fields(sample())), started(life), started(life)
    beam.siblings = [sibling, beam]
    error = ValueError()
    life.fail(beam, error)
    assert life.failures == [(beam, error)]
    assert [job.state for job in (beam, sibling, other)] == [
        State.DONE, State.DONE, State.DECODE,
    ]  # fmt: skip
    check(life)


def _fields(job: SampleJob) -> dict[str, Any]:
    return {name: getattr(job, name) for name in ("request", "tokens", "max_stored", "limit")}


# -- forks --------------------------------------------------------------------------------------


def test_a_decoding_job_is_forked_where_a_row_is_free() -> None:
    life = make(rows=2)
    job, child = started(life), sample()
    assert life.fork(job, child)
    assert child.state is State.DECODE
    third = sample()
    assert not life.fork(job, third), "no row is free"
    assert (third.state, third.placement, life.failures) == (State.NEW, None, [])
    check(life)


def test_a_job_that_does_not_decode_is_not_forked() -> None:
    life = make()
    job, child = waiting(life), sample()
    assert not life.fork(job, child)
    assert (child.state, life.failures) == (State.NEW, [])


def test_a_fork_that_raises_ends_the_new_job() -> None:
    life = make()
    job, child = started(life), sample(2)
    fault = MemoryError()
    life.running.fork = mock.Mock(side_effect=fault)  # type: ignore[method-assign]
    assert not life.fork(job, child)
    ((failed, error),) = life.failures
    assert failed is child
    assert isinstance(error, StepFailed)
    assert (error.request, error.__cause__) == (2, fault)
    assert (job.state, child.state) == (State.DECODE, State.DONE)


def test_what_is_done_for_one_job_returns_its_result() -> None:
    assert make().guarded(sample(), divmod, 7, 4) == (1, 3)


# -- faults -------------------------------------------------------------------------------------


def test_a_job_that_was_alone_in_a_call_that_raised_fails() -> None:
    life = make()
    job, done = started(life, 3), sample()
    done.state = State.DONE
    fault = ValueError()
    life.recover([job, done, job], fault)
    ((failed, error),) = life.failures
    assert failed is job
    assert isinstance(error, StepFailed)
    assert (error.request, error.__cause__) == (3, fault)
    assert (job.state, life.counts.restarted) == (State.DONE, 0)
    check(life)


def test_several_jobs_of_a_call_that_raised_start_over_each_by_itself() -> None:
    life = make()
    jobs = [started(life), started(life)]
    life.recover(jobs, ValueError())
    assert life.failures == []
    assert life.counts.restarted == 2
    assert life.queue.jobs() == jobs
    assert [(job.isolated, job.generation, job.placement) for job in jobs] == [(True, 1, None)] * 2
    check(life)


def test_no_job_is_concerned_by_a_call_whose_jobs_are_done() -> None:
    life = make()
    job = started(life)
    life.finish(job)
    life.recover([job], ValueError())
    assert (life.failures, life.counts.restarted) == ([], 0)


def test_after_an_interrupt_complete_jobs_end_and_the_others_start_over() -> None:
    life = make()
    running, complete, new, done, queued = (
        started(life), started(life), sample(), sample(), waiting(life),
    )  # fmt: skip
    complete.tokens += [9] * complete.limit
    done.state = State.DONE
    life.restart([running, complete, new, done, queued])
    assert [job.state for job in (running, complete, new, done, queued)] == [
        State.WAITING, State.DONE, State.NEW, State.DONE, State.WAITING,
    ]  # fmt: skip
    assert [job.generation for job in (running, complete, new, done, queued)] == [1, 0, 0, 0, 1]
    assert not running.isolated
    assert life.counts.restarted == 2
    check(life)
