"""Scorers give equal log-likelihoods, however requests share, fork, batch or compile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from granite_paged import PagedConfig, is_patched
from granite_paged.errors import OutOfPages, PromptError
from granite_paged.evaluate import batch_size, scorer_engine
from granite_paged.evaluate.encoding import shared_prefix
from granite_paged.evaluate.modes import make_scorer
from granite_paged.evaluate.scorer import (
    Answer,
    Needs,
    Scorer,
    ScoreRequest,
    Tally,
    TokenRead,
    choice,
    distinct_sequences,
    uncached_tokens,
)
from granite_paged.evaluate.scorer_default import DefaultScorer
from granite_paged.evaluate.scorer_engine import EngineScorer
from granite_paged.evaluate.scorer_static import StaticScorer
from granite_paged.runner.memory_plan import row_bytes
from granite_paged.runner.shapes import Shapes
from tests.helpers.evaluation import SMALL_PAGES, largest_difference, requests, tiny_loaded

CLOSE = 1e-4  # absolute tolerance of a log-likelihood, as for parity with lm-eval
FLAVOURS = ["hybrid", "rotary", "experts", "dense"]


def from_the_formula(model: Any, request: ScoreRequest) -> list[float]:
    """Score each continuation in its own forward pass, with log-probabilities in float64."""
    found = []
    for continuation in request.continuations:
        ids = torch.tensor([[*request.context, *continuation]])
        with torch.inference_mode():
            logprobs = model(ids, use_cache=False).logits.double().log_softmax(dim=-1)[0]
        start = len(request.context) - 1
        found.append(sum(logprobs[start + i, t].item() for i, t in enumerate(continuation)))
    return found


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_default_scores_equal_the_formula(flavour: str) -> None:
    model = tiny_loaded(flavour).model
    for request, answer in zip(requests(3), DefaultScorer(model).score(requests(3)), strict=True):
        expected = from_the_formula(model, request)
        assert list(answer.logprobs) == pytest.approx(expected, abs=CLOSE)


def test_default_scores_are_independent_of_batching() -> None:
    model = tiny_loaded().model
    assert largest_difference(
        DefaultScorer(model, 5).score(requests()), DefaultScorer(model).score(requests())
    ) < CLOSE  # fmt: skip


def paged(model: Any, asked: Sequence[ScoreRequest], batch: int = 1) -> EngineScorer:
    """Return the scorer of mode `paged`, sized for these requests."""
    shared = shared_prefix([request.context for request in asked])
    scorer = make_scorer("paged", model, SMALL_PAGES, Needs.of(asked, shared), batch)
    assert isinstance(scorer, EngineScorer)
    return scorer


def one_by_one(scorer: Scorer, asked: Sequence[ScoreRequest]) -> list[Answer]:
    return [scorer.score([request])[0] for request in asked]


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_paged_scores_equal_those_of_default(flavour: str, batch: int) -> None:
    model = tiny_loaded(flavour).model
    default = DefaultScorer(model).score(requests())
    scorer = paged(model, requests(), batch)
    found = one_by_one(scorer, requests()) if batch == 1 else scorer.score(requests())
    assert largest_difference(found, default) < CLOSE
    assert [choice(list(a.logprobs)) for a in found] == [choice(list(a.logprobs)) for a in default]
    assert [list(a.greedy) for a in found] == [list(a.greedy) for a in default]
    scorer.close()


def test_a_shared_prefix_is_computed_once() -> None:
    asked = requests(prefix=40)
    scorer = paged(tiny_loaded(mamba_chunk_size=16).model, asked)
    first, second, *others = one_by_one(scorer, asked)
    assert first.reused == second.reused == 0, "the second shows where the first parts from others"
    assert {answer.reused for answer in others} == {32}


@pytest.mark.parametrize("batch", [1, 7])
def test_what_was_computed_and_reused_adds_up(batch: int) -> None:
    asked = requests()
    scorer = paged(tiny_loaded().model, asked, batch)
    found = one_by_one(scorer, asked) if batch == 1 else scorer.score(asked)
    forks = [{tuple(tokens[:-1]) for tokens in request.continuations} for request in asked]
    whole = [len(r.context) + sum(map(len, f)) for r, f in zip(asked, forks, strict=True)]
    computed, reused = (sum(getattr(a, name) for a in found) for name in ("computed", "reused"))
    assert computed + reused == sum(whole)
    assert reused > 0
    assert computed < sum(map(uncached_tokens, asked))
    for request, answer in zip(asked, found, strict=True):
        assert 0 <= answer.reused <= len(request.context)
        assert answer.computed >= 0


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = tiny_loaded().model
    config, before = model.config, [parameter.data_ptr() for parameter in model.parameters()]
    with contextlib.closing(paged(model, requests(2))) as scorer:
        scorer.score(requests(2))
    assert not is_patched(model)
    assert model.config is config
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_a_full_pool_evicts_prefixes_before_it_refuses() -> None:
    first, second = requests(1, seed=3)[0], requests(1, seed=4)[0]
    longest = max(request.longest for request in (first, second))
    small = PagedConfig(page_size=8, max_tokens=longest + 48)
    scorer = make_scorer("paged", tiny_loaded().model, small, Needs.of([first, second]))
    alone = paged(tiny_loaded().model, [second]).score([second])
    assert largest_difference(one_by_one(scorer, [first, second])[1:], alone) < CLOSE


def test_a_context_longer_than_the_pool_is_refused() -> None:
    long = ScoreRequest(list(range(3, 93)), [[5], [6]])
    small = PagedConfig(page_size=8, max_tokens=64)
    scorer = make_scorer("paged", tiny_loaded().model, small, Needs.of([long]))
    with pytest.raises(OutOfPages):
        scorer.score([long])
    (answer,) = scorer.score([ScoreRequest([5, 6, 7], [[5], [6]])])
    assert len(answer.logprobs) == 2


@pytest.mark.parametrize("mode", ["default", "paged"])
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (ScoreRequest([], [[5]]), "request 0 has an empty context"),
        (ScoreRequest([5], []), "request 0 has an empty continuation"),
        (ScoreRequest([5], [[6], []]), "request 0 has an empty continuation"),
    ],
    ids=["context", "no continuation", "empty continuation"],
)
def test_an_empty_request_is_refused(mode: str, request_: ScoreRequest, reason: str) -> None:
    scorer = make_scorer(mode, tiny_loaded().model, SMALL_PAGES, Needs(longest=9))
    with pytest.raises(PromptError, match=reason):
        scorer.score([request_])


def test_continuations_that_differ_in_the_last_token_share_a_row() -> None:
    rows = distinct_sequences([ScoreRequest([1, 2], [[3], [4], [5, 6], [5, 7]])])
    assert [row.tokens for row in rows] == [[1, 2], [1, 2, 5]]
    assert [[slot for slot, _ in row.endings] for row in rows] == [[0, 1], [2, 3]]


def test_a_tally_reads_a_token_at_the_position_before_it() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = 5.0  # position 11 decides token 2
    tally = Tally([ScoreRequest([0], [[2], [3]])])
    tally.add(logits, [TokenRead(0, 11, 2, 0), TokenRead(0, 11, 3, 1)], first=10)
    (((right, wrong), greedy),) = tally.sums()
    assert greedy == (True, False)
    assert right - wrong == pytest.approx(5.0)


def test_the_first_of_equal_choices_wins_as_in_lm_eval() -> None:
    assert choice([-3.0, -1.0, -1.0, -2.0]) == 1


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_static_scores_equal_those_of_default(flavour: str) -> None:
    """The step is not compiled here: that is slow and changes only the time."""
    model = tiny_loaded(flavour).model
    model.get_compiled_call = lambda config: model.__call__
    scorer = make_scorer("static", model, SMALL_PAGES, Needs.of(requests()))
    assert isinstance(scorer, StaticScorer)
    expected = DefaultScorer(model).score(requests())
    for _ in range(2):  # the second time, nothing may be left of the first
        assert largest_difference(scorer.score(requests()), expected) < CLOSE
    with pytest.raises(OutOfPages, match="make a longer StaticCache"):
        scorer.score([ScoreRequest([5] * 99, [[6]])])


# -- batch size ---------------------------------------------------------------------------------


def fastest(monkeypatch: pytest.MonkeyPatch, times: dict[int, float]) -> int:
    """Return the batch size found, given times of passes; sizes without a time do not fit."""

    def seconds(model: Any, asked: Any, batch: int) -> float:
        if batch not in times:
            raise torch.OutOfMemoryError
        return times[batch]

    monkeypatch.setattr(batch_size, "_seconds", seconds)
    return batch_size.best_batch(None, requests())


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({1: 8.0, 2: 5.0, 4: 4.0, 8: 4.5, 16: 9.0, 32: 1.0}, 4),  # 16 ends the search
        ({1: 8.0, 2: 5.0}, 2),  # 4 does not fit
        ({2**i: 1 / 2**i for i in range(20)}, batch_size.LARGEST),
        ({}, 1),
    ],
)
def test_the_fastest_batch_that_fits_is_found(
    times: dict[int, float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fastest(monkeypatch, times) == best


# -- modes --------------------------------------------------------------------------------------


class EngineDouble:
    """A stand-in for `Engine` that answers as `Engine.score` is documented to."""

    def __init__(
        self, model: Any, config: PagedConfig, *, state_bytes: int = 0, warmup: str = "full"
    ) -> None:
        assert warmup == "lazy", "the scorer asks for the steps that it needs"
        self.config, self.state_bytes = config, state_bytes
        self.asked: list[Any] = []
        self.warmed: list[tuple[int, int]] = []
        self.shapes = Shapes(2048, config.max_sequences or 0, captured=True)
        self.runner = SimpleNamespace(shapes=self.shapes, warm_up=self.warm_up)

    def warm_up(self, wanted: Callable[[int, int], bool]) -> None:
        self.warmed += [shape for shape in self.shapes.all() if wanted(*shape)]

    def stats(self) -> Any:
        return SimpleNamespace(tokens_hit=100 * len(self.asked))

    def close(self) -> None:
        pass

    def forget_prefixes(self) -> None:
        self.asked.append("forget")

    def score(self, pairs: list[Any]) -> list[list[Any]]:
        self.asked += pairs
        return [
            [SimpleNamespace(logprob=-float(len(tokens)), greedy=False) for tokens in continuations]
            for _, continuations in pairs
        ]


@pytest.fixture
def with_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_engine, "Engine", EngineDouble)


@pytest.mark.usefixtures("with_double")
def test_the_engine_is_sized_for_its_requests() -> None:
    model, needs = tiny_loaded().model, Needs(longest=600, shared=SMALL_PAGES.page_size, forks=True)
    scorer: Any = make_scorer("paged", model, SMALL_PAGES, needs)
    (answer,) = scorer.score([ScoreRequest([1, 2], [[3], [4, 5]])])
    assert (answer.logprobs, answer.greedy) == ((-1.0, -2.0), (False, False))
    assert scorer.engine.asked == [([1, 2], [[3], [4, 5]])]
    scorer.forget()
    assert scorer.engine.asked[1:] == ["forget"]
    assert scorer.engine.config.max_tokens >= needs.longest
    assert scorer.engine.config.max_sequences == 2, "one row for the context and one for its fork"
    assert scorer.engine.state_bytes == 2 * row_bytes(model, PagedConfig())
    alone = [(1, 32), (1, 64), (1, 128), (1, 256), (1, 512), (1, 1024)]
    assert set(scorer.engine.warmed) == {*alone, (2, 32), (2, 64), (2, 128)}
    many: Any = make_scorer("paged", model, SMALL_PAGES, needs, 8)
    assert set(many.engine.warmed) == {shape for shape in many.engine.shapes.all() if shape[1] > 1}


@pytest.mark.usefixtures("with_double")
def test_warm_up_covers_only_pieces_of_the_longest_prompt() -> None:
    """The workspace of a graph that is never replayed would add to peak memory."""
    needs = Needs(longest=1138)
    scorer: Any = make_scorer("paged", tiny_loaded().model, PagedConfig(page_size=128), needs)
    assert scorer.engine.shapes.length(1138) == 2048
    assert set(scorer.engine.warmed) == {(1, 32 << i) for i in range(6)}
    assert max(length for _, length in scorer.engine.warmed) == 1024


@pytest.mark.usefixtures("with_double")
def test_single_questions_without_sharing_take_one_row() -> None:
    """Rows and states that no request uses would add to peak memory."""
    needs = Needs(longest=100, shared=SMALL_PAGES.page_size - 1, forks=False)
    scorer: Any = make_scorer("paged", tiny_loaded().model, SMALL_PAGES, needs)
    assert scorer.engine.config.max_sequences == 1
    assert scorer.engine.state_bytes == 0


def test_a_prefix_stays_cached_with_a_single_row() -> None:
    """It needs pages beyond those of the row, or every question would evict it."""
    shared = [20 + i % 70 for i in range(300)]
    asked = [ScoreRequest([*shared, 10 + i, 5], [[6], [7]]) for i in range(4)]
    scorer = make_scorer("paged", tiny_loaded().model, SMALL_PAGES, Needs.of(asked, shared=300))
    reused = [scorer.score([request])[0].reused for request in asked]
    scorer.close()
    assert reused[:2] == [0, 0], "only the second shows where a state is worth keeping"
    assert min(reused[2:]) >= 256


def test_reused_tokens_are_counted_once() -> None:
    double: Any = EngineDouble(None, SMALL_PAGES, warmup="lazy")
    scorer = EngineScorer(double)
    asked = [ScoreRequest(list(range(150)), [[3], [4, 5]])] * 3
    answers = scorer.score(asked)
    assert [answer.reused for answer in answers] == [150, 150, 0]
    assert [answer.computed for answer in answers] == [1, 1, 151]
