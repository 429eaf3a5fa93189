"""Numbers that the engine must reach on a data-centre GPU.

Times are compared within one run. Nothing else may use the device at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from granite_paged import Engine, PagedConfig, SamplingParams
from granite_paged.bench.serving import serve, summary
from granite_paged.bench.workload import Workload, arrivals
from granite_paged.errors import OutOfMemory
from granite_paged.geometry import CacheGeometry
from granite_paged.runner.memory_plan import RunnerSizes, plan_memory
from granite_paged.runner.runner import Runner

PREFIX, CONTINUATIONS, SCORED = 4096, 64, 32
"""Tokens of a prefix, number of its continuations, and tokens per continuation."""

SEQUENCES, TOKENS = 1000, 1024
"""Number of sequences held at once, and their final length in tokens."""

NEEDED_GB = 100
"""Device memory for that number of sequences and their states."""

pytestmark = pytest.mark.whole_gpu


def text(count: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, 100_000, (count,), generator=draw).tolist()


def seconds_to_score(engine: Engine, items: Sequence[tuple[list[int], list[list[int]]]]) -> float:
    began = time.perf_counter()
    engine.score(items)
    return time.perf_counter() - began


def test_a_shared_prefix_scores_20_times_faster(
    model: Any,
) -> None:
    together = [text(SCORED, seed) for seed in range(CONTINUATIONS)]
    rows = CONTINUATIONS + 2
    sizes = PagedConfig(max_sequences=rows, max_tokens=rows * (PREFIX + 128))
    found = {}
    for shared, state_bytes in ((True, 2**30), (False, 0)):
        with Engine(model, sizes, state_bytes=state_bytes, warmup="lazy") as engine:
            times = []
            for seed in (1, 2, 3):  # the first run compiles; each prefix is new to the engine
                prefix = text(PREFIX, 100 + seed)
                apart = [(prefix, [one]) for one in together]
                times.append(seconds_to_score(engine, [(prefix, together)] if shared else apart))
        found[shared] = min(times)
    print(f"shared {1e3 * found[True]:.1f} ms, each alone {1e3 * found[False]:.1f} ms")
    assert found[False] >= 20 * found[True]


def test_a_thousand_sequences_run_at_once(model: Any) -> None:
    if torch.cuda.get_device_properties(0).total_memory < NEEDED_GB * 1e9:
        pytest.skip(f"a thousand sequences need a GPU of {NEEDED_GB} GB")
    sizes = PagedConfig(max_sequences=SEQUENCES, max_tokens=SEQUENCES * TOKENS)
    half = TOKENS // 2
    most, began = 0, time.perf_counter()
    with Engine(model, sizes, warmup="lazy") as engine:
        params = SamplingParams(max_new_tokens=half, stop_tokens=())
        requests = [engine.submit(text(half, seed), params) for seed in range(SEQUENCES)]
        while engine.step():
            most = max(most, engine.stats().running)
        stats = engine.stats()
    seconds = time.perf_counter() - began
    print(f"{most} at once; {stats.tokens / seconds:,.0f} tokens/s, compiling included; {stats}")
    assert most == SEQUENCES
    assert all(len(request.outputs[0].tokens) == half for request in requests)
    assert stats.preempted == 0


def test_the_plan_predicts_capacity_within_five_per_cent(model: Any) -> None:
    geometry = CacheGeometry.from_config(model.config, page_size=128, dtype=model.dtype)
    promised = 300

    def sizes(sequences: int) -> PagedConfig:
        return PagedConfig(max_sequences=sequences, max_tokens=sequences * TOKENS)

    pages = 1 + promised * geometry.pages_for(TOKENS)
    plan = plan_memory(model, sizes(promised), geometry, RunnerSizes(promised, pages, TOKENS))
    torch.cuda.empty_cache()
    _, whole = torch.cuda.mem_get_info()
    fewer, more = int(0.95 * promised), int(1.05 * promised)
    try:
        torch.cuda.set_per_process_memory_fraction(plan.total_bytes / whole)
        with Engine(model, sizes(fewer), state_bytes=0, warmup="lazy") as engine:
            params = SamplingParams(max_new_tokens=2, stop_tokens=())
            prompts = [text(TOKENS - 2, seed) for seed in range(fewer)]
            outputs = engine.generate(prompts, params)
        assert [output.error for output in outputs] == [None] * fewer
        with pytest.raises(OutOfMemory):
            Runner.for_model(model, sizes(more)).warm_up()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_long_prompts_do_not_stall_decoding(model: Any) -> None:
    """While prompts of 8,192 tokens arrive, the time between tokens at most triples."""
    workload = Workload(
        requests=256,
        rate=30,
        prompt_tokens=(32, 512),
        new_tokens=(256, 512),
        long_every=16,
        long_tokens=8192,
    )
    coming = arrivals(workload, model.config.vocab_size, seed=0)
    tokens = 16 * (8192 + 512) + 240 * 1024
    sizes = PagedConfig(max_sequences=128, max_tokens=tokens)
    with Engine(model, sizes, queue=len(coming)) as engine:
        found = summary(serve(engine, coming))
    print(found)
    median, slowest = found.between_tokens_ms
    assert slowest <= 3 * median
