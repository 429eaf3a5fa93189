"""Measure `granite-paged batch` on GPUs: against the engine's own generate(), and on Ray.

Run from the repository: `python -m tools.batch_throughput engine` on one GPU, and
`python -m tools.batch_throughput ray --workers 1 2` on two. The model has the sizes of
granite-4.0-h-1b with random weights; prompts have 32 to 512 tokens and answers 128 to 256.

`ray` reports two rates: of the whole file, and of its middle, without the time in which engines
fill up and drain. At 15,000 tokens/s per GPU, 4,096 lines take one worker 52 s (`--requests 4096`),
without its start. Without a GPU: `--device cpu --model granite_paged/checkpoints/tiny_recall
--vocabulary 296 --rows 8 --page-size 16 --prompt 8 64 --new 16 32 --requests 2048`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from granite_paged.batch.answering import Answering, batch_engine
from granite_paged.batch.lines import read_lines
from granite_paged.batch.output import BatchOutput, Tally
from granite_paged.batch.request import Defaults
from granite_paged.batch.run import answer_lines
from granite_paged.engine.request import SamplingParams
from granite_paged.geometry import PagedConfig
from granite_paged.models import load

PERIOD = 0.05
"""Seconds between two samples of a worker's tokens."""


def write_requests(path: Path, options: argparse.Namespace) -> None:
    """Write requests with random token ids."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(options.requests):
            ids = [draw.randrange(options.vocabulary) for _ in range(draw.randint(*options.prompt))]
            most = draw.randint(*options.new)
            body = {"prompt": ids, "max_tokens": most, "ignore_eos": True}
            file.write(json.dumps({"custom_id": str(number), "body": body}) + "\n")


def peak_memory() -> float:
    """Return the most host memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def compare_with_engine(path: Path, folder: Path, options: argparse.Namespace) -> None:
    """Answer the file by generate() and by batch, in turns, on one engine."""
    loaded = load(options.model, random_weights=options.random_weights, device=options.device)
    rows = [json.loads(line)["body"] for line in path.read_text().splitlines()]
    prompts = [row["prompt"] for row in rows]
    params = [SamplingParams(max_new_tokens=row["max_tokens"], stop_tokens=()) for row in rows]
    tokens = sum(one.max_new_tokens for one in params)
    config = PagedConfig(page_size=options.page_size, max_tokens=options.max_tokens)
    ratios = []
    with batch_engine(loaded, config, options.rows) as engine:
        answering = Answering(engine, loaded, Defaults())
        for turn in range(options.turns):
            started = time.perf_counter()
            engine.generate(prompts, params)
            own = tokens / (time.perf_counter() - started)
            engine.forget_prefixes()
            output = BatchOutput(str(folder / f"out{turn}.jsonl"))
            started = time.perf_counter()
            with path.open("rb") as file:
                answer_lines(read_lines(file), answering, output, lambda tally: None)
            batch = tokens / (time.perf_counter() - started)
            engine.forget_prefixes()
            assert output.tally.tokens == tokens, output.tally
            output.close()
            ratios.append(batch / own)
            print(f"generate() {own:,.0f} tokens/s, batch {batch:,.0f}, ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}, host memory {peak_memory():.2f} GB")


def watched_worker(folder: Path, count: int) -> type:
    """Return a `LineWorker` that, once ready, waits until `count` workers are ready.

    It then writes its number of sampled tokens to a file of its own in the folder, with the time,
    every `PERIOD` seconds.
    """
    from granite_paged.ray.workers import LineWorker  # noqa: PLC0415

    class WatchedWorker(LineWorker):
        def __init__(self, *arguments: Any) -> None:
            LineWorker.__init__(self, *arguments)
            (folder / f"ready{os.getpid()}").touch()
            while len(list(folder.glob("ready*"))) < count:
                time.sleep(0.01)
            threading.Thread(target=self._watch, daemon=True).start()

        def _watch(self) -> None:
            with (folder / f"tokens{os.getpid()}").open("w") as file:
                while True:
                    file.write(f"{time.time()} {self._answering.engine.stats().tokens}\n")
                    file.flush()
                    time.sleep(PERIOD)

    return WatchedWorker


class RayRun(NamedTuple):
    """One file answered on Ray.

    Attributes:
        start: seconds until every worker was ready.
        seconds: from then until the last answer was written.
        middle: sampled tokens per second of all workers, between 20 % and 80 % of all tokens.
    """

    start: float
    seconds: float
    middle: float
    tally: Tally

    @property
    def whole(self) -> float:
        """Tokens per second of the whole file."""
        return self.tally.tokens / self.seconds


def middle_rate(samples: Sequence[np.ndarray]) -> float:
    """Return tokens per second between 20 % and 80 % of all tokens.

    Args:
        samples: of each worker, [samples, 2]: time in seconds, and tokens so far.
    """
    times = np.unique(np.concatenate([each[:, 0] for each in samples]))
    tokens = np.sum([np.interp(times, each[:, 0], each[:, 1]) for each in samples], axis=0)
    bounds = 0.2 * tokens[-1], 0.8 * tokens[-1]
    first, last = np.interp(bounds, tokens, times)
    return float((bounds[1] - bounds[0]) / (last - first))


def run_on_ray(path: Path, count: int, options: argparse.Namespace) -> RayRun:
    """Answer a file with `count` workers on a new local cluster."""
    from granite_paged.ray import batch  # noqa: PLC0415
    from granite_paged.ray.cluster import connected  # noqa: PLC0415
    from granite_paged.ray.pipeline import Workers  # noqa: PLC0415
    from granite_paged.ray.workers import ModelSpec, WorkerOptions  # noqa: PLC0415

    gpus = 0.0 if options.device == "cpu" else 1.0
    config = PagedConfig(page_size=options.page_size, max_tokens=options.max_tokens)
    spec = ModelSpec(options.model, options.random_weights, options.device, config=config)
    workers, rows = Workers(count, gpus, 1.0), WorkerOptions(options.rows)
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), time.time()
        output = BatchOutput(str(folder / "out.jsonl"))
        with (
            mock.patch.object(batch, "LineWorker", watched_worker(folder, count)),
            contextlib.redirect_stdout(None),
            connected("local") as ray,
        ):
            batch.answer_file(ray, str(path), spec, rows, workers, output, lambda tally: None)
            end = time.time()
        output.close()
        samples = [np.loadtxt(file) for file in folder.glob("tokens*")]
    ready = max(each[0, 0] for each in samples)
    return RayRun(ready - begin, end - ready, middle_rate(samples), output.tally)


def measure_ray(path: Path, options: argparse.Namespace) -> None:
    """Answer the file with each number of workers, and compare the rates with the first one's."""
    first: RayRun | None = None
    for count in options.workers:
        run = run_on_ray(path, count, options)
        first = first or run
        print(
            f"{count} workers: {run.tally.lines:,} lines, {run.tally.tokens:,} tokens in "
            f"{run.seconds:.1f} s after {run.start:.0f} s of start: {run.whole:,.0f} tokens/s, "
            f"{run.whole / first.whole:.2f} x {options.workers[0]}; "
            f"middle {run.middle:,.0f} tokens/s, {run.middle / first.middle:.2f} x; "
            f"{run.tally.failed} failed; host memory {peak_memory():.2f} GB",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["engine", "ray"])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--prompt", type=int, nargs=2, default=(32, 512))
    parser.add_argument("--new", type=int, nargs=2, default=(128, 256))
    parser.add_argument("--vocabulary", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model")
    parser.add_argument("--random-weights")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--page-size", type=int, default=128)
    parser.add_argument("--max-tokens", type=int)
    options = parser.parse_args()
    if options.model is None and options.random_weights is None:
        options.random_weights = "granite-4.0-h-1b"
    return options


def main() -> None:
    """Write the requests and measure."""
    options = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "requests.jsonl"
        write_requests(path, options)
        if options.what == "engine":
            compare_with_engine(path, folder, options)
        else:
            measure_ray(path, options)


if __name__ == "__main__":
    main()
