"""Exact mode on a GPU: the bits of a request, whatever else runs; and what keeps them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged import Engine, PagedConfig, SamplingParams
from granite_paged.engine.intake import SAMPLE_STRIDE
from granite_paged.layers.logprobs import log_probabilities
from granite_paged.layers.triton import exact_attention, exact_linear, exact_scan, exact_step, scan
from granite_paged.models import load
from granite_paged.runner import exact_triton_model
from granite_paged.runner.exact_triton_model import ExactTritonModel
from tests.helpers.driver import Driver
from tests.helpers.exact_bits import generated_logits
from tests.helpers.turns import large_turn

Patch = pytest.MonkeyPatch
DTYPES = ("bfloat16", "float16")
CONFIG = PagedConfig(exact=True, max_tokens=12_000, max_sequences=4)
MANY_ROWS = replace(CONFIG, max_tokens=140_000, max_sequences=256)
HALF_AS_MANY = replace(CONFIG, max_tokens=70_000, max_sequences=128)
SIZES = (*range(1, 18), 32, 64, 128, 256)
LONG = 3000
CUTS = {
    "each 256": [256] * 11 + [184],
    "multiples of 256": [1024, 512, 256, 1208],
    "off multiples": [100, 37, 1, 2000, 862],
    "beside chunks": [63, 1, 64, 65, 2048, 759],
    "thirds": [1000] * 3,
}


def tokens(count: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 100_000) for _ in range(count)]


@pytest.fixture(scope="module", params=DTYPES)
def model(request: pytest.FixtureRequest) -> Any:
    return load(random_weights="granite-4.0-h-1b", device="cuda", dtype=request.param).model


def assert_equal(found: Tensor, expected: Tensor, what: object) -> None:
    assert torch.equal(found, expected), f"{what}: {int((found != expected).sum())} other bits"


# -- laws ---------------------------------------------------------------------------------------

PROMPT, FED = tokens(300), tokens(6, 1)


def in_company(driver: Driver, rows: int) -> Tensor:
    """Return the logits of `PROMPT`, and after each token of `FED`, in one of several rows."""
    chance = random.Random(rows)
    places = chance.sample(range(1, driver.runner.rows + 1), rows)
    mine = chance.choice(places)
    prompts = {row: tokens(chance.randint(1, 400), row) for row in places} | {mine: PROMPT}
    for row in places:
        driver.open(row)
    found = []
    for start in range(0, rows, 16):
        part = {row: prompts[row] for row in places[start : start + 16]}
        logits = driver.prefill(part)
        if mine in part:
            found.append(logits[list(part).index(mine)].clone())
    for token in FED:
        fed = {row: token if row == mine else 5 for row in places}
        found.append(driver.decode(fed)[places.index(mine)].clone())
    for row in places:
        driver.close(row)
    return torch.stack(found)


def scored(driver: Driver, text: Sequence[int], cuts: Sequence[int]) -> Tensor:
    """Return the log-probability of each token of a text, the first excepted, read in pieces."""
    driver.open(1)
    found, start = [], 0
    for count in cuts:
        targets = [*text[start + 1 : start + count + 1], 0][:count]
        chunks = driver.chunks({1: text[start : start + count]})
        found.append(driver.runner.score(chunks, [targets]).logprobs)
        start += count
    assert start == len(text)
    driver.close(1)
    return torch.cat(found)[:-1]


def decoded(driver: Driver, text: Sequence[int], first: int) -> Tensor:
    """Return the log-probabilities of the tokens from `first` on, each decoded after the others."""
    driver.open(2)
    logits = [driver.prefill({2: text[:first]})[0].clone()]
    logits += [driver.decode({2: token})[0].clone() for token in text[first:-1]]
    driver.close(2)
    chances = log_probabilities(torch.stack(logits), exact=True)
    return chances.gather(1, torch.tensor(text[first:], device="cuda")[:, None])[:, 0]


def company_law(driver: Driver, sizes: Sequence[int] = SIZES) -> None:
    expected = in_company(driver, 1)
    for rows in sizes:
        assert_equal(in_company(driver, rows), expected, f"{rows} rows")


def chunk_law(driver: Driver, names: Sequence[str] = tuple(CUTS)) -> None:
    text = tokens(LONG, 2)
    expected = scored(driver, text, [2048, 952])
    for name in names:
        assert_equal(scored(driver, text, CUTS[name]), expected, name)


def score_law(driver: Driver) -> None:
    text = tokens(420, 3)
    assert_equal(decoded(driver, text, 250), scored(driver, text, [420])[249:], "decoded")


def assert_holds(law: Callable[[Driver], None], model: Any, config: PagedConfig) -> None:
    driver = Driver(model, config)
    law(driver)
    assert isinstance(driver.runner._steps.model, ExactTritonModel)
    driver.runner.close()


def test_a_request_has_the_same_bits_in_any_company(model: Any) -> None:
    with large_turn():
        assert_holds(company_law, model, MANY_ROWS)


@pytest.mark.parametrize("law", [chunk_law, score_law])
def test_a_token_has_the_same_bits_in_any_chunk(law: Callable[..., None], model: Any) -> None:
    assert_holds(law, model, CONFIG)


PARAMS = SamplingParams(
    max_new_tokens=90, stop_tokens=(), logprobs=2, temperature=0.8, top_p=0.9, seed=3
)
PROMPTS = [[*tokens(700, 4), n] for n in range(3, 9)]


def answers(model: Any, asked: Any, params: Any = PARAMS, **options: Any) -> tuple[Any, Any]:
    config = replace(CONFIG, max_tokens=options.pop("tokens", 20_000), max_sequences=16)
    with Engine(model, config=config, warmup="lazy", **options) as engine:
        outputs = engine.generate(asked, params)
        return [(output.tokens, output.logprobs) for output in outputs], engine.stats()


def test_every_law_of_the_engine_holds(model: Any) -> None:
    alone = [answers(model, [prompt], state_bytes=0)[0][0] for prompt in PROMPTS]

    cached, stats = answers(model, PROMPTS)
    assert stats.prefix_hits
    assert cached == alone
    for how in ("swap", "recompute"):
        found, stats = answers(model, PROMPTS, tokens=2_560, state_bytes=0, preemption=how)
        assert stats.preempted
        assert bool(stats.swapped) == (how == "swap")
        assert found == alone, how
    found, _ = answers(model, PROMPTS[:1], replace(PARAMS, n=3))
    for index, sample in enumerate(found):
        one = replace(PARAMS, seed=(PARAMS.seed + index * SAMPLE_STRIDE) % 2**63)
        assert [sample] == answers(model, PROMPTS[:1], one)[0]


@torch.inference_mode()
def test_generate_under_paged_gives_a_row_the_bits_that_it_has_alone(model: Any) -> None:
    prompts = [tokens(300), tokens(37, 1), tokens(1, 2)]

    def logits(which: Sequence[int]) -> Tensor:
        """Return the logits of each new token, [rows, 5, V]."""
        width = max(len(prompts[at]) for at in which)
        ids = [[0] * (width - len(prompts[at])) + prompts[at] for at in which]
        mask = [[0] * (width - len(prompts[at])) + [1] * len(prompts[at]) for at in which]
        ids, mask = (torch.tensor(each, device="cuda") for each in (ids, mask))
        return generated_logits(model, ids, mask, PagedConfig(exact=True, max_tokens=4096), 5)

    together = logits([0, 1, 2])
    for row in range(3):
        assert_equal(together[row], logits([row])[0], f"row {row}")


def test_weights_that_are_written_count_from_the_next_request_on() -> None:
    model = load(random_weights="granite-4.0-h-350m", device="cuda", dtype="bfloat16").model
    config = replace(CONFIG, max_tokens=4_000)
    with Engine(model, config=config, warmup="lazy") as engine:
        before = engine.generate(PROMPTS[:1], PARAMS)
        with torch.no_grad():
            for layer in model.model.layers:
                if layer.mamba is not None:
                    layer.mamba.A_log.add_(0.5)
        after = engine.generate(PROMPTS[:1], PARAMS)
    with Engine(model, config=config, warmup="lazy") as fresh:
        expected = fresh.generate(PROMPTS[:1], PARAMS)
    assert after[0].logprobs == expected[0].logprobs
    assert after[0].logprobs != before[0].logprobs


# -- guards -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bfloat16() -> Any:
    return load(random_weights="granite-4.0-h-350m", device="cuda", dtype="bfloat16").model


def few_rows(driver: Driver) -> None:
    company_law(driver, (2, 17, 128))


def some_chunks(driver: Driver) -> None:
    chunk_law(driver, ("off multiples", "beside chunks"))


def few_rows_split_the_depth(patch: Patch) -> None:
    """Products of few rows are sums of two halves, as a library computes them for one row."""
    product = exact_linear.product

    def split(x: Tensor, weight: Tensor) -> Tensor:
        if len(x) > 4:
            return product(x, weight)
        middle = x.shape[1] // 2
        halves = (slice(0, middle), slice(middle, None))
        parts = [x[:, half].float() @ weight[:, half].float().T for half in halves]
        return (parts[0] + parts[1]).to(x.dtype)

    patch.setattr(exact_triton_model, "product", split)


def keys_in_blocks_by_length(patch: Patch) -> None:
    """A prompt's attention sums over blocks of 64 keys, that of a new token over blocks of 32."""
    attend = exact_attention.attend

    def by_length(query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor,
                  *rest: Any, **options: Any) -> Tensor:  # fmt: skip
        with Patch.context() as inner:
            inner.setattr(exact_attention, "KEYS", 32 if positions.shape[1] == 1 else 64)
            return attend(query, keys, values, rows, positions, *rest, **options)

    patch.setattr(exact_attention, "attend", by_length)


def states_at_the_end_of_a_step(patch: Patch) -> None:
    """A prompt's Mamba state is stored after its last token, not at the sequence's own chunks."""
    patch.setattr(exact_scan, "scan", scan.scan)


def states_close_one_token_late(patch: Patch) -> None:
    """A decode step stores the state after the first token of the next chunk."""
    close = exact_step.close_chunks
    patch.setattr(
        exact_step,
        "close_chunks",
        lambda sizes, positions, *rest: close(sizes, positions - 1, *rest),
    )


BREAKS: dict[Callable[[Patch], None], tuple[Callable[[Driver], None], ...]] = {
    few_rows_split_the_depth: (few_rows, score_law),
    keys_in_blocks_by_length: (score_law,),
    states_at_the_end_of_a_step: (some_chunks, score_law),
    states_close_one_token_late: (score_law,),
}
PAIRS = [(guard, law) for guard, laws in BREAKS.items() for law in laws]


@pytest.mark.parametrize(("guard", "law"), PAIRS)
def test_a_guard_taken_out_breaks_its_law(
    guard: Callable[[Patch], None],
    law: Callable[[Driver], None],
    bfloat16: Any,
    monkeypatch: Patch,
) -> None:
    guard(monkeypatch)
    with pytest.raises(AssertionError, match="other bits"):
        law(Driver(bfloat16, HALF_AS_MANY))


@pytest.mark.parametrize("law", [few_rows, some_chunks, score_law])
def test_the_laws_hold_for_another_model_and_not_without_exact_mode(
    law: Callable[[Driver], None], bfloat16: Any
) -> None:
    law(Driver(bfloat16, HALF_AS_MANY))
    with pytest.raises(AssertionError, match="other bits"):
        law(Driver(bfloat16, replace(HALF_AS_MANY, exact=False)))
