"""A group of engines answers like one engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from granite_paged import Engine, PagedConfig, SamplingParams
from granite_paged.engine.group import EngineGroup
from granite_paged.errors import DeviceError, InvalidArgument
from tests.helpers.tiny_models import tiny_model

SIZES = PagedConfig(page_size=8, max_tokens=160, max_sequences=4, chunk_tokens=32)
PROMPTS = [[3 + n, 5, 7 + n, *range(10, 10 + n)] for n in range(9)]


@pytest.fixture
def group() -> Iterator[EngineGroup]:
    with EngineGroup([Engine(tiny_model(), SIZES) for _ in range(2)]) as made:
        yield made


@pytest.fixture
def one() -> Iterator[Engine]:
    with Engine(tiny_model(), SIZES) as made:
        yield made


def test_a_group_uses_all_engines_and_keeps_order(group: EngineGroup, one: Engine) -> None:
    params = SamplingParams(max_new_tokens=6, n=2, temperature=0.7, stop_tokens=())
    together = [output.tokens for output in group.generate(PROMPTS, params)]
    assert together == [output.tokens for output in one.generate(PROMPTS, params)]
    assert all(stats.tokens > 30 for stats in group.stats())


def test_a_group_scores_in_order(group: EngineGroup, one: Engine) -> None:
    items = [(prompt, [[4], [5, 6]]) for prompt in PROMPTS]
    for scores, expected in zip(group.score(items), one.score(items), strict=True):
        assert [score.logprob for score in scores] == pytest.approx(
            [score.logprob for score in expected], abs=1e-4
        )


def test_a_request_goes_to_the_least_loaded_engine(group: EngineGroup) -> None:
    asked = [group.submit(prompt, SamplingParams(max_new_tokens=2)) for prompt in PROMPTS[:4]]
    assert [stats.waiting for stats in group.stats()] == [2, 2]
    while group.step():
        pass
    assert all(request.finished for request in asked)


def test_replicas_run_on_the_given_devices() -> None:
    model = tiny_model()
    with EngineGroup.replicas(model, ["cpu"], SIZES) as group:
        (output,) = group.generate(PROMPTS[0], SamplingParams(max_new_tokens=2))
        assert output.error is None
    with pytest.raises(DeviceError, match="cuda:99"):
        EngineGroup.replicas(model, ["cuda:99"], SIZES)


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one"):
        EngineGroup([])
