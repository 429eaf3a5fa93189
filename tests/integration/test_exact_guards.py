"""What keeps exact mode exact on the CPU: each guard, taken out, breaks the laws that need it.

::

    law         the bits of a request are the same ...
    company     in a batch of any size, in any row
    chunks      however its prompt is cut
    pages       in pages in any order, in a pool of any size
    cached      whether its beginning was computed or came from the prefix cache
    swapped     after its pages and states were in host memory
    recomputed  after they were computed again
    forked      in a fork
    samples     as one of several samples
    scored      as log-probabilities of decoded tokens or of scored ones
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged.engine import sampling
from granite_paged.engine.engine import Engine
from granite_paged.engine.intake import SAMPLE_STRIDE
from granite_paged.engine.request import SamplingParams
from granite_paged.geometry import PagedConfig
from granite_paged.layers import logprobs, mamba
from granite_paged.runner import exact_model
from granite_paged.runner.exact_model import ExactModel
from granite_paged.runner.model import EagerModel, ModelStep
from granite_paged.runner.runner import Runner, scores_of
from granite_paged.runner.storage import RowSnapshot, Storage
from tests.helpers.driver import Driver
from tests.helpers.tiny_models import VOCABULARY, shortest_model

Patch = pytest.MonkeyPatch
DTYPES = (torch.float32, torch.float64)
CONFIG = PagedConfig(page_size=8, max_tokens=640, max_sequences=8, chunk_tokens=64, exact=True)


def tokens(count: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=draw).tolist()


PROMPT, FED = tokens(45), tokens(24, 1)
"""With a guard taken out, few tokens may by chance round to the same bits, on some processor."""


def small_model(dtype: torch.dtype = torch.float32) -> Any:
    return shortest_model().to(dtype)


# -- laws ---------------------------------------------------------------------------------------


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other), f"{int((one != other).sum())} numbers have other bits"


def trace(driver: Driver, row: int, cuts: Sequence[int] = ()) -> list[Tensor]:
    """Return the logits after a prompt that is cut at `cuts`, and after each token of `FED`."""
    driver.open(row)
    for start, end in zip((0, *cuts), (*cuts, len(PROMPT)), strict=True):
        last = driver.prefill({row: PROMPT[start:end]})
    return [last[0].clone()] + [driver.decode({row: token})[0].clone() for token in FED]


def company(live: Any, config: PagedConfig) -> None:
    expected, driver = trace(Driver(live, config), 1), Driver(live, config)
    rows = {3: tokens(9, 3), 7: PROMPT, 1: tokens(2, 4), 2: tokens(30, 5)}
    for row in rows:
        driver.open(row)
    found = [driver.prefill(rows)[1].clone()]
    found += [driver.decode({3: 5, 7: token, 1: 6, 2: 7})[1].clone() for token in FED]
    assert_equal(found, expected)


def chunks(live: Any, config: PagedConfig) -> None:
    expected = trace(Driver(live, config), 1)
    for cuts in ([16, 32], [1, 8, 23], [44]):
        assert_equal(trace(Driver(live, config), 1, cuts), expected)


def pages(live: Any, config: PagedConfig) -> None:
    expected = trace(Driver(live, config), 1)
    scattered = Driver(live, replace(config, max_tokens=400))
    for row in (2, 3, 4):
        scattered.open(row)
    for _ in range(3):
        for row in (4, 2, 3):
            scattered.prefill({row: tokens(8, row)})
    for row in (3, 4):
        scattered.close(row)
    found = trace(scattered, 1)
    held = scattered.allocator.pages_of(scattered.sequences[1])
    assert list(held) != sorted(held), "the pages must be out of order"
    assert_equal(found, expected)


def forked(live: Any, config: PagedConfig) -> None:
    forks = config.max_sequences - 2
    expected, driver = trace(Driver(live, config), 1)[: 1 + forks], Driver(live, config)
    driver.open(1)
    found = [driver.prefill({1: PROMPT})[0].clone()]
    for place, token in enumerate(FED[:forks]):
        driver.fork(1 + place, 2 + place)
        driver.decode({1 + place: 3})  # the parent takes another token
        found.append(driver.decode({2 + place: token})[0].clone())
    assert_equal(found, expected)


def scored(live: Any, config: PagedConfig) -> None:
    driver = Driver(live, config)
    logits = torch.stack(trace(driver, 1)[:-1])
    targets = torch.tensor(FED)
    expected = [scores_of(one[None], after[None], exact=config.exact).logprobs
                for one, after in zip(logits, targets, strict=True)]  # fmt: skip
    driver.open(2)
    driver.prefill({2: PROMPT[:-1]})
    fed = driver.chunks({2: [PROMPT[-1], *FED[:-1]]})
    assert_equal([driver.runner.score(fed, [FED]).logprobs], [torch.cat(expected)])


def answers(live: Any, config: PagedConfig, asked: Any, params: Any, **options: Any) -> Any:
    """Return tokens and log-probabilities of each sample, and what the engine did."""
    with Engine(live, config=config, **options) as engine:
        outputs = engine.generate(asked, params)
        stats = engine.stats()
    return [(output.tokens, output.logprobs) for output in outputs], stats


PARAMS = SamplingParams(
    max_new_tokens=12, stop_tokens=(), logprobs=2, temperature=0.8, top_p=0.9, seed=3
)
PROMPTS = [[*PROMPT[:33], n] for n in range(3, 7)]


def each_alone(live: Any, config: PagedConfig) -> Any:
    return [answers(live, config, [p], PARAMS, state_bytes=0)[0][0] for p in PROMPTS]


def cached(live: Any, config: PagedConfig) -> None:
    found, stats = answers(live, config, PROMPTS, PARAMS)
    assert stats.prefix_hits
    assert found == each_alone(live, config)


def preempted(live: Any, config: PagedConfig, how: str) -> Any:
    tight = replace(config, max_tokens=15 * config.page_size)
    found, stats = answers(live, tight, PROMPTS, PARAMS, state_bytes=0, preemption=how)
    assert stats.preempted
    assert bool(stats.swapped) == (how == "swap")
    return found


def swapped(live: Any, config: PagedConfig) -> None:
    assert preempted(live, config, "swap") == each_alone(live, config)


def recomputed(live: Any, config: PagedConfig) -> None:
    assert preempted(live, config, "recompute") == each_alone(live, config)


def samples(live: Any, config: PagedConfig) -> None:
    found, _ = answers(live, config, [PROMPT], replace(PARAMS, n=3))
    for index, sample in enumerate(found):
        one = replace(PARAMS, seed=(PARAMS.seed + index * SAMPLE_STRIDE) % 2**63)
        assert [sample] == answers(live, config, [PROMPT], one)[0]


LAWS = (company, chunks, pages, cached, swapped, recomputed, forked, samples, scored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_every_law_holds_in_exact_mode(law: Callable[..., None], dtype: torch.dtype) -> None:
    law(small_model(dtype), CONFIG)


INEXACT = (company, chunks, cached, recomputed, scored)
"""Laws that do not hold without exact mode."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", INEXACT)
def test_a_law_breaks_without_exact_mode(law: Callable[..., None], dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        law(small_model(dtype), replace(CONFIG, exact=False))


# -- guards -------------------------------------------------------------------------------------

FORWARD, LOGITS = ExactModel.forward, ExactModel.logits


def compute_at_once(patch: Patch, *, prompts: bool) -> None:
    """Compute the tokens of prompts, or of decode steps, all at once."""
    patch.setattr(ExactModel, "reads_mask", True)

    def forward(self: ExactModel, fed: Tensor, step: ModelStep) -> Tensor:
        if (fed.shape[1] > 1) != prompts:
            return FORWARD(self, fed, step)
        with Patch.context() as inner:
            inner.setattr(ExactModel, "_attend_pages", EagerModel._attend_pages)
            return EagerModel.forward(self, fed, step)

    patch.setattr(ExactModel, "forward", forward)


def rows_share_products(patch: Patch) -> None:
    """A decode step computes all its rows at once."""
    compute_at_once(patch, prompts=False)


def rows_share_the_last_product(patch: Patch) -> None:
    """The logits of several rows are one product."""
    patch.setattr(ExactModel, "logits", EagerModel.logits)


def tokens_share_products(patch: Patch) -> None:
    """A prompt's chunk is computed at once."""
    compute_at_once(patch, prompts=True)


def prompts_take_the_chunk_scan(patch: Patch) -> None:
    """Mamba layers compute prompts by the formula for chunks, and new tokens by the recurrence."""

    def forward(self: ExactModel, fed: Tensor, step: ModelStep) -> Tensor:
        with Patch.context() as inner:
            if fed.shape[1] > 1:
                inner.setattr(mamba, "recurrent_step", mamba.chunk_scan)
            return FORWARD(self, fed, step)

    patch.setattr(ExactModel, "forward", forward)


def pages_in_physical_order(patch: Patch) -> None:
    """Attention sums over pages in the order in which they lie in the pool."""
    attend = exact_model.attend_one_token
    patch.setattr(
        exact_model,
        "attend_one_token",
        lambda query, keys, values, slots, scale: attend(
            query, keys, values, slots.sort().values, scale
        ),
    )


def attention_over_the_whole_pool(patch: Patch) -> None:
    """Attention runs over every token of the pool, behind a mask."""

    def attend(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, scale: float) -> Tensor:
        mask = torch.zeros(1, 1, 1, keys.shape[2], dtype=torch.bool)
        mask[..., slots] = True
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )

    patch.setattr(exact_model, "attend_one_token", attend)


def states_lose_bits_in_snapshots(patch: Patch) -> None:
    """Saved Mamba states are rounded."""
    save = Runner.save_row

    def rounded(self: Runner, row: int, *, to_host: bool = False) -> RowSnapshot:
        return RowSnapshot(*(part.bfloat16().to(part.dtype) for part in save(self, row)))

    patch.setattr(Runner, "save_row", rounded)


def states_lose_bits_in_forks(patch: Patch) -> None:
    """Mamba states are rounded when a row is forked."""
    fork = Storage.copy_row

    def rounded(self: Storage, source: int, targets: Sequence[int]) -> None:
        fork(self, source, targets)
        for states in self.stacked:
            for target in targets:
                states[:, target - 1] = states[:, target - 1].bfloat16().to(states.dtype)

    patch.setattr(Storage, "copy_row", rounded)


def rows_share_a_log_softmax(patch: Patch) -> None:
    """A library's log-softmax has other bits for several rows, and all rows are passed at once."""
    a_library_whose_log_softmax_depends_on_rows(patch)
    for module in (logprobs, sampling):
        patch.setattr(module, "by_row", lambda function, rows, *, exact: function(rows))


def a_library_whose_log_softmax_depends_on_rows(patch: Patch) -> None:
    whole = logprobs._log_softmax
    patch.setattr(
        logprobs, "_log_softmax", lambda logits: whole(logits) * (1 + 1e-6 * (len(logits) > 1))
    )


def noise_of_the_row(patch: Patch) -> None:
    """Sampling noise depends on the row of the batch."""
    gumbel = sampling.gumbel
    patch.setattr(
        sampling,
        "_sampled",
        lambda scores, draws, *, exact: (
            scores + gumbel(range(len(draws)), [one.place for one in draws], scores)
        ).argmax(-1),
    )


BREAKS: dict[Callable[[Patch], None], tuple[Callable[..., None], ...]] = {
    rows_share_products: (company, samples),
    rows_share_the_last_product: (company, samples, scored),
    tokens_share_products: (chunks, cached, recomputed, scored),
    prompts_take_the_chunk_scan: (recomputed, scored),
    pages_in_physical_order: (pages,),
    attention_over_the_whole_pool: (pages,),
    states_lose_bits_in_snapshots: (cached, swapped),
    states_lose_bits_in_forks: (forked, samples),
    rows_share_a_log_softmax: (samples, scored),
    noise_of_the_row: (samples,),
}
"""Guard that is taken out -> laws that break."""


@pytest.mark.parametrize(
    ("guard", "law"),
    [(guard, law) for guard, laws in BREAKS.items() for law in laws],
    ids=lambda one: one.__name__,
)
def test_a_guard_taken_out_breaks_its_law(
    guard: Callable[[Patch], None], law: Callable[..., None], monkeypatch: Patch
) -> None:
    guard(monkeypatch)
    with pytest.raises(AssertionError):
        law(small_model(), CONFIG)


def test_every_law_has_a_guard() -> None:
    assert {law for laws in BREAKS.values() for law in laws} == set(LAWS)


@pytest.mark.parametrize("law", [samples, scored])
def test_a_log_softmax_that_depends_on_rows_breaks_nothing(
    law: Callable[..., None], monkeypatch: Patch
) -> None:
    a_library_whose_log_softmax_depends_on_rows(monkeypatch)
    law(small_model(), CONFIG)
