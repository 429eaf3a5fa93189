"""Serve one workload with the engine, and with transformers in batches.

    default   generate() with SDPA and a DynamicCache
    static    generate() with a StaticCache and compiled decode steps; all batches are padded to
              one shape, which is compiled before the clock starts

A batch starts when its last request has arrived and the batch before it is done; each of its
requests waits for the longest answer. Every mode gives each request the number of tokens that it
asked for; in float32, these tokens are the same in every mode.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import GenerationConfig

from granite_paged.bench.serve_results import Baseline, Served, ServeResult
from granite_paged.bench.workload import FIRST_TOKEN, Arrival, Workload
from granite_paged.device import device_name, dtype_name
from granite_paged.engine.engine import Engine
from granite_paged.engine.request import OnToken, Request, SamplingParams
from granite_paged.environment import versions
from granite_paged.models import LoadedModel
from granite_paged.progress import Progress, silent
from granite_paged.quantiles import quantile

_NO_TOKEN = -1  # as the end-of-text token: answers never end early, so all modes do the same work


@dataclass(slots=True)
class RequestTrace:
    """Tokens of one request, and when each came, in seconds since the run started."""

    arrival: Arrival
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def compare(
    engine: Engine,
    loaded: LoadedModel,
    ours: Sequence[RequestTrace],
    workload: Workload,
    *,
    seed: int,
    modes: Sequence[str],
    batch: int,
    limit: int | None = None,
    progress: Progress = silent,
) -> ServeResult:
    """Serve with transformers the requests that the engine has served.

    Args:
        engine: has served the requests, and nothing after them.
        loaded: the model for transformers' modes; not patched.
        ours: the requests, in order of arrival, with the engine's tokens.
        workload, seed: what the requests were drawn from.
        modes, batch: names from `names.BASELINES`, and their batch size.
        limit: number of requests that these modes serve, from the first on; None for all.
        progress: called as requests finish.
    """
    by_engine, stats = summary(ours), engine.stats()
    coming = [trace.arrival for trace in ours[:limit]]
    baselines = {}
    for mode in modes:
        batches = Batches(loaded.model, coming, batch, static=mode == "static")
        batches.warm_up()
        theirs = batches.serve(mode, progress)
        served = summary(theirs)
        same = [mine.tokens == other.tokens for mine, other in zip(ours, theirs, strict=False)]
        speedup = by_engine.tokens_per_second / served.tokens_per_second
        baselines[mode] = Baseline(served, speedup, sum(same) / len(same))
    return ServeResult(
        device=device_name(loaded.model.device),
        model=loaded.name,
        dtype=dtype_name(loaded.model.dtype),
        versions=versions(),
        seed=seed,
        workload=workload,
        engine=by_engine,
        baselines=baselines,
        schedule_ms=stats.schedule_ms,
        prefix_hit_rate=stats.prefix_hit_rate,
        preempted=stats.preempted,
    )


def warm_up(engine: Engine) -> None:
    """Serve one short request, outside the timed region."""
    engine.generate([(FIRST_TOKEN,) * 8], SamplingParams(max_new_tokens=2))


def serve(
    engine: Engine, coming: Sequence[Arrival], progress: Progress = silent
) -> list[RequestTrace]:
    """Submit each request when it arrives, and step the engine until all are done."""
    started = time.perf_counter()
    traces = [RequestTrace(arrival) for arrival in coming]
    requests: list[Request] = []
    while len(requests) < len(traces) or not engine.idle:
        now = time.perf_counter() - started
        while len(requests) < len(traces) and traces[len(requests)].arrival.at <= now:
            trace = traces[len(requests)]
            params = SamplingParams(max_new_tokens=trace.arrival.new_tokens, stop_tokens=())
            on_token = _stamp(trace, started)
            requests.append(engine.submit(trace.arrival.prompt, params, on_token=on_token))
        if not engine.step() and len(requests) < len(traces):
            time.sleep(max(0.0, traces[len(requests)].arrival.at - now))
        progress("engine", sum(request.finished for request in requests), len(traces))
    for output in (output for request in requests for output in request.outputs):
        if output.error is not None:
            raise output.error
    return traces


class Batches:
    """transformers' `generate()` over left-padded batches of the requests, in their order.

    Args:
        model: not patched.
        coming: the requests, in order of arrival.
        batch: requests per batch.
        static: use a StaticCache instead of a DynamicCache, and pad all batches to one shape.
    """

    def __init__(self, model: Any, coming: Sequence[Arrival], batch: int, *, static: bool) -> None:
        self._model, self._coming = model, coming
        self._batch, self._static = batch, static

    def warm_up(self) -> None:
        """Run one batch with two tokens per answer, outside the timed region."""
        few = [replace(arrival, at=0.0, new_tokens=2) for arrival in self._coming[: self._batch]]
        self._generate([RequestTrace(arrival) for arrival in few], 0.0)

    def serve(self, mode: str, progress: Progress = silent) -> list[RequestTrace]:
        """Run each batch as soon as its last request has arrived."""
        started = time.perf_counter()
        traces = [RequestTrace(arrival) for arrival in self._coming]
        for start in range(0, len(traces), self._batch):
            together = traces[start : start + self._batch]
            last = max(trace.arrival.at for trace in together)
            time.sleep(max(0.0, last - (time.perf_counter() - started)))
            self._generate(together, started)
            progress(mode, min(start + self._batch, len(traces)), len(traces))
        return traces

    def _generate(self, traces: Sequence[RequestTrace], started: float) -> None:
        ids, mask = self._padded([trace.arrival.prompt for trace in traces])
        times: list[float] = []
        longest = max(trace.arrival.new_tokens for trace in traces)

        def stamp(tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            tokens[:, -1].tolist()  # a server would read each token to send it
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
        for trace, answer in zip(traces, done[:, ids.shape[1] :].tolist(), strict=False):
            trace.tokens = answer[: trace.arrival.new_tokens]
            trace.times = times[: trace.arrival.new_tokens]

    def _padded(self, prompts: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and attention mask, [rows, width], padded on the left."""
        width = max(map(len, prompts))
        if self._static:  # one shape for all batches: repeat the last prompt, pad to the longest
            prompts = prompts + prompts[-1:] * (self._batch - len(prompts))
            width = max(len(arrival.prompt) for arrival in self._coming)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids, mask


def summary(traces: Sequence[RequestTrace]) -> Served:
    """Summarise the times that users of a server would see."""
    first = [1000 * (trace.times[0] - trace.arrival.at) for trace in traces]
    between = [
        1000 * (later - earlier)
        for trace in traces
        for earlier, later in zip(trace.times, trace.times[1:], strict=False)
    ] or [0.0]  # answers of one token have no time between tokens
    tokens = sum(len(trace.tokens) for trace in traces)
    seconds = max(trace.times[-1] for trace in traces)
    return Served(
        requests=len(traces),
        output_tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        first_token_ms=(quantile(first, 0.5), quantile(first, 0.99)),
        between_tokens_ms=(quantile(between, 0.5), quantile(between, 0.99)),
    )


def _stamp(trace: RequestTrace, started: float) -> OnToken:
    def stamp(output: Any, token: int, text: str) -> None:
        trace.tokens.append(token)
        trace.times.append(time.perf_counter() - started)

    return stamp
