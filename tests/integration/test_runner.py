"""A runner gives the tokens and logits of transformers, in any rows and chunks."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from granite_paged import PagedConfig
from granite_paged.errors import InvalidRequest, OutOfMemory, PromptError
from granite_paged.runner.graph import CapturedStep, Inputs
from granite_paged.runner.memory_plan import weight_bytes
from granite_paged.runner.runner import Chunk, Runner, scores_of
from granite_paged.runner.shapes import Shapes
from tests.helpers.driver import Driver
from tests.helpers.tiny_models import FLAVOURS, VOCABULARY, tiny_model
from tests.helpers.tolerance import assert_same_logits

CONFIG = PagedConfig(page_size=16, max_tokens=512, max_sequences=4, chunk_tokens=32)


@pytest.fixture(scope="module", params=list(FLAVOURS))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def driver(model: Any) -> Driver:
    return Driver(model, CONFIG)


def tokens(count: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=draw).tolist()


@torch.inference_mode()
def sdpa(model: Any, ids: list[int]) -> Tensor:
    """Return the logits of every token, [S, V]."""
    return model(torch.tensor([ids])).logits[0]


def sdpa_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(sdpa(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("chunk", [7, 16, 32])
def test_greedy_tokens_equal_those_of_generate(model: Any, driver: Driver, chunk: int) -> None:
    prompt = tokens(45)
    expected = sdpa_greedy(model, prompt, 20)
    driver.open(3)
    assert driver.greedy(3, prompt, 20, chunk) == expected
    driver.check_valid()


def test_chunks_in_one_call_do_not_affect_each_other(model: Any, driver: Driver) -> None:
    prompts = {1: tokens(32, 1), 2: tokens(5, 2), 4: tokens(1, 3)}
    for row in prompts:
        driver.open(row)
    logits = driver.prefill(prompts)
    for place, prompt in enumerate(prompts.values()):
        assert_same_logits(logits[place], sdpa(model, prompt)[-1])
    fed = {4: 7, 1: 9, 2: 11}  # not in the order of the prefill
    logits = driver.decode(fed)
    for place, (row, token) in enumerate(fed.items()):
        assert_same_logits(logits[place], sdpa(model, [*prompts[row], token])[-1])
    assert driver.runner.tokens[list(fed)].tolist() == logits.argmax(1).tolist()
    assert driver.runner.tokens[3] == 0, "an unused row must not be fed"


def test_no_step_has_more_rows_than_the_runner(driver: Driver) -> None:
    assert driver.runner.shapes.rows == driver.runner.rows == CONFIG.max_sequences


def test_unaligned_chunks_are_not_split(driver: Driver) -> None:
    calls: list[bool] = []
    arrange = Shapes.arrange

    def spied(self: Shapes, lengths: list[int], *, cut: bool = True) -> Any:
        calls.append(cut)
        return arrange(self, lengths, cut=cut)

    driver.open(1)
    with mock.patch.object(Shapes, "arrange", spied):
        driver.prefill({1: tokens(driver.runner.alignment)})
        driver.prefill({1: tokens(3)})
        driver.prefill({1: tokens(3)})
    assert calls == [True, True, driver.runner.alignment in (1, 3)]


def test_a_fork_continues_independently(model: Any, driver: Driver) -> None:
    prompt = tokens(21)
    driver.open(1)
    driver.prefill({1: prompt})
    driver.fork(1, 2)
    for one, other in ((5, 6), (7, 8)):
        logits = driver.decode({1: one, 2: other})
    assert_same_logits(logits[0], sdpa(model, [*prompt, 5, 7])[-1])
    assert_same_logits(logits[1], sdpa(model, [*prompt, 6, 8])[-1])
    driver.check_valid()


def test_a_fork_includes_pages_written_since_the_last_step(driver: Driver) -> None:
    driver.open(1)
    driver.chunks({1: tokens(20)})  # pages are assigned, but no step has run
    driver.fork(1, 2)
    driver.check_valid()


def test_a_cleared_row_has_no_pages(driver: Driver) -> None:
    driver.open(1)
    driver.chunks({1: tokens(20)})
    driver.close(1)
    driver.runner.clear_rows([1])
    assert not driver.runner.storage.pages.table.physical[1].any()


def test_a_reused_row_holds_nothing_of_its_last_owner(model: Any, driver: Driver) -> None:
    driver.open(1)
    driver.prefill({1: tokens(30, 5)})
    driver.close(1)
    driver.open(1)
    prompt = tokens(9, 6)
    assert_same_logits(driver.prefill({1: prompt})[0], sdpa(model, prompt)[-1])


def test_a_row_that_is_not_cleared_is_detected(driver: Driver) -> None:
    if not driver.runner.storage.states:
        pytest.skip("a model without Mamba layers keeps nothing in its rows")
    driver.open(1)
    clean = driver.prefill({1: tokens(9, 6)}).clone()
    driver.close(1)
    driver.sequences[1] = driver.allocator.open()  # `open` without `clear_rows`
    assert not torch.allclose(driver.prefill({1: tokens(9, 6)}), clean)


def test_scores_are_log_probabilities_of_the_targets(model: Any, driver: Driver) -> None:
    texts = {1: tokens(20, 1), 2: tokens(31, 2)}
    for row in texts:
        driver.open(row)
    chunks = driver.chunks({row: text[:-1] for row, text in texts.items()})
    scores = driver.runner.score(chunks, [text[1:] for text in texts.values()])
    expected = [sdpa(model, text)[:-1].log_softmax(-1) for text in texts.values()]
    wanted = [torch.tensor(text[1:]) for text in texts.values()]
    chosen = torch.cat(
        [e.gather(1, w[:, None])[:, 0] for e, w in zip(expected, wanted, strict=True)]
    )
    assert_same_logits(scores.logprobs, chosen)
    is_argmax = torch.cat([e.argmax(1) == w for e, w in zip(expected, wanted, strict=True)])
    assert torch.equal(scores.greedy, is_argmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_half_precision_logits_are_float32(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(3, 1000, generator=draw)).to(dtype)
    logits[1, 7], logits[2, 7] = 99, -99
    rows, targets = torch.tensor([1, 1, 0, 2]), torch.tensor([7, 3, 7, 7])
    exact = logits.double().log_softmax(1)[rows, targets]
    found = scores_of(logits, targets, rows)
    assert found.logprobs.dtype == torch.float32
    assert_same_logits(found.logprobs, exact)
    assert found.greedy.tolist() == [True, False, False, False]
    each = scores_of(logits, targets[:3])
    assert_same_logits(each.logprobs, logits.double().log_softmax(1)[range(3), targets[:3]])
    assert each.greedy.tolist() == [False, False, False]


@pytest.mark.parametrize("to_host", [False, True])
def test_a_saved_row_continues_in_another_row(model: Any, driver: Driver, to_host: bool) -> None:
    prompt = tokens(32)
    driver.open(1)
    driver.prefill({1: prompt})
    held = driver.allocator.pages_of(driver.sequences[1])
    state, contents = driver.runner.save_row(1, to_host=to_host), driver.runner.save_pages(held)
    assert state.nbytes == driver.runner.row_bytes
    driver.close(1)
    driver.open(2)
    driver.prefill({2: tokens(32, 9)})  # takes over the pages
    driver.open(3)
    plan = driver.allocator.append({driver.sequences[3]: len(prompt)})
    driver.runner.write_pages(plan, {driver.sequences[3]: 3})
    driver.runner.load_row(3, state)
    driver.runner.load_pages(driver.allocator.pages_of(driver.sequences[3]), contents)
    assert_same_logits(driver.decode({3: 8})[0], sdpa(model, [*prompt, 8])[-1])


def test_nan_is_flagged_and_stays_in_its_row(model: Any, driver: Driver) -> None:
    for row in (1, 2):
        driver.open(row)
    healthy, sick = tokens(20, 1), tokens(20, 2)
    clean = driver.prefill({1: healthy}).clone()
    driver.close(1)
    driver.open(1)
    embedding = model.get_input_embeddings().weight
    token = next(t for t in range(3, VOCABULARY) if t not in healthy)
    before = embedding[token].clone()
    with torch.no_grad():
        embedding[token] = torch.nan
    driver.prefill({2: [token, *sick[1:]]})
    with torch.no_grad():
        embedding[token] = before
    assert driver.runner.nonfinite.tolist() == [0, 0, 1, 0, 0]
    driver.close(2)  # its pages go to the next sequence
    assert_same_logits(driver.prefill({1: healthy}), clean)
    assert all(pool.keys.isfinite().all() for pool in driver.runner.storage.pages.pools.values())


def test_pages_full_of_huge_numbers_reach_no_output(driver: Driver) -> None:
    prompt = tokens(21)
    driver.open(1)
    clean = driver.prefill({1: prompt}).clone()
    driver.close(1)
    for pool in driver.runner.storage.pages.pools.values():
        pool.keys.fill_(1e30)
        pool.values.fill_(-1e30)
    driver.open(1)
    # in other pages, so sums differ in order
    assert_same_logits(driver.prefill({1: prompt}), clean)


@pytest.mark.parametrize(
    ("chunk", "error"),
    [
        (Chunk(1, 0, []), PromptError),
        (Chunk(0, 0, [5]), InvalidRequest),
        (Chunk(5, 0, [5]), InvalidRequest),
        (Chunk(1, 0, [5] * 33), InvalidRequest),
        (Chunk(1, 490, [5] * 30), InvalidRequest),
        (Chunk(1, -1, [5]), InvalidRequest),
    ],
)
def test_an_invalid_chunk_is_refused(driver: Driver, chunk: Chunk, error: type[Exception]) -> None:
    with pytest.raises(error):
        driver.runner.prefill([chunk])


@pytest.mark.parametrize(
    ("rows", "positions"), [([], []), ([0], [0]), ([5], [0]), ([1], [512]), ([1], [-1]), ([1], [])]
)
def test_an_invalid_decode_step_is_refused(
    driver: Driver, rows: list[int], positions: list[int]
) -> None:
    with pytest.raises(InvalidRequest):
        driver.runner.decode(rows, positions)


def test_targets_that_do_not_match_tokens_are_refused(driver: Driver) -> None:
    with pytest.raises(InvalidRequest, match="one target"):
        driver.runner.score([Chunk(1, 0, [5, 6])], [[7]])


def test_a_runner_that_does_not_fit_is_refused(model: Any) -> None:
    with pytest.raises(OutOfMemory, match="lower PagedConfig"):
        Runner.for_model(model, PagedConfig(max_tokens=2**40))


def test_close_releases_pages_and_states(driver: Driver) -> None:
    storage = driver.runner.storage
    pools = [part for pool in storage.pages.pools.values() for part in (pool.keys, pool.values)]
    held = [weakref.ref(tensor) for tensor in (*pools, *storage.stacked)]
    del pools
    driver.runner.close()
    gc.collect()
    assert not any(reference() is not None for reference in held)


def test_a_model_that_changes_loses_no_count_of_late_captures() -> None:
    model = tiny_model()
    runner = Driver(model, CONFIG).runner
    runner._steps.late = 3
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())
    assert runner.notice_changes(idle=True)
    assert runner.late_captures == 3


def test_a_model_that_cannot_be_captured_any_more_has_steps_of_its_input_s_shape() -> None:
    model = tiny_model()
    runner = Driver(model, CONFIG).runner
    runner.fallback = ""  # as where kernels run
    runner.shapes = runner._shapes()
    assert runner.shapes.captured
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())
    assert runner.notice_changes(idle=True)
    assert runner.fallback
    assert not runner.shapes.captured


def test_the_memory_plan_equals_what_is_allocated(driver: Driver, model: Any) -> None:
    runner = driver.runner
    storage = runner.storage
    assert runner.plan.weight_bytes == weight_bytes(model)
    assert runner.plan.row_bytes == sum(state.nbytes for state in storage.states.values())
    pools = sum(pool.nbytes for pool in storage.pages.pools.values())
    assert runner.plan.page_bytes == pools + storage.pages.table.nbytes


def test_the_inputs_of_a_call_are_one_buffer() -> None:
    """So one copy brings rows, positions and tokens to the device."""
    driver = Driver(tiny_model(), CONFIG)
    run, seen = CapturedStep.run, []

    def recorded(step: CapturedStep, inputs: Inputs) -> None:
        seen.append(inputs)
        run(step, inputs)

    driver.open(1)
    with mock.patch.object(CapturedStep, "run", recorded):
        driver.prefill({1: tokens(20)})
        driver.decode({1: 5})
    assert len(seen) == 2
    for flat, *parts in seen:
        used = [part for part in parts if part.size]
        assert all(np.shares_memory(part, flat.numpy()) for part in used)
        assert sum(part.size for part in used) == len(flat)
