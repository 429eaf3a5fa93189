"""Serve a workload with vLLM in another process, and beside it with our engine.

vLLM comes from the environment of any interpreter; `vllm_child.py` runs there. The engines never
hold the device together: ours is freed before vLLM starts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from granite_paged.bench.serve_results import EngineRow
from granite_paged.bench.workload import Arrival
from granite_paged.device import dtype_name
from granite_paged.engine.engine import Engine
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import InvalidArgument, ResultFileError, Unsupported
from granite_paged.geometry import MAMBA_KINDS
from granite_paged.names import SERVING_ENGINES
from granite_paged.quantiles import quantile
from granite_paged.typed_json import read_json

_CHILD = Path(__file__).with_name("vllm_child.py")
_HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"

_ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception): .*")

OURS, *_THEIRS = SERVING_ENGINES
SETTINGS: dict[str, dict[str, Any]] = dict(
    zip(_THEIRS, ({"mamba_ssm_cache_dtype": "float32"}, {}), strict=True)
)
"""Arguments of `vllm.LLM` that differ between its two rows."""

Rounds = tuple[list[Arrival], list[Arrival]]
"""Requests of both rounds; all of a round are sent at once."""


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """Tokens of one request, and seconds from its arrival to its first and to its last token."""

    tokens: list[int]
    first_token_s: float | None = None
    request_s: float | None = None


@dataclass(frozen=True, slots=True)
class ServedRound:
    """One round, in the order of its requests."""

    seconds: float
    requests: list[ServedRequest]


@dataclass(frozen=True, slots=True)
class EngineRun:
    """What one engine did in two rounds; the last four attributes are those of `EngineRow`."""

    rounds: tuple[ServedRound, ServedRound]
    start_seconds: float
    versions: dict[str, str]
    settings: dict[str, str]
    device_bytes: int | None = None


def check_vllm(python: str) -> None:
    """Raise InvalidArgument unless this interpreter runs and finds vLLM."""
    advice = "pass --python PATH, the interpreter of an environment with vLLM"
    try:
        done = subprocess.run([python, "-c", _HAS_VLLM], check=False, capture_output=True)
    except OSError as error:
        raise InvalidArgument(f"cannot run {python}: {error.strerror}; {advice}") from None
    if done.returncode:
        raise InvalidArgument(f"vLLM is not installed for {python}: {advice}")


def vllm_arguments(model: Any, checkpoint: str, *, rows: int, seed: int) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that both of its rows have.

    Args:
        model: gives the dtype, and the kinds of its layers.
        checkpoint: folder or hub id of its weights.
        rows: requests that may run at once.
        seed: of the workload.
    """
    return {
        "model": checkpoint,
        "dtype": dtype_name(model.dtype),
        "skip_tokenizer_init": True,
        "max_num_seqs": rows,
        "seed": seed,
        "disable_log_stats": False,  # for the times of each request
        "hf_overrides": {"layer_types": _published_kinds(model)},
    }


def _published_kinds(model: Any) -> list[str]:
    """Return the kinds of a model's layers by their names in published checkpoints.

    transformers renames them when it reads a configuration; vLLM 0.25.1 knows the published names.
    """
    kinds = model.config.layers_block_type
    return ["mamba" if kind in MAMBA_KINDS else "attention" for kind in kinds]


def run_vllm(
    python: str, settings: Mapping[str, Any], rounds: Rounds, device: torch.device
) -> EngineRun:
    """Serve the rounds in a process of this interpreter.

    Args:
        python: interpreter of an environment with vLLM.
        settings: arguments of `vllm.LLM`.
        rounds: the requests.
        device: CPU, or the CUDA device that vLLM shall use.

    Raises:
        Unsupported: the process failed, with its last line and the file of its output, which is
            kept; or its result is not what was asked for.
    """
    with tempfile.TemporaryDirectory(prefix="granite-paged-") as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "result.json"
        content = {"engine": dict(settings), "rounds": [_plain(coming) for coming in rounds]}
        asked.write_text(json.dumps(content), encoding="utf-8")
        with tempfile.NamedTemporaryFile(
            prefix="granite-paged-vllm-", suffix=".log", delete=False
        ) as log:
            command = [python, str(_CHILD), str(asked), str(answer)]
            status = subprocess.run(
                command,
                check=False,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment_for(device),
            ).returncode
        if status:
            output = Path(log.name).read_text(encoding="utf-8", errors="replace")
            raise Unsupported(
                f"vLLM ended with status {status}: {_cause(output)}; its output: {log.name}"
            )
        Path(log.name).unlink()
        try:
            run: EngineRun = read_json(EngineRun, answer, ResultFileError)
        except ResultFileError as error:
            raise Unsupported(f"vLLM's result cannot be used: {error}") from None
    _check_complete(run, rounds)
    return run


def _cause(output: str) -> str:
    """Return the first error that vLLM names; without any, its last line.

    Its engine is a process of its own, whose failure reaches the other one as "see above".
    """
    named = _ERROR.search(output)
    return named[0].strip() if named else (output.strip().splitlines() or ["no message"])[-1]


def serve_offline(engine: Engine, coming: Sequence[Arrival]) -> ServedRound:
    """Submit all requests at once and step the engine until they are done.

    No tokens are streamed, as in vLLM's `generate()`.
    """
    started = time.perf_counter()
    requests = [
        engine.submit(
            arrival.prompt, SamplingParams(max_new_tokens=arrival.new_tokens, stop_tokens=())
        )
        for arrival in coming
    ]
    first, last = [0.0] * len(requests), [0.0] * len(requests)
    waiting = unfinished = list(range(len(requests)))
    while not engine.idle:
        engine.step()
        now = time.perf_counter() - started
        for index in waiting:
            first[index] = now  # until it has a token
        for index in unfinished:
            last[index] = now
        waiting = [index for index in waiting if not requests[index].outputs[0].tokens]
        unfinished = [index for index in unfinished if not requests[index].finished]
    outputs = [request.outputs[0] for request in requests]
    for output in outputs:
        if output.error is not None:
            raise output.error
    served = map(ServedRequest, [output.tokens for output in outputs], first, last)
    return ServedRound(max(last), list(served))


def row_of(engine: str, run: EngineRun, ours: EngineRun) -> EngineRow:
    """Summarise a run, and compare its second round with that of our engine."""
    last, mine = run.rounds[1].requests, ours.rounds[1].requests
    first, second = rates = _rates(run)
    pairs = [(request.tokens, other.tokens) for request, other in zip(last, mine, strict=True)]
    return EngineRow(
        engine=engine,
        requests=len(last),
        output_tokens=sum(len(request.tokens) for request in last),
        seconds=(run.rounds[0].seconds, run.rounds[1].seconds),
        tokens_per_second=(first, second),
        first_token_ms=_milliseconds([request.first_token_s for request in last]),
        request_ms=_milliseconds([request.request_s for request in last]),
        speedup=_rates(ours)[1] / rates[1],
        first_tokens_equal=sum(tokens[:1] == other[:1] for tokens, other in pairs) / len(pairs),
        tokens_equal=sum(tokens == other for tokens, other in pairs) / len(pairs),
        start_seconds=run.start_seconds,
        device_bytes=run.device_bytes,
        versions=run.versions,
        settings=run.settings,
    )


def _plain(coming: Sequence[Arrival]) -> list[dict[str, Any]]:
    return [
        {"prompt": list(arrival.prompt), "new_tokens": arrival.new_tokens} for arrival in coming
    ]


def environment_for(device: torch.device) -> dict[str, str]:
    """Return our environment variables, with this device as the only one, and output in order."""
    ours = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if device.type == "cuda" and device.index:
        visible = ours.get("CUDA_VISIBLE_DEVICES", "").split(",")
        known = len(visible) > device.index
        ours["CUDA_VISIBLE_DEVICES"] = visible[device.index] if known else str(device.index)
    return ours


def _check_complete(run: EngineRun, rounds: Rounds) -> None:
    for served, coming in zip(run.rounds, rounds, strict=True):
        wanted = [arrival.new_tokens for arrival in coming]
        got = [len(request.tokens) for request in served.requests]
        if got != wanted:
            raise Unsupported(
                f"vLLM did other work: {len(got)} requests with {sum(got)} new tokens, "
                f"not {len(wanted)} with {sum(wanted)}"
            )


def _rates(run: EngineRun) -> tuple[float, float]:
    first, second = (
        sum(len(request.tokens) for request in served.requests) / served.seconds
        for served in run.rounds
    )
    return first, second


def _milliseconds(seconds: Sequence[float | None]) -> tuple[float, float] | None:
    """Return median and 99th percentile; None where a request has no time."""
    known = [1000 * second for second in seconds if second is not None]
    if len(known) < len(seconds):
        return None
    return quantile(known, 0.5), quantile(known, 0.99)
