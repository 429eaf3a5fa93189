"""Measure `granite-paged batch` on GPUs: against the engine's own generate(), and on Ray.

Run from the repository: `python -m tools.batch_throughput engine` on one GPU, and
`python -m tools.batch_throughput ray --workers 1 2` on two. The model has the sizes of
granite-4.0-h-1b with random weights; prompts have 32 to 512 tokens and answers 128 to 256.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from granite_paged.batch.answering import Answering, batch_engine
from granite_paged.batch.lines import read_lines
from granite_paged.batch.output import BatchOutput, Tally
from granite_paged.batch.request import Defaults
from granite_paged.batch.run import answer_lines
from granite_paged.engine.request import SamplingParams
from granite_paged.geometry import PagedConfig
from granite_paged.models import load


def write_requests(path: Path, options: argparse.Namespace) -> None:
    """Write requests with random token ids."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(options.requests):
            ids = [draw.randrange(options.vocabulary) for _ in range(draw.randint(*options.prompt))]
            most = draw.randint(*options.new)
            body = {"prompt": ids, "max_tokens": most, "ignore_eos": True}
            file.write(json.dumps({"custom_id": str(number), "body": body}) + "\n")


class Watch:
    """Notes when answers were written, and the most host memory of this process."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int, int]] = []  # seconds, lines, tokens

    def __call__(self, tally: Tally) -> None:
        """Note what the output holds now."""
        self.times.append((time.perf_counter(), tally.lines, tally.tokens))

    def steady(self, total: int) -> float:
        """Return tokens per second from the first tenth of the lines to the last line."""
        at = next(one for one in self.times if one[1] >= total / 10)
        end = next(one for one in self.times if one[1] == total)
        return (end[2] - at[2]) / (end[0] - at[0])


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


def measure_ray(path: Path, folder: Path, options: argparse.Namespace) -> None:
    """Answer the file on Ray, once per number of workers, and compare with the first number."""
    from granite_paged.ray.batch import answer_file  # noqa: PLC0415
    from granite_paged.ray.cluster import connected  # noqa: PLC0415
    from granite_paged.ray.pipeline import Workers  # noqa: PLC0415
    from granite_paged.ray.workers import ModelSpec, WorkerOptions  # noqa: PLC0415

    gpus = 0.0 if options.device == "cpu" else 1.0
    config = PagedConfig(page_size=options.page_size, max_tokens=options.max_tokens)
    spec = ModelSpec(options.model, options.random_weights, options.device, config=config)
    first = None
    for count in options.workers:
        watch, output = Watch(), BatchOutput(str(folder / f"ray{count}.jsonl"))
        started = time.perf_counter()
        with contextlib.redirect_stdout(None), connected("local") as ray:
            workers, rows = Workers(count, gpus, 1.0), WorkerOptions(options.rows)
            answer_file(ray, str(path), spec, rows, workers, output, watch)
        seconds, tally = time.perf_counter() - started, output.tally
        output.close()
        rate = watch.steady(tally.lines)
        first = first or rate
        print(
            f"{count} workers: {seconds:.0f} s with the start, {rate:,.0f} tokens/s after the "
            f"first tenth, {rate / first:.2f} x {options.workers[0]} worker; "
            f"{tally.lines:,} lines, {tally.failed} failed; host memory {peak_memory():.2f} GB"
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
        measure: Any = compare_with_engine if options.what == "engine" else measure_ray
        measure(path, folder, options)


if __name__ == "__main__":
    main()
