"""The report of `bench serve` as one JSON object, written and read back.

What is read is checked field by field, as in `report/bench_results.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from granite_paged.bench.workload import Workload
from granite_paged.errors import InvalidArgument, ResultFileError
from granite_paged.names import SERVING_ENGINES
from granite_paged.report import markdown
from granite_paged.report.formatting import gigabytes, significant
from granite_paged.typed_json import Share, read_json


@dataclass(frozen=True, slots=True)
class Served:
    """How a workload was served. Times are milliseconds: median and 99th percentile.

    Attributes:
        first_token_ms: from a request's arrival to its first token.
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
    """How one of transformers' modes served the same requests.

    Attributes:
        speedup: output tokens per second of the engine, divided by those of this mode.
        tokens_equal: share of requests that got the same tokens from the engine.
    """

    served: Served
    speedup: float
    tokens_equal: Share


@dataclass(frozen=True, slots=True)
class EngineRow:
    """How one engine served two rounds: another workload of the same sizes, then the workload.

    Attributes:
        engine: a name in `SERVING_ENGINES`.
        requests, output_tokens: of the second round.
        seconds: of each round. Compilation happens in the first, where the engine did not compile
            while it started.
        tokens_per_second: output tokens per second of each round.
        first_token_ms: median and 99th percentile of the second round; None where vLLM keeps no
            statistics.
        request_ms: the same, from a request's arrival to its last token.
        speedup: tokens per second of `paged` in the second round, divided by those of this engine.
        first_tokens_equal: share of requests that got the same first token from `paged`. Where the
            engines run one model, it is near 1.
        tokens_equal: share of requests that got the same tokens from `paged`, all of them. In half
            precision, one near-tie changes the rest of an answer.
        start_seconds: from a loaded model to a warm engine for `paged`; until vLLM was ready, model
            loaded, for the others.
        device_bytes: device memory in use after the second round, of all processes.
        versions, settings: what the engine ran with.
        error: why the row has no numbers.
    """

    engine: str
    requests: int
    output_tokens: int = 0
    seconds: tuple[float, float] | None = None
    tokens_per_second: tuple[float, float] | None = None
    first_token_ms: tuple[float, float] | None = None
    request_ms: tuple[float, float] | None = None
    speedup: float | None = None
    first_tokens_equal: Share | None = None
    tokens_equal: Share | None = None
    start_seconds: float | None = None
    device_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True)
class ServeResult:
    """How the engine, transformers' modes and, where it was asked for, vLLM served a workload.

    Attributes:
        schedule_ms: scheduler time per engine step, on the host.
        prefix_hit_rate: share of prompt tokens found in the prefix cache, in all rounds.
        preempted: sequences that were preempted.
        rows: `paged` and vLLM side by side; empty without `--mode vllm`.
    """

    device: str
    model: str
    dtype: str
    versions: dict[str, str]
    seed: int
    workload: Workload
    engine: Served
    baselines: dict[str, Baseline]
    schedule_ms: float
    prefix_hit_rate: Share
    preempted: int
    rows: list[EngineRow] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain types only."""
        return asdict(self)


def is_serve(path: str | Path) -> bool:
    """Whether a file is a report of `bench serve`, whole or malformed, and no other result."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return isinstance(data, dict) and "workload" in data
    return False


def read_serve(path: str | Path) -> ServeResult:
    """Read and check one file. Raises ResultFileError, which names the file and the field."""
    try:
        result: ServeResult = read_json(ServeResult, path, ResultFileError)
    except InvalidArgument as error:  # of the workload
        raise ResultFileError(str(path), "workload", f"cannot be: {error}") from None
    _check_rows(result.rows, str(path))
    return result


def _check_rows(rows: Sequence[EngineRow], path: str) -> None:
    names = [row.engine for row in rows]
    for place, row in enumerate(rows):
        where = f"rows[{place}]"
        if row.engine not in SERVING_ENGINES:
            known = ", ".join(SERVING_ENGINES)
            raise ResultFileError(path, f"{where}.engine", f"must be one of {known}")
        if row.engine in names[:place]:
            raise ResultFileError(path, where, f"repeats rows[{names.index(row.engine)}]")
        if (row.seconds is None or row.tokens_per_second is None) != bool(row.error):
            raise ResultFileError(path, where, "must have either times and tokens or an error")


# -- tables -------------------------------------------------------------------------------------

COLUMNS = ("tokens/s", "paged is", "first token", "same first", "same tokens", "start", "GB")
"""Headings of the columns after the engine's name; times to the first token are medians."""


def cells(row: EngineRow) -> list[str]:
    """Return a row's cells, in the order of `COLUMNS`."""
    return [
        significant(row.tokens_per_second[1] if row.tokens_per_second else None),
        f"{row.speedup:.2f} x" if row.speedup else "-",
        f"{significant(row.first_token_ms[0])} ms" if row.first_token_ms else "-",
        _percent(row.first_tokens_equal),
        _percent(row.tokens_equal),
        f"{significant(row.start_seconds)} s" if row.start_seconds is not None else "-",
        gigabytes(row.device_bytes),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def conditions(row: EngineRow) -> str:
    """Return one line: the row's versions and settings, or its error."""
    if row.error:
        return f"{row.engine}: {row.error}"
    pairs = [f"{name} {value}" for name, value in row.versions.items()]
    pairs += [f"{name}={value}" for name, value in row.settings.items()]
    return f"{row.engine}: {', '.join(pairs)}"


def serve_table(result: ServeResult) -> str:
    """Return the engines' rows as Markdown, with what they ran on; empty without rows."""
    if not result.rows:
        return ""
    load = result.workload
    head = (
        f"**{result.device}** · {result.model}, {result.dtype} · {load.requests} requests at once, "
        f"prompts of {load.prompt_tokens[0]} to {load.prompt_tokens[1]} tokens, answers of "
        f"{load.new_tokens[0]} to {load.new_tokens[1]}, {load.shared_tokens} shared, "
        f"seed {result.seed}\n\n"
    )
    lines = [[row.engine, *cells(row)] for row in result.rows if not row.error]
    notes = [f"- {conditions(row)}" for row in result.rows]
    return head + markdown.table(["engine", *COLUMNS], lines) + "\n" + "\n".join(notes) + "\n"
