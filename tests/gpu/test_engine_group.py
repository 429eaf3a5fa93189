"""Engines on several GPUs that run concurrently in threads of one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from granite_paged import PagedConfig, SamplingParams, load
from granite_paged.engine.group import EngineGroup

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_two_gpus_give_equal_tokens_concurrently() -> None:
    model = load(random_weights="granite-4.0-h-350m", device="cuda:0", dtype="bfloat16").model
    draw = torch.Generator().manual_seed(0)
    lengths = [20, 64, 100, 300] * 6
    prompts = [torch.randint(3, 100_000, (length,), generator=draw).tolist() for length in lengths]
    params = SamplingParams(max_new_tokens=24, stop_tokens=())
    sizes = PagedConfig(max_tokens=32768, max_sequences=32)
    with (
        EngineGroup.replicas(model, ["cuda:0", "cuda:1"], sizes, warmup="lazy") as group,
        ThreadPoolExecutor(2) as pool,
    ):
        # both compile, capture and answer concurrently, with the same work in the same batches
        answers = list(pool.map(lambda engine: engine.generate(prompts, params), group.engines))
    assert [output.error for outputs in answers for output in outputs] == [None] * 2 * len(prompts)
    first, second = ([output.tokens for output in outputs] for outputs in answers)
    assert first == second
