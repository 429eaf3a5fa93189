"""The calls of a step: what the runner is asked to compute, and whose numbers come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged.device import Fetch
from granite_paged.engine import executor
from granite_paged.engine.executor import Executor, PendingResult
from granite_paged.engine.job import Job, SampleJob, ScoringJob, State
from granite_paged.engine.request import SamplingParams
from granite_paged.engine.sampling import Drawn
from granite_paged.engine.step import PrefillChunk, ScoreChunk, StepPlan
from granite_paged.runner.runner import Chunk, Scores

VOCABULARY, ROWS = 10, 6
CPU = torch.device("cpu")
FED = 9
"""The token that the runner's decode feeds its first row; the next one is one more."""


class Device:
    """A runner that notes its calls. The logits of the `n`-th row of a call prefer token `n`."""

    device, row_bytes = CPU, 100

    def __init__(self) -> None:
        self.config = SimpleNamespace(exact=False)
        self.tokens = torch.zeros(ROWS, dtype=torch.int64)
        self.nonfinite = torch.zeros(ROWS, dtype=torch.int32)
        self.calls: list[tuple[Any, ...]] = []
        self.broken = ""
        self.unsound: set[int] = set()  # rows whose state is not finite
        self.no_memory: set[int] = set()  # rows whose state cannot be copied

    def load_states(self, rows: list[int]) -> None:
        self._called("load_states", rows)

    def decode(self, rows: list[int], positions: list[int]) -> Tensor:
        self._called("decode", rows, positions)
        self.tokens[rows] = FED + torch.arange(len(rows))
        return _logits(len(rows))

    def prefill(self, chunks: list[Chunk]) -> Tensor:
        self._called("prefill", chunks)
        return _logits(len(chunks))

    def score(self, chunks: list[Chunk], targets: list[list[int]]) -> Scores:
        self._called("score", chunks, targets)
        tokens = [token for each in targets for token in each]
        return Scores(-torch.tensor(tokens).float(), torch.tensor(tokens) > 1)

    def save_row(self, row: int) -> Any:
        if row in self.no_memory:
            raise torch.OutOfMemoryError
        finite = torch.tensor([row not in self.unsound])
        return SimpleNamespace(row=row, all_finite=lambda: finite)

    def _called(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name == self.broken:
            raise ValueError(name)


def _logits(rows: int) -> Tensor:
    return torch.eye(VOCABULARY)[:rows].clone()


class Planner:
    """A scheduler that notes which jobs a fault concerns."""

    def __init__(self) -> None:
        self.recovered: list[list[Job]] = []
        self.followers: list[SampleJob] = []
        self.broken = False
        self.checkpoints: set[int] = set()

    def recover(self, jobs: Sequence[Job], error: Exception) -> None:
        assert isinstance(error, ValueError)
        self.recovered.append(list(jobs))

    def prefilled(self, chunk: PrefillChunk) -> Iterator[SampleJob]:
        assert chunk.last
        yield from self.followers
        if self.broken:
            raise ValueError("fork")

    def room_for_state(self, chunk: PrefillChunk, nbytes: int) -> bool:
        assert nbytes == Device.row_bytes
        return chunk.end in self.checkpoints


class Setting:
    def __init__(self) -> None:
        self.device, self.planner = Device(), Planner()
        runner: Any = self.device
        scheduler: Any = self.planner
        self.executor = Executor(runner, scheduler)

    def launch(self, **calls: Any) -> list[PendingResult]:
        return self.executor.launch(StepPlan(**calls))

    def read(self, **calls: Any) -> list[dict[str, list[Any]]]:
        """Launch, and return the numbers of each result."""
        return [result.fetch.read() for result in self.launch(**calls)]


def sample(row: int, tokens: Sequence[int] = (5, 6, 7), **params: Any) -> SampleJob:
    request: Any = SimpleNamespace(number=row, params=SamplingParams(**params))
    job = SampleJob(request=request, tokens=list(tokens), max_stored=20, drawn=1)
    job.greedy = request.params.greedy
    return placed(job, row)


def context(row: int, *continuations: tuple[int, ...]) -> ScoringJob:
    request: Any = SimpleNamespace(
        number=row, continuations=continuations, scores=[None] * len(continuations)
    )
    return placed(ScoringJob(request=request, tokens=[5, 6, 7], max_stored=20), row)


def placed(job: Any, row: int) -> Any:
    job.state = State.DECODE
    job.placement = SimpleNamespace(row=row, sequence=10 + row, stored=len(job.tokens))
    return job


def whole(job: Job, *, last: bool = True) -> PrefillChunk:
    return PrefillChunk(job, job.generation, 0, 3, last)


# -- results ------------------------------------------------------------------------------------


def test_a_result_concerns_each_job_once_unless_it_started_over_since() -> None:
    jobs: list[Any] = [sample(row) for row in range(4)]
    part = ScoreChunk(jobs[2], 0, 0, 0, 1, 1, 1, forked=False)
    result = PendingResult(
        Fetch(CPU),
        drawn=[(jobs[0], 0, 0), (jobs[1], 0, 1)],
        prefilled=[(whole(jobs[0]), None), (whole(jobs[3]), None)],
        scored=[part, part],
    )
    assert result.jobs == [jobs[0], jobs[1], jobs[3], jobs[2]]
    jobs[1].generation += 1
    jobs[2].generation += 1
    assert result.jobs == [jobs[0], jobs[3]]


# -- launching ----------------------------------------------------------------------------------


def test_a_step_feeds_decodes_scores_and_prefills_in_this_order() -> None:
    setting = Setting()
    resumed, decoding, prefilled = sample(1), sample(2), sample(3)
    scored = context(4, (1, 2))
    results = setting.launch(
        resumed=[resumed],
        decodes=[[decoding]],
        scores=[[ScoreChunk(scored, 0, 0, 0, 2, 4, 14, forked=False)]],
        prefills=[[whole(prefilled, last=False)]],
    )
    assert setting.device.tokens[1] == 7
    assert [call[0] for call in setting.device.calls] == ["decode", "score", "prefill"]
    assert [result.jobs for result in results] == [[decoding], [scored], [prefilled]]
    assert setting.planner.recovered == []


def test_states_are_loaded_first_and_an_isolated_job_loads_alone() -> None:
    setting = Setting()
    first, second, alone, gone = (sample(row) for row in (3, 1, 2, 4))
    alone.isolated, gone.placement = True, None
    setting.launch(loading=[first, second, first, alone, gone], decodes=[[sample(5)]])
    assert [call[0] for call in setting.device.calls] == ["load_states", "load_states", "decode"]
    assert [call[1] for call in setting.device.calls[:2]] == [[3, 1], [2]]


def test_a_load_that_raises_concerns_the_jobs_that_load() -> None:
    setting = Setting()
    setting.device.broken = "load_states"
    loading, decoding = sample(1), sample(2)
    (result,) = setting.launch(loading=[loading], decodes=[[decoding]])
    assert setting.planner.recovered == [[loading]]
    assert result.jobs == [decoding]


def test_only_the_row_of_a_job_is_fed_its_last_token() -> None:
    setting = Setting()
    setting.executor.feed(sample(2, [1, 2, 3, 4]))
    assert setting.device.tokens.tolist() == [0, 0, 4, 0, 0, 0]


def test_a_chunk_of_a_job_that_started_over_or_ended_is_dropped() -> None:
    setting = Setting()
    over, done, good = sample(1), sample(2), sample(3)
    chunks = [whole(job, last=False) for job in (over, done, good)]
    over.generation += 1
    done.state = State.DONE
    (result,) = setting.launch(prefills=[chunks, chunks[:2]])
    assert result.jobs == [good]
    assert setting.device.calls == [("prefill", [Chunk(3, 0, [5, 6, 7])])]


def test_a_call_that_raises_concerns_its_own_jobs() -> None:
    setting = Setting()
    setting.device.broken = "decode"
    first, second, other = sample(1), sample(2), sample(3)
    results = setting.launch(decodes=[[first, second]], prefills=[[whole(other)]])
    assert setting.planner.recovered == [[first, second]]
    assert {job for result in results for job in result.jobs} == {other}
    assert setting.executor._concerned == []


def test_a_prefill_that_raises_after_forking_concerns_the_forks_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = Setting()
    job, follower, other = sample(1), sample(2), sample(3)
    setting.planner.followers = [follower]

    def fail(*arguments: Any, **options: Any) -> Any:
        raise ValueError("draw")

    monkeypatch.setattr(executor, "draw", fail)
    assert setting.launch(prefills=[[whole(other, last=False), whole(job)]]) == []
    assert setting.planner.recovered == [[other, job, follower]]


def test_a_fork_that_raises_concerns_those_before_it() -> None:
    setting = Setting()
    job, follower = sample(1), sample(2)
    setting.planner.followers, setting.planner.broken = [follower], True
    assert setting.launch(prefills=[[whole(job)]]) == []
    assert setting.planner.recovered == [[job, follower]]


# -- decoding -----------------------------------------------------------------------------------


def test_a_decode_computes_the_last_stored_token_of_each_row() -> None:
    setting = Setting()
    first, second = sample(3), sample(1, [5, 6, 7, 8])
    setting.launch(decodes=[[first, second]])
    assert setting.device.calls == [("decode", [3, 1], [2, 3])]


def test_greedy_decodes_take_the_token_that_was_fed() -> None:
    setting = Setting()
    setting.device.nonfinite[3] = 1
    jobs = [sample(3), sample(1)]
    (result,) = setting.launch(decodes=[jobs])
    numbers = result.fetch.read()
    read = [(numbers["tokens"][at], numbers["bad"][at]) for _, _, at in result.drawn]
    assert [(job, generation) for job, generation, _ in result.drawn] == [(job, 0) for job in jobs]
    assert read == [(FED, 1), (FED + 1, 0)]


def test_a_decode_with_a_draw_draws_for_every_job_and_feeds_what_it_drew() -> None:
    setting = Setting()
    (numbers,) = setting.read(decodes=[[sample(3), sample(1, logprobs=2)]])
    assert numbers["tokens"] == [0, 1], "the argmax of each row of logits"
    assert setting.device.tokens.tolist() == [0, 1, 0, 0, 0, 0]
    assert len(numbers["top_tokens"][1]) == 2


def test_a_job_that_decoded_alone_is_trusted_again() -> None:
    setting = Setting()
    alone, first, second = sample(1), sample(2), sample(3)
    for job in (alone, first, second):
        job.isolated = True
    setting.launch(decodes=[[alone], [first, second]])
    assert [job.isolated for job in (alone, first, second)] == [False, True, True]


def test_a_job_whose_decode_raised_stays_isolated() -> None:
    setting = Setting()
    setting.device.broken = "decode"
    job = sample(1)
    job.isolated = True
    setting.launch(decodes=[[job]])
    assert job.isolated


@pytest.mark.parametrize("fault", [1, 2, -1])
def test_a_row_that_was_not_finite_is_bad(fault: int) -> None:
    setting = Setting()
    setting.device.nonfinite[1] = fault
    (numbers,) = setting.read(decodes=[[sample(3), sample(1), sample(2, logprobs=0)]])
    assert numbers["bad"] == [False, True, False]


def test_logits_that_are_not_finite_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting()
    logits = _logits(2)
    logits[1, 4] = float("inf")
    monkeypatch.setattr(setting.device, "decode", lambda rows, positions: logits)
    (numbers,) = setting.read(decodes=[[sample(3, logprobs=0), sample(1)]])
    assert numbers["bad"] == [False, True]


# -- draws --------------------------------------------------------------------------------------


def draws_of(setting: Setting, monkeypatch: pytest.MonkeyPatch, *jobs: SampleJob) -> list[Any]:
    """Decode these jobs, and return what `draw` is asked for."""
    found: list[Any] = []

    def noted(logits: Tensor, draws: Any, *, exact: bool) -> Drawn:
        found.extend([*draws, exact])
        return Drawn(torch.zeros(len(draws), dtype=torch.int64))

    monkeypatch.setattr(executor, "draw", noted)
    setting.launch(decodes=[list(jobs)])
    return found


@pytest.mark.parametrize("exact", [False, True])
def test_a_draw_has_its_sample_seed_and_place(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting()
    setting.device.config.exact = exact
    job = sample(1, temperature=1.0)
    job.seed, job.drawn = 77, 4
    draw, was_exact = draws_of(setting, monkeypatch, job)
    assert (draw.params, draw.seed, draw.place) == (job.request.params, 77, 3)
    assert draw.seen is job.seen is None
    assert was_exact is exact


@pytest.mark.parametrize("penalty", [0.5, 2.0])
def test_a_repetition_penalty_falls_on_the_tokens_so_far(
    penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting()
    job, later = (sample(row, repetition_penalty=penalty) for row in (1, 2))
    later.seen = seen = torch.ones(VOCABULARY, dtype=torch.bool)
    first, second, _ = draws_of(setting, monkeypatch, job, later)
    assert first.seen is job.seen
    assert first.seen.nonzero().flatten().tolist() == [5, 6, 7]
    assert second.seen is seen, "the draw keeps it up to date"


# -- prefill ------------------------------------------------------------------------------------


def test_a_prefill_computes_the_tokens_of_each_chunk() -> None:
    setting = Setting()
    first, second = sample(3, range(1, 10)), sample(1, range(20, 30))
    chunks = [PrefillChunk(first, 0, 4, 8, last=False), PrefillChunk(second, 0, 0, 2, last=False)]
    (result,) = setting.launch(prefills=[chunks])
    assert setting.device.calls == [("prefill", [Chunk(3, 4, [5, 6, 7, 8]), Chunk(1, 0, [20, 21])])]
    assert result.prefilled == [(chunks[0], None), (chunks[1], None)]
    assert result.fetch.read() == {"unsound": [False, False]}


def test_the_last_chunk_of_a_prompt_draws_for_each_of_its_samples() -> None:
    setting = Setting()
    middle, job, follower = sample(1), sample(2), sample(3)
    setting.planner.followers = [follower]
    _, drawn = setting.launch(prefills=[[whole(middle, last=False), whole(job)]])
    assert drawn.drawn == [(job, 0, 0), (follower, 0, 1)]
    assert drawn.fetch.read()["tokens"] == [1, 1], "from the logits of the second chunk"
    assert setting.device.tokens.tolist() == [0, 0, 1, 1, 0, 0]


def test_a_context_of_longer_continuations_draws_and_scores_nothing_yet() -> None:
    setting = Setting()
    chunks = [whole(context(1, (1, 2))), whole(context(2, (1,)), last=False)]
    (result,) = setting.launch(prefills=[chunks])
    assert (result.drawn, result.scored) == ([], [])


def test_the_last_logits_score_the_continuations_of_one_token() -> None:
    setting = Setting()
    other, job = sample(1), context(2, (3,), (1,), (4,))
    job.request.scores[0] = "score"  # type: ignore[call-overload]
    setting.device.nonfinite[2] = 1
    _, scored = setting.launch(prefills=[[whole(other, last=False), whole(job)]])
    assert scored.scored == [
        ScoreChunk(job, 0, number, 0, 1, 2, 12, forked=False) for number in (1, 2)
    ]
    numbers = scored.fetch.read()
    expected = _logits(2)[1].log_softmax(-1)[[1, 4]].tolist()
    assert numbers["logprobs"] == pytest.approx(expected)
    assert (numbers["greedy"], numbers["bad"]) == ([True, False], [True, True])


def test_a_state_for_which_there_is_no_memory_is_not_kept() -> None:
    setting = Setting()
    setting.planner.checkpoints = {3}
    setting.device.no_memory = {1}
    jobs = [sample(row) for row in (3, 1)]
    (result,) = setting.launch(prefills=[[whole(job, last=False) for job in jobs]])
    assert [state and state.row for _, state in result.prefilled] == [3, None]
    assert result.fetch.read()["unsound"] == [False, False]
    assert setting.planner.recovered == []


@pytest.mark.parametrize("unsound", [0, 1, 2])
def test_a_chunk_whose_state_is_not_finite_is_unsound(unsound: int) -> None:
    setting = Setting()
    setting.planner.checkpoints = {3}
    jobs = [sample(row) for row in (3, 1, 2)]
    setting.device.unsound = {jobs[unsound].placed.row}
    (result,) = setting.launch(prefills=[[whole(job, last=False) for job in jobs]])
    assert result.fetch.read()["unsound"] == [place == unsound for place in range(3)]
    assert [state.row for _, state in result.prefilled if state] == [3, 1, 2]


@pytest.mark.parametrize("fault", [1, 2, -1])
def test_a_chunk_whose_row_is_not_finite_is_unsound(fault: int) -> None:
    setting = Setting()
    setting.device.nonfinite[1] = fault
    chunks = [whole(sample(row), last=False) for row in (3, 1)]
    assert setting.read(prefills=[chunks]) == [{"unsound": [False, True]}]


def test_a_state_is_copied_at_checkpoints_only() -> None:
    setting = Setting()
    setting.planner.checkpoints = {2}
    job, other = sample(1), sample(2)
    chunks = [PrefillChunk(job, 0, 0, 2, last=False), whole(other, last=False)]
    (result,) = setting.launch(prefills=[chunks])
    assert [state is not None for _, state in result.prefilled] == [True, False]


# -- scores -------------------------------------------------------------------------------------


def test_a_continuation_is_fed_after_the_last_token_of_its_context() -> None:
    setting = Setting()
    job, other = context(1, (1, 2, 3, 4, 8), (2,)), context(3, (9, 1))
    setting.device.nonfinite[2] = 1
    parts = [
        ScoreChunk(job, 0, 0, 0, 3, 1, 11, forked=False),
        ScoreChunk(job, 0, 0, 3, 5, 1, 11, forked=False),
        ScoreChunk(job, 0, 1, 0, 1, 2, 12, forked=True),
        ScoreChunk(other, 0, 0, 0, 2, 3, 13, forked=False),
    ]
    (result,) = setting.launch(scores=[parts])
    chunks = [
        Chunk(1, 2, [7, 1, 2]), Chunk(1, 5, [3, 4]), Chunk(2, 2, [7]), Chunk(3, 2, [7, 9]),
    ]  # fmt: skip
    targets = [[1, 2, 3], [4, 8], [2], [9, 1]]
    assert setting.device.calls == [("score", chunks, targets)]
    assert result.scored == parts
    assert result.fetch.read() == {
        "logprobs": [-token for each in targets for token in each],
        "greedy": [token > 1 for each in targets for token in each],
        "bad": [0, 0, 1, 0],
    }
