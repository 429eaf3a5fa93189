"""One workload, served by the engine, and by transformers in batches.

    default   generate() with SDPA and a DynamicCache
    static    generate() with a StaticCache, whose decode steps it compiles; all batches are padded
              to one shape, which is compiled before the clock starts

A batch starts when its last request is there and the batch before is done; everyone in it waits for
its longest answer. All give every request as many tokens as it asked for, and the same ones, in
float32.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig

from granite_paged.bench.workload import FIRST_TOKEN, Arrival
from granite_paged.engine.engine import Engine
from granite_paged.engine.request import OnToken, Request, SamplingParams

Progress = Callable[[str, int], None]
"""Told who serves, and how many requests are done."""

MODES = ("default", "static")
"""Of transformers."""

_NO_TOKEN = -1  # nothing ends an answer early, so that both serve the same number of tokens


@dataclass(frozen=True, slots=True)
class Served:
    """How a workload was served. Milliseconds, median and 99th percentile.

    Attributes:
        first_token_ms: from a request's arrival.
        between_tokens_ms: from one token of a request to its next.
    """

    requests: int
    output_tokens: int
    seconds: float
    tokens_per_second: float
    first_token_ms: tuple[float, float]
    between_tokens_ms: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Baseline:
    """How transformers served the first of the same requests.

    Attributes:
        speedup: output tokens a second of the engine, over these.
        tokens_equal: share of these requests that got the same tokens from the engine.
    """

    served: Served
    speedup: float
    tokens_equal: float


@dataclass(frozen=True, slots=True)
class ServingReport:
    """The engine beside transformers' modes, and what its own parts cost and saved."""

    engine: Served
    baselines: dict[str, Baseline]
    schedule_ms: float
    prefix_hit_rate: float
    preempted: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, by name."""
        return asdict(self)


@dataclass(slots=True)
class Record:
    """Tokens of one request, and when each came, in seconds of the run."""

    arrival: Arrival
    tokens: list[int]
    times: list[float]


def compare(
    engine: Engine,
    model: Any,
    coming: Sequence[Arrival],
    *,
    modes: Sequence[str],
    batch: int,
    at_most: int | None = None,
    progress: Progress | None = None,
) -> ServingReport:
    """Serve the requests by the engine, then by `model` in some of `MODES`.

    batch: requests of a batch. at_most: so many requests, the first ones, are enough for `modes`.
    """
    told = progress or (lambda who, done: None)
    warm = SamplingParams(max_new_tokens=2)
    engine.generate([(FIRST_TOKEN,) * 8], warm)  # nobody's waiting time
    ours = serve(engine, coming, told)
    by_engine, stats = summary(ours), engine.stats()
    baselines = {}
    for mode in modes:
        batches = Batches(model, coming[:at_most], batch, static=mode == "static")
        batches.warm_up()
        theirs = batches.serve(functools.partial(told, mode))
        served = summary(theirs)
        same = [mine.tokens == other.tokens for mine, other in zip(ours, theirs, strict=False)]
        speedup = by_engine.tokens_per_second / served.tokens_per_second
        baselines[mode] = Baseline(served, speedup, sum(same) / len(same))
    return ServingReport(
        engine=by_engine,
        baselines=baselines,
        schedule_ms=stats.schedule_ms,
        prefix_hit_rate=stats.prefix_hit_rate,
        preempted=stats.preempted,
    )


def serve(engine: Engine, coming: Sequence[Arrival], progress: Progress) -> list[Record]:
    """Submit each request when it arrives, and step until all are done."""
    started = time.perf_counter()
    records = [Record(arrival, [], []) for arrival in coming]
    requests: list[Request] = []
    while len(requests) < len(records) or not engine.idle:
        now = time.perf_counter() - started
        while len(requests) < len(records) and records[len(requests)].arrival.at <= now:
            record = records[len(requests)]
            params = SamplingParams(max_new_tokens=record.arrival.new_tokens, stop_tokens=())
            on_token = _stamp(record, started)
            requests.append(engine.submit(record.arrival.prompt, params, on_token=on_token))
        if not engine.step() and len(requests) < len(records):
            time.sleep(max(0.0, records[len(requests)].arrival.at - now))
        progress("engine", sum(request.finished for request in requests))
    for output in (output for request in requests for output in request.outputs):
        if output.error is not None:
            raise output.error
    return records


class Batches:
    """transformers' `generate()` over left-padded batches of the requests, in their order.

    static: a StaticCache instead of a DynamicCache, and every batch of one shape.
    """

    def __init__(self, model: Any, coming: Sequence[Arrival], batch: int, *, static: bool) -> None:
        self._model, self._coming = model, coming
        self._batch, self._static = batch, static

    def warm_up(self) -> None:
        """What is done once only is nobody's waiting time: here a batch of two tokens each."""
        few = [replace(arrival, at=0.0, new_tokens=2) for arrival in self._coming[: self._batch]]
        self._generate([Record(arrival, [], []) for arrival in few], 0.0)

    def serve(self, progress: Callable[[int], None]) -> list[Record]:
        """Each batch when its last request is there. Told how many requests are done."""
        started = time.perf_counter()
        records = [Record(arrival, [], []) for arrival in self._coming]
        for start in range(0, len(records), self._batch):
            together = records[start : start + self._batch]
            last = max(record.arrival.at for record in together)
            time.sleep(max(0.0, last - (time.perf_counter() - started)))
            self._generate(together, started)
            progress(min(start + self._batch, len(records)))
        return records

    def _generate(self, records: Sequence[Record], started: float) -> None:
        sized_by = self._coming if self._static else [record.arrival for record in records]
        width = max(len(arrival.prompt) for arrival in sized_by)
        missing = self._batch - len(records) if self._static else 0
        rows = [*records, *[records[-1]] * missing]  # some are there for the shape only
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, record in enumerate(rows):
            length = len(record.arrival.prompt)
            ids[row, width - length :] = torch.tensor(record.arrival.prompt)
            mask[row, width - length :] = 1
        times: list[float] = []
        longest = max(record.arrival.new_tokens for record in records)

        def stamp(tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            tokens[:, -1].tolist()  # as somebody who shows them would
            times.append(time.perf_counter() - started)
            over = len(times) >= longest
            return torch.full((len(tokens),), over, device=tokens.device)

        settings = GenerationConfig(
            max_new_tokens=max(arrival.new_tokens for arrival in self._coming),
            cache_implementation="static" if self._static else None,
            do_sample=False,
            eos_token_id=_NO_TOKEN,
            pad_token_id=0,
        )
        with torch.inference_mode():
            done = self._model.generate(
                ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                generation_config=settings,
                stopping_criteria=[stamp],
            )
        for record, answer in zip(records, done[:, width:].tolist(), strict=False):
            record.tokens = answer[: record.arrival.new_tokens]
            record.times = times[: record.arrival.new_tokens]


def summary(records: Sequence[Record]) -> Served:
    """What a server's user would see."""
    first = [1000 * (record.times[0] - record.arrival.at) for record in records]
    between = [
        1000 * (later - earlier)
        for record in records
        for earlier, later in zip(record.times, record.times[1:], strict=False)
    ]
    tokens = sum(len(record.tokens) for record in records)
    seconds = max(record.times[-1] for record in records)
    return Served(
        requests=len(records),
        output_tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        first_token_ms=(percentile(first, 50), percentile(first, 99)),
        between_tokens_ms=(percentile(between, 50), percentile(between, 99)),
    )


def percentile(numbers: Sequence[float], percent: int) -> float:
    """0 for no numbers."""
    if len(numbers) < 2:
        return numbers[0] if numbers else 0.0
    return statistics.quantiles(numbers, n=100, method="inclusive")[percent - 1]


def _stamp(record: Record, started: float) -> OnToken:
    def stamp(output: Any, token: int, text: str) -> None:
        record.tokens.append(token)
        record.times.append(time.perf_counter() - started)

    return stamp
