"""Limits of a scheduler's steps: options, the sizes that a runner gives, and when to swap."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.engine.limits import (
    LONGEST_STEP,
    PREFILL_TOKENS_PER_SECOND,
    Limits,
    SwapCost,
    check_options,
)
from granite_paged.errors import InvalidArgument
from granite_paged.runner.shapes import Shapes

OPTIONS: dict[str, Any] = {
    "step_tokens": None,
    "longest_step": LONGEST_STEP,
    "queue": 9,
    "state_bytes": 9,
    "swap_bytes": 9,
    "preemption": "auto",
    "warmup": "lazy",
}


def limits_of(
    *,
    mamba: bool = False,
    alignment: int = 64,
    chunk_tokens: int = 2048,
    device: str = "cpu",
    **options: Any,
) -> Limits:
    """Return the limits of an engine on a runner with 8 rows."""
    runner: Any = SimpleNamespace(
        geometry=SimpleNamespace(mamba_layers=(0,) if mamba else (), bytes_per_page=1000),
        alignment=alignment,
        rows=8,
        longest=4096,
        chunk_tokens=chunk_tokens,
        shapes=Shapes(chunk_tokens, 8, captured=True, alignment=64),
        config=SimpleNamespace(page_size=16),
        row_bytes=100,
        device=SimpleNamespace(type=device),
    )
    usual: dict[str, Any] = {name: OPTIONS[name] for name in ("step_tokens", "longest_step")}
    usual |= {"queue": 9, "swap_bytes": 9, "preemption": "auto"}
    return Limits.of(runner, **{**usual, **options})


@pytest.mark.parametrize(
    ("name", "least", "refused"),
    [
        ("step_tokens", 1, 0),
        ("longest_step", 1.0, 0.99),
        ("longest_step", math.inf, math.nan),
        ("queue", 1, 0),
        ("state_bytes", 0, -1),
        ("swap_bytes", 0, -1),
        ("preemption", "swap", "wait"),
        ("warmup", "full", "none"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, least: Any, refused: Any) -> None:
    check_options(**{**OPTIONS, name: least})
    with pytest.raises(InvalidArgument, match=name):
        check_options(**{**OPTIONS, name: refused})


def test_a_step_takes_four_chunks_and_a_token_for_each_row() -> None:
    assert limits_of().step_tokens == 4 * 2048 + 8
    assert limits_of(step_tokens=100).step_tokens == 100


@pytest.mark.parametrize(
    ("mamba", "alignment", "chunk_tokens", "expected"),
    [
        (True, 64, 2048, 64),
        (True, 64, 32, 32),
        (True, 2, 2048, 2),
        (True, 1, 2048, 256),
        (False, 64, 2048, 256),
        (False, 64, 128, 128),
    ],
)
def test_chunks_are_aligned_as_mamba_needs_it_or_to_256_tokens(
    mamba: bool, alignment: int, chunk_tokens: int, expected: int
) -> None:
    limits = limits_of(mamba=mamba, alignment=alignment, chunk_tokens=chunk_tokens)
    assert limits.alignment == expected


def test_prefills_take_as_long_as_streamed_decodes_by_default() -> None:
    limits = limits_of()
    assert limits.prefill_time(4, streamed=True) == limits.shapes.decode_cost(4)
    assert limits_of(longest_step=1.5).prefill_time(4, streamed=True) == pytest.approx(
        limits.shapes.decode_cost(4) / 2
    )
    assert limits.prefill_time(4, streamed=False) == math.inf
    assert limits.prefill_time(0, streamed=True) == math.inf


def test_prefilled_tokens_are_what_decodes_and_time_leave_and_at_least_a_chunk() -> None:
    limits = limits_of(mamba=True, step_tokens=500)
    assert limits.prefill_tokens(30, math.inf) == 470
    assert limits.prefill_tokens(30, 200.5) == 200
    assert limits.prefill_tokens(30, 7.0) == limits.prefill_tokens(500, math.inf) == 64


def test_a_call_may_last_exactly_as_long_as_its_time() -> None:
    limits, lengths = limits_of(), [64, 32]
    cost = limits.shapes.prefill_cost(lengths)
    assert limits.allows(lengths, cost)
    assert not limits.allows(lengths, math.nextafter(cost, 0))
    assert limits.allows(lengths, math.inf)
    assert not limits.allows([4096], math.inf), "longer than a chunk"


# -- swapping -----------------------------------------------------------------------------------

PAGES = 2**15
SWAP = SwapCost("auto", page_size=16, page_bytes=2_499_999, row_bytes=PAGES, on_gpu=True)
"""In 1/10,000 s, 16 tokens are computed, and 5 MB cross the bus: 2.5 MB for both ways."""


def test_pages_are_copied_where_both_ways_take_less_time_than_computing() -> None:
    tokens = 16 * PAGES
    assert not SWAP.pays(tokens), "both take the same time"
    assert replace(SWAP, row_bytes=PAGES - 1).pays(tokens)
    assert not replace(SWAP, row_bytes=PAGES + 1).pays(tokens)
    assert not replace(SWAP, row_bytes=PAGES - 1).pays(tokens - 1), "the last page is copied whole"


def test_only_pages_on_a_gpu_are_copied_unless_the_user_asks() -> None:
    cheap = replace(SWAP, row_bytes=0)
    assert cheap.pays(16 * PAGES)
    assert not replace(cheap, on_gpu=False).pays(16 * PAGES)
    assert replace(SWAP, preemption="swap", on_gpu=False).pays(1)
    assert not replace(cheap, preemption="recompute").pays(16 * PAGES)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cost_of_copies_is_that_of_the_runners_pages_and_rows(device: str) -> None:
    assert limits_of(device=device).swap == SwapCost("auto", 16, 1000, 100, device == "cuda")


def test_the_prefill_rate_is_the_recorded_one() -> None:
    """16 prompts of 512 tokens in 50 ms."""
    assert float(f"{16 * 512 / 0.050:.1e}") == PREFILL_TOKENS_PER_SECOND
