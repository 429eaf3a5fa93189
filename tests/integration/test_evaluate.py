"""The evaluation: equal answers, detected differences, and answers that are never lost."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from granite_paged import PagedConfig
from granite_paged.digests import tensor_digest
from granite_paged.errors import DataError, NonFiniteRequest, RequestError
from granite_paged.evaluate import peak_memory, run
from granite_paged.evaluate.journal import Journal
from granite_paged.evaluate.metrics import (
    Agreement,
    agreement,
)
from granite_paged.evaluate.near_ties import judge_near_ties
from granite_paged.evaluate.peak_memory import PeakMemory
from granite_paged.evaluate.scorer import Answer, Needs, ScoreRequest, choice
from granite_paged.evaluate.scorer_default import DefaultScorer
from granite_paged.evaluate.tasks import Question, Task, TaskOptions, make_task
from granite_paged.models import TINY_RECALL, LoadedModel, load, load_tokenizer
from granite_paged.paging.page_table import UNHELD, PageTable
from tests.helpers import faults
from tests.helpers.evaluation import (
    SMALL_PAGES,
    data_folder,
    requests,
    tiny_evaluation,
    tiny_loaded,
    tiny_task,
)
from tests.helpers.memory_errors import MEMORY_ERRORS
from tests.helpers.tiny_models import VOCABULARY

LONGEST_RECALL = 128  # tokens: attention on the CPU is dense


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def recall(embedded: LoadedModel) -> Task:
    task = make_task("recall", TaskOptions(smallest=16), embedded, None)
    short = [q for q in task.questions if len(q.request.context) <= LONGEST_RECALL]
    return dataclasses.replace(task, questions=tuple(short))


def evaluate_recall(embedded: LoadedModel, recall: Task) -> tuple[Any, Agreement]:
    """Return the metrics of the paged mode, and its agreement with default."""
    config = PagedConfig(page_size=16)
    result = tiny_evaluation(embedded, recall, config=config).tasks["recall"]
    return result.modes["paged"], result.agreement["paged"]


# -- the same answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("flavour", ["hybrid", "dense"])
def test_default_and_paged_agree_in_float32(flavour: str, batch: int) -> None:
    evaluation = tiny_evaluation(tiny_loaded(flavour), tiny_task(12), batch=batch)
    found = evaluation.tasks["tiny"].agreement["paged"]
    assert found.questions == 12
    assert found.differing == ()
    assert found.largest_difference < 1e-4
    assert evaluation.passed


def test_both_modes_answer_recall_correctly(embedded: LoadedModel, recall: Task) -> None:
    paged, found = evaluate_recall(embedded, recall)
    assert paged.accuracy == 1.0
    assert found.differing == ()


def test_both_modes_agree_on_real_questions(embedded: LoadedModel) -> None:
    folder = data_folder()
    tokenizer = load_tokenizer(f"{folder}/cl100k_tokenizer.json")
    loaded = tiny_loaded(vocab_size=100352, hidden_size=48)
    options = TaskOptions(num_fewshot=0, limit=10, data=folder)
    for name in ("mmlu", "truthfulqa_mc1"):
        task = make_task(name, options, loaded, tokenizer)
        found = tiny_evaluation(loaded, task).tasks[name].agreement["paged"]
        assert found.questions == 10
        assert found.differing == (), name


# -- mutation tests -----------------------------------------------------------------------------


def dropped_pages(table: PageTable) -> None:
    """Remove the owner of every row's second page from the inverse map."""
    second = table.physical[:, 1].long()
    table.logical[second[second > 0]] = UNHELD


def duplicated_pages(table: PageTable) -> None:
    """Name every row's first page also in place of its second."""
    table.physical[:, 1] = table.physical[:, 0]


@pytest.mark.parametrize("spoil", [dropped_pages, duplicated_pages])
def test_a_wrong_page_table_lowers_recall_and_agreement(
    spoil: Any, embedded: LoadedModel, recall: Task
) -> None:
    with faults.after_table_write(spoil):
        paged, found = evaluate_recall(embedded, recall)
    assert paged.accuracy < 0.95
    assert len(found.differing) > 0.05 * found.questions
    assert not found.passed, "the differences must not pass as near-ties"


def test_values_in_a_wrong_page_lower_recall(embedded: LoadedModel, recall: Task) -> None:
    with faults.crossed_values():
        paged, found = evaluate_recall(embedded, recall)
    assert paged.accuracy < 0.8  # a context of one page has no neighbouring page
    assert not found.passed


def test_a_wrong_answer_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paged scorer negates its log-likelihoods."""
    make = run.make_scorer

    def contrary(mode: str, *args: Any) -> Any:
        scorer = make(mode, *args)
        return _Contrary(scorer) if mode == "paged" else scorer

    monkeypatch.setattr(run, "make_scorer", contrary)
    evaluation = tiny_evaluation()
    found = evaluation.tasks["tiny"].agreement["paged"]
    assert len(found.differing) == 6
    assert not evaluation.passed
    for difference in found.differing:
        assert difference.near_tie is False
        assert difference.gap > found.sdpa_error > 0  # type: ignore[operator]


class _Contrary:
    batch = 1

    def __init__(self, scorer: Any) -> None:
        self._scorer = scorer
        self.forget = scorer.forget
        self.close = scorer.close

    def score(self, asked: Sequence[ScoreRequest]) -> list[Answer]:
        return [
            a._replace(logprobs=tuple(-logprob for logprob in a.logprobs))
            for a in self._scorer.score(asked)
        ]


# -- answers that are not finite ----------------------------------------------------------------


class _NotFinite:
    """The scores of `scorer`; those of all requests but one are NaN, or end in an error."""

    batch = 2

    def __init__(self, scorer: Any, sound: ScoreRequest, *, raises: bool) -> None:
        self._scorer, self._sound, self._raises = scorer, sound, raises
        self.forget = scorer.forget
        self.close = scorer.close

    def score(self, asked: Sequence[ScoreRequest]) -> list[Answer]:
        return [
            answer if request == self._sound else self._spoilt(answer)
            for request, answer in zip(asked, self._scorer.score(asked), strict=True)
        ]

    def _spoilt(self, answer: Answer) -> Answer:
        if self._raises:
            raise NonFiniteRequest(0)
        return answer._replace(logprobs=(math.nan,) * len(answer.logprobs))


@pytest.fixture(params=[False, True], ids=["NaN", "NonFiniteRequest"])
def paged_is_not_finite(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paged scorer answers only the first question of `tiny_task()` with finite numbers."""
    make, sound = run.make_scorer, tiny_task().questions[0].request

    def spoilt(mode: str, *args: Any) -> Any:
        scorer = make(mode, *args)
        return _NotFinite(scorer, sound, raises=request.param) if mode == "paged" else scorer

    monkeypatch.setattr(run, "make_scorer", spoilt)


@pytest.mark.usefixtures("paged_is_not_finite")
def test_answers_that_are_not_finite_fail_the_run(tmp_path: Path) -> None:
    path = str(tmp_path / "answers.jsonl")
    with closing(Journal(path, {})) as journal:
        evaluation = tiny_evaluation(journal=journal)
    found = evaluation.tasks["tiny"].agreement["paged"]
    assert (found.questions, found.differing, found.not_finite) == (1, (), 5)
    assert not found.passed
    assert not evaluation.passed
    assert tiny_evaluation(journal=Journal(path, {})) == evaluation, "a resumed run fails too"


# -- near-ties ----------------------------------------------------------------------------------


def judged(gap: float) -> Agreement:
    """Judge a flipped choice of a bfloat16 model whose two best choices are `gap` apart."""
    loaded, task = tiny_loaded(), tiny_task(6)
    loaded.model.to(torch.bfloat16)
    journal = Journal(None, {})
    tiny_evaluation(loaded, task, journal=journal, modes=("default",))
    default = {key: r for (_, _, key), r in journal.entries.items()}
    low, high = -1.0 - gap, -1.0
    tie = dataclasses.replace(default["0"], logprobs=(high, low, -9.0, -9.0))
    flipped = dataclasses.replace(default["0"], logprobs=(low, high, -9.0, -9.0))
    found = agreement(task, {**default, "0": tie}, {**default, "0": flipped})
    with torch.inference_mode():
        return judge_near_ties(found, task, default, loaded.model, seed=0)


def test_a_gap_within_the_error_of_sdpa_is_a_near_tie() -> None:
    found = judged(gap=1e-6)
    (difference,) = found.differing
    assert difference.near_tie is True
    assert found.reference == "float32"
    assert found.measured == 6
    assert found.passed


def test_a_gap_beyond_the_error_of_sdpa_is_an_error() -> None:
    found = judged(gap=50.0)
    (difference,) = found.differing
    assert difference.near_tie is False
    assert 0 < found.sdpa_error < 50.0  # type: ignore[operator]
    assert not found.passed


@pytest.mark.parametrize("batch", [1, 8])
def test_every_difference_in_bfloat16_is_a_near_tie(batch: int) -> None:
    """With 40 one-token choices, the best two are often the same number in bfloat16."""
    loaded, draw = tiny_loaded("dense", initializer_range=0.144), random.Random(5)
    loaded.model.to(torch.bfloat16)
    many = [
        Question(str(i), "all", r._replace(continuations=choices_of(40, draw)), (1,) + (0,) * 39)
        for i, r in enumerate(requests(60))
    ]
    evaluation = tiny_evaluation(loaded, Task("tiny", tuple(many)), batch=batch)
    found = evaluation.tasks["tiny"].agreement["paged"]
    assert found.differing
    assert evaluation.passed
    assert all(d.sdpa_error is not None for d in found.differing)


def choices_of(count: int, draw: random.Random) -> list[list[int]]:
    return [[token] for token in draw.sample(range(3, VOCABULARY), count)]


# -- resuming -----------------------------------------------------------------------------------


class Killed(Exception):
    pass


def stop_after(answers: int) -> Any:
    def progress(task: str, done: int, total: int) -> None:
        if done >= answers:
            raise Killed

    return progress


@pytest.mark.parametrize("batch", [1, 4])
def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path, batch: int) -> None:
    whole = Journal(None, {})
    expected = tiny_evaluation(journal=whole, batch=batch)
    path = str(tmp_path / "answers.jsonl")
    with closing(Journal(path, {})) as journal, pytest.raises(Killed):
        tiny_evaluation(journal=journal, batch=batch, progress=stop_after(5))
    kept = Journal(path, {})
    assert 0 < len(kept.entries) < len(whole.entries)
    resumed = tiny_evaluation(journal=kept, batch=batch)
    assert set(kept.entries) == set(whole.entries)
    for (
        place,
        record,
    ) in whole.entries.items():  # other pages change the order of sums, and so the last digits
        again = kept.entries[place]
        assert again.greedy == record.greedy
        assert choice(again.logprobs) == choice(record.logprobs)
        assert again.logprobs == pytest.approx(record.logprobs, abs=1e-4)
    assert accuracies(resumed) == accuracies(expected)


def accuracies(evaluation: Any) -> dict[str, Any]:
    return {mode: m.accuracy for mode, m in evaluation.tasks["tiny"].modes.items()}


def test_a_finished_run_is_repeated_without_a_model(tmp_path: Path) -> None:
    path = str(tmp_path / "answers.jsonl")
    with closing(Journal(path, {})) as journal:
        first = tiny_evaluation(journal=journal)
    loaded = tiny_loaded()
    loaded.model.forward = None  # type: ignore[method-assign]
    assert tiny_evaluation(loaded, journal=Journal(path, {})) == first


def test_a_batch_that_reuses_more_than_a_question_has_is_read_back(tmp_path: Path) -> None:
    """All questions but the first reuse 40 tokens in one call; each of them has 41."""
    shared = requests(1, prefix=40)[0].context[:40]
    asked = [ScoreRequest([*shared, 5 + i], [[6], [7]]) for i in range(6)]
    task = Task("tiny", tuple(Question(str(i), "all", r, (1, 0), 40) for i, r in enumerate(asked)))
    path, loaded = str(tmp_path / "answers.jsonl"), tiny_loaded("dense")
    with closing(Journal(path, {})) as journal:
        first = tiny_evaluation(loaded, task, journal=journal, batch=2)
    assert first.tasks["tiny"].modes["paged"].hit_rate > 0.5
    assert tiny_evaluation(loaded, task, journal=Journal(path, {}), batch=2) == first


def test_an_interrupt_keeps_finished_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "answers.jsonl")
    append = Journal.append

    def interrupted(self: Journal, records: Any) -> None:
        if len(self.entries) >= 6:
            raise KeyboardInterrupt
        append(self, records)

    monkeypatch.setattr(Journal, "append", interrupted)
    with closing(Journal(path, {})) as journal, pytest.raises(KeyboardInterrupt):
        tiny_evaluation(journal=journal)
    assert len(Journal(path, {}).entries) == 6


def test_the_identity_of_a_run_covers_its_questions() -> None:
    loaded, task = tiny_loaded(), tiny_task()
    same = run.identity(loaded, [task], ("default",), SMALL_PAGES, 1)
    assert same == run.identity(loaded, [tiny_task()], ("default",), SMALL_PAGES, 1)
    assert same != run.identity(loaded, [tiny_task(seed=9)], ("default",), SMALL_PAGES, 1)


def identity(loaded: Any) -> dict[str, Any]:
    return run.identity(loaded, [tiny_task()], ("default",), SMALL_PAGES, 1)


def test_a_journal_of_other_weights_is_refused(tmp_path: Path) -> None:
    path, loaded = str(tmp_path / "answers.jsonl"), tiny_loaded()
    Journal(path, identity(loaded)).close()
    with torch.no_grad():  # the last bit of one number
        weight = next(p for p in loaded.model.parameters() if p.dtype == torch.float32)
        weight.view(-1).view(torch.int32)[-1] ^= 1
    with pytest.raises(DataError, match="another run: weights was"):
        Journal(path, identity(loaded))


def test_weights_that_changed_places_have_another_digest() -> None:
    tensor = torch.randn(3, 5)
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    assert tensor_digest(tensor) != tensor_digest(tensor.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float8_e4m3fn])
def test_tensors_of_every_width_have_a_digest(dtype: torch.dtype) -> None:
    for tensor in (torch.ones(3, 4).to(dtype).T, torch.ones(()).to(dtype), torch.ones(0).to(dtype)):
        assert tensor_digest(tensor)[0] == str(dtype)


def test_a_journal_of_another_config_or_tokenizer_is_refused(tmp_path: Path) -> None:
    path, loaded = str(tmp_path / "answers.jsonl"), tiny_loaded()
    Journal(path, identity(loaded)).close()
    with pytest.raises(DataError, match="another run: tokenizer was none, now"):
        Journal(
            path, identity(dataclasses.replace(loaded, tokenizer=load_tokenizer(str(TINY_RECALL))))
        )
    loaded.model.config.logits_scaling *= 2
    with pytest.raises(DataError, match="another run: config was"):
        Journal(path, identity(loaded))


def test_a_journal_without_digests_is_refused(tmp_path: Path) -> None:
    path, loaded = str(tmp_path / "answers.jsonl"), tiny_loaded()
    old = {name: value for name, value in identity(loaded).items() if name != "weights"}
    Journal(path, old).close()
    with pytest.raises(DataError, match="weights was not recorded, now"):
        Journal(path, identity(loaded))


def test_a_journal_of_other_questions_is_refused(tmp_path: Path) -> None:
    path, loaded = str(tmp_path / "answers.jsonl"), tiny_loaded()
    Journal(path, run.identity(loaded, [tiny_task()], ("default",), SMALL_PAGES, 1)).close()
    with pytest.raises(DataError, match="another run: questions was"):
        Journal(path, run.identity(loaded, [tiny_task(5)], ("default",), SMALL_PAGES, 1))


@pytest.mark.parametrize("finished", [0, 5])
def test_progress_counts_every_answer_once(finished: int) -> None:
    journal, seen = Journal(None, {}), []
    if finished:
        with pytest.raises(Killed):
            tiny_evaluation(journal=journal, progress=stop_after(finished))
    tiny_evaluation(journal=journal, progress=lambda *call: seen.append(call))
    assert [total for _, _, total in seen] == [2 * 6] * len(seen)
    assert seen[-1] == ("tiny", 2 * 6, 2 * 6)


# -- memory -------------------------------------------------------------------------------------


def test_the_peak_of_a_mode_excludes_memory_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 1000, "peak": 0, "graphs": 0}  # weights

    def use(kept: int, passing: int, graphs: int = 0) -> None:
        held["graphs"] += graphs
        held["now"] += kept
        held["peak"] = max(held["peak"], held["now"] + passing)

    for name, value in {
        "reset_peak_memory_stats": lambda device: held.update(peak=held["now"]),
        "memory_allocated": lambda device: held["now"],
        "max_memory_allocated": lambda device: held["peak"],
        "memory_reserved": lambda device: held["now"] + held["graphs"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(peak_memory, "graph_bytes", lambda device: held["graphs"])
    memory = PeakMemory(torch.device("cuda"))
    with memory.of("paged"):
        use(kept=300, passing=20, graphs=40)
    assert memory.peak("paged") == 1360
    with memory.of("default"):
        use(kept=0, passing=50)
    assert memory.peak("default") == 1050
    with memory.of("paged"):
        use(kept=7, passing=0)
    assert memory.peak("paged") == 1347


# -- refused questions --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_contexts_longer_than_the_pool_are_counted_as_refused(batch: int) -> None:
    long = ScoreRequest(list(range(3, 93)), [[5], [6], [7], [8]])
    task = tiny_task(3)
    task = Task("tiny", (*task.questions, Question("long", "long", long, (1, 0, 0, 0))))
    config = PagedConfig(page_size=8, max_tokens=88)
    evaluation = tiny_evaluation(None, task, config=config, batch=batch)
    result = evaluation.tasks["tiny"]
    assert result.modes["paged"].refused == 1
    assert result.modes["paged"].questions == 3
    assert result.modes["default"].refused == 0
    assert result.agreement["paged"].questions == 3
    assert evaluation.passed, "a question that does not fit the pool is no failure"


def test_a_run_without_answers_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"every question was refused; the first: .* out of"):
        tiny_evaluation(config=PagedConfig(page_size=8, max_tokens=8))


def test_a_batch_beyond_the_devices_memory_runs_question_by_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = tiny_evaluation(modes=("default",), batch=1).tasks["tiny"].modes["default"]
    score, sizes = DefaultScorer.score, list[int]()

    def refuse(self: DefaultScorer, asked: Sequence[ScoreRequest]) -> Iterator[Answer]:
        sizes.append(len(asked))
        if len(asked) > 1:
            raise MEMORY_ERRORS["cublas"]
        return score(self, asked)

    monkeypatch.setattr(DefaultScorer, "score", refuse)
    found = tiny_evaluation(modes=("default",), batch=12).tasks["tiny"].modes["default"]
    assert sizes[:4] == [3, 1, 1, 1]
    assert (found.questions, found.accuracy) == (expected.questions, expected.accuracy)


def test_a_non_finite_log_likelihood_is_refused() -> None:
    loaded = tiny_loaded()
    torch.nn.init.constant_(loaded.model.lm_head.weight, math.nan)
    with pytest.raises(RequestError, match="not a finite number"):
        tiny_evaluation(loaded, modes=("default",))


# -- what a scorer needs ----------------------------------------------------------------------


def test_needs_are_the_maximum_over_requests() -> None:
    letters = ScoreRequest([1] * 150, [[1], [2]])
    assert Needs.of([letters], shared=30) == Needs(longest=151, shared=30, forks=False)
    alone = ScoreRequest([1] * 200, [[1, 2]])
    assert Needs.of([letters, alone]) == Needs(longest=202, shared=0, forks=False)
    forked = ScoreRequest([1] * 200, [[1, 2], [1, 3]])
    assert Needs.of([letters, forked]) == Needs(longest=202, shared=0, forks=True)
    both = Needs(9, shared=4).combined(Needs(5, shared=7, forks=True))
    assert both == Needs(9, shared=7, forks=True)


def test_one_batch_per_size_runs_before_timing() -> None:
    def part(*sizes: tuple[int, int, int]) -> list[Question]:
        return [
            Question("", "", ScoreRequest([5] * context, [[6] * answer]), (1,), shared)
            for context, shared, answer in sizes
        ]

    similar = [part((40, 0, 1)), part((60, 0, 1))]
    others = [part((70, 0, 1)), part((60, 32, 1)), part((58, 0, 3)), part((40, 0, 1), (400, 0, 1))]
    assert run._one_of_each_size([*similar, *others, *similar]) == [similar[0], *others]
