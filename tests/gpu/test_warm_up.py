"""After a full warm-up, no request waits for a compiler or for the capture of a graph."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import triton

from granite_paged import Engine, PagedConfig, SamplingParams
from granite_paged.models import load

SECONDS = float(os.environ.get("GRANITE_PAGED_TRAFFIC_SECONDS", "15"))
SIZES = PagedConfig(max_tokens=24_576, max_sequences=32, chunk_tokens=512)


def traffic(engine: Engine, seconds: float) -> None:
    """Ask for what an engine can do, at random, until the time is over."""
    pick = random.Random(0)
    stem = [pick.randrange(3, 100_000) for _ in range(600)]
    until = time.monotonic() + seconds

    def text(length: int) -> list[int]:
        shared = pick.choice([0, 0, 256, 600])
        return [*stem[:shared], *(pick.randrange(3, 100_000) for _ in range(length))]

    def params() -> SamplingParams:
        return SamplingParams(
            max_new_tokens=pick.randint(1, 60),
            temperature=pick.choice([0.0, 0.8]),
            n=pick.choice([1, 1, 3]),
            priority=pick.choice([0, 0, 1]),
            streamed=pick.choice([False, True]),
        )

    while time.monotonic() < until:
        for _ in range(pick.choice([1, 4, 40])):
            engine.submit(text(pick.choice([1, 30, 200, 2000])), params())
        if pick.random() < 0.3:
            engine.submit_scoring(text(300), [text(pick.randint(1, 40)) for _ in range(4)])
        if pick.random() < 0.2:
            engine.submit_search(text(50), SamplingParams(max_new_tokens=6), beams=3)
        for _ in range(pick.randint(1, 60)):
            engine.step()
        while engine.waiting > 200:
            engine.step()
    while engine.step():
        pass


def test_nothing_compiles_while_requests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(random_weights="granite-4.0-h-350m", device="cuda", dtype="bfloat16").model
    compiled: list[Any] = []
    with Engine(model, SIZES, preemption="swap") as engine:
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_post_compile_hook", lambda **hook: compiled.append(hook)
        )
        with torch._dynamo.config.patch(error_on_recompile=True):
            traffic(engine, SECONDS)
        stats = engine.stats()
    assert (stats.late_captures, compiled) == (0, [])
    assert stats.preempted
    assert stats.swapped
    assert stats.prefix_hits


def test_a_lazy_engine_counts_what_it_compiles_late() -> None:
    model = load(random_weights="granite-4.0-h-350m", device="cuda", dtype="bfloat16").model
    with Engine(model, SIZES, warmup="lazy") as engine:
        engine.generate([[5] * 40], SamplingParams(max_new_tokens=3))
        assert engine.stats().late_captures == 2  # a prefill and a decode step


START = """
import json, warnings
import triton
from torch._dynamo.utils import counters
from granite_paged import Engine, PagedConfig
from granite_paged.models import load
warnings.filterwarnings("error", message="kernels are compiled|.* cannot be written")
loaded = []
triton.knobs.compilation.listener = lambda *, cache_hit, **found: loaded.append(cache_hit)
model = load(random_weights="granite-4.0-h-350m", device="cuda", dtype="bfloat16").model
sizes = PagedConfig(max_tokens=8192, max_sequences=8, chunk_tokens=256)
with Engine(model, sizes) as engine:
    tokens = engine.generate([[5, 6, 7] * 30])[0].tokens
traced = counters["aot_autograd"]
print(json.dumps({
    "tokens": tokens,
    "found": [sum(loaded), traced["autograd_cache_hit"]],
    "compiled": [len(loaded) - sum(loaded), traced["autograd_cache_miss"]],
}))
"""


def test_workers_fill_the_caches_for_the_next_start(tmp_path: Any) -> None:
    """The next start finds every Triton kernel and every graph of Inductor in the caches."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    places = {name: str(tmp_path / folder) for name, folder in caches.items()}

    def start() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", START],
            capture_output=True, text=True, check=False, env={**os.environ, **places},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    cold = start()
    notes = list((tmp_path / "inductor" / "granite_paged").iterdir())
    assert len(notes) == 1, "one note per configuration"
    assert all(cold["compiled"])
    warm = start()
    assert warm["tokens"] == cold["tokens"]
    assert warm["compiled"] == [0, 0]
    assert all(warm["found"])
