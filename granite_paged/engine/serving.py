"""One workload, served twice: by the engine, and by transformers in static batches.

A static batch starts when its last request is there and the batch before is done; everyone in it
waits for its longest answer. Both give every request as many tokens as it asked for, and the same
ones, in float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from granite_paged.engine.engine import Engine
from granite_paged.engine.request import OnToken, Request, SamplingParams
from granite_paged.engine.workload import FIRST_TOKEN, Arrival

Progress = Callable[[str, int], None]
"""Told who serves, and how many requests are done."""

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
class ServingReport:
    """The engine beside `default`, and what the engine's own parts cost and saved.

    Attributes:
        speedup: output tokens a second, over those of `default`.
        tokens_equal: share of requests that got the same tokens from both.
    """

    engine: Served
    default: Served | None
    speedup: float | None
    tokens_equal: float | None
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
    batch: int | None,
    progress: Progress | None = None,
) -> ServingReport:
    """Serve the requests by the engine, then by `model` in static batches (None: not at all)."""
    told = progress or (lambda who, done: None)
    _warm_up(engine, model if batch else None)
    ours = serve(engine, coming, told)
    stats = engine.stats()
    theirs = serve_static(model, coming, batch, told) if batch else None
    by_engine, by_default = summary(ours), summary(theirs) if theirs else None
    same = [mine.tokens == other.tokens for mine, other in zip(ours, theirs or (), strict=False)]
    return ServingReport(
        engine=by_engine,
        default=by_default,
        speedup=by_engine.tokens_per_second / by_default.tokens_per_second if by_default else None,
        tokens_equal=sum(same) / len(same) if same else None,
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


def serve_static(
    model: Any, coming: Sequence[Arrival], batch: int, progress: Progress
) -> list[Record]:
    """transformers' `generate()`, SDPA and DynamicCache, over left-padded batches."""
    started = time.perf_counter()
    records = [Record(arrival, [], []) for arrival in coming]
    for start in range(0, len(records), batch):
        together = records[start : start + batch]
        last = max(record.arrival.at for record in together)
        time.sleep(max(0.0, last - (time.perf_counter() - started)))
        _generate(model, together, started)
        progress("default", min(start + batch, len(records)))
    return records


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


def _warm_up(engine: Engine, model: Any | None) -> None:
    """What either does once only is nobody's waiting time."""
    once = Arrival(0.0, (FIRST_TOKEN,) * 8, 2)
    engine.generate([once.prompt], SamplingParams(max_new_tokens=once.new_tokens), progress=False)
    if model is not None:
        _generate(model, [Record(once, [], [])], 0.0)


def _stamp(record: Record, started: float) -> OnToken:
    def stamp(output: Any, token: int, text: str) -> None:
        record.tokens.append(token)
        record.times.append(time.perf_counter() - started)

    return stamp


def _generate(model: Any, records: Sequence[Record], started: float) -> None:
    width = max(len(record.arrival.prompt) for record in records)
    ids = torch.zeros(len(records), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, record in enumerate(records):
        length = len(record.arrival.prompt)
        ids[row, width - length :] = torch.tensor(record.arrival.prompt)
        mask[row, width - length :] = 1
    times: list[float] = []

    def stamp(tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        tokens[:, -1].tolist()  # as somebody who shows them would
        times.append(time.perf_counter() - started)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    settings = GenerationConfig(
        max_new_tokens=max(record.arrival.new_tokens for record in records),
        do_sample=False,
        eos_token_id=_NO_TOKEN,
        pad_token_id=0,
    )
    with torch.inference_mode():
        done = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            stopping_criteria=[stamp],
        )
    for record, answer in zip(records, done[:, width:].tolist(), strict=True):
        record.tokens = answer[: record.arrival.new_tokens]
        record.times = times[: record.arrival.new_tokens]
