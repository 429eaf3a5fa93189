"""Measure what exact mode costs beside normal mode, in one run.

Run from the repository, on a GPU: `python -m tools.exact_cost`. The model has the sizes of
granite-4.0-h-1b with random weights. Steps are medians of the runner's captured steps; a decode
step's rows stand at different places of their chunks. Steps of the two modes take turns, so that
both meet the same clocks. The last row is `generate()` on mixed requests (prompts of 32 to 512
tokens, answers of 128 to 512), in its second run: normal mode first, then exact mode. With
`--out`, the numbers go to the file of this GPU in that folder, too.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from granite_paged.bench.measure import Clock
from granite_paged.engine.engine import Engine
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import InvalidArgument
from granite_paged.geometry import PagedConfig
from granite_paged.layers.mamba import EXACT_CHUNK
from granite_paged.runner.runner import Chunk, Runner
from tools.golden_engine import (
    add_entry,
    add_model_options,
    answers,
    device_file,
    exit_status,
    loaded_model,
)

DECODES = ((1, 512), (8, 512), (32, 512), (128, 1024))
PREFILLS = ((1, 128), (1, 512), (1, 2048), (16, 128), (4, 512))
MODES = {"normal": False, "exact": True}

LEAST = 16
"""Smallest `--most`: with less, no shape would be left."""


class Mode:
    """A runner, and the steps that are timed."""

    def __init__(self, model: Any, rows: int, tokens: int, *, exact: bool) -> None:
        sizes = PagedConfig(exact=exact, max_sequences=rows, max_tokens=(rows + 1) * tokens)
        self.runner = Runner.for_model(model, sizes)
        self._pages = tokens // self.runner.config.page_size

    def decode(self, rows: int, context: int) -> Callable[[], Any]:
        """Return a decode step of some rows, whose contexts end all over the last chunk."""
        which = self._placed(rows)
        ends = [context - 1 - 7 * row % EXACT_CHUNK for row in which]
        return lambda: self.runner.decode(which, ends)

    def prefill(self, rows: int, tokens: int) -> Callable[[], Any]:
        """Return a prefill of some rows from their start."""
        draw = random.Random(tokens)
        prompt = [draw.randrange(self.runner.vocabulary) for _ in range(tokens)]
        chunks = [Chunk(row, 0, prompt) for row in self._placed(rows)]
        return lambda: self.runner.prefill(chunks)

    def _placed(self, rows: int) -> list[int]:
        which = list(range(1, rows + 1))
        self.runner.clear_rows(which)
        for row in which:
            first = 1 + (row - 1) * self._pages
            self.runner.set_pages(row, range(first, first + self._pages))
        return which


def compared(steps: dict[str, Callable[[], Any]], clock: Clock, turns: int) -> dict[str, float]:
    """Run the modes' steps in turns. Print and return the medians in ms; print their ratio."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 2):
        for name, step in steps.items():
            taken = 1e3 * clock.seconds(step)
            if turn > 1:  # the first compile and capture
                times[name].append(taken)
    found = {name: round(statistics.median(times[name]), 3) for name in MODES}
    shown = "   ".join(f"{name} {found[name]:8.3f} ms" for name in MODES)
    print(f"{shown}   {found['exact'] / found['normal']:.2f} times", flush=True)
    return found


def mixed(model: Any, requests: int, rows: int, tokens: int, longest: int) -> dict[str, float]:
    """Return output tokens per second of each mode on mixed requests, in the second run."""
    draw = random.Random(0)
    vocabulary = model.config.vocab_size
    prompts = [
        [draw.randrange(vocabulary) for _ in range(draw.randint(longest // 16, longest))]
        for _ in range(requests)
    ]
    params = [
        SamplingParams(max_new_tokens=draw.randint(longest // 4, longest), stop_tokens=())
        for _ in prompts
    ]
    asked = sum(one.max_new_tokens for one in params)
    rates = {}
    for name, exact in MODES.items():
        sizes = PagedConfig(exact=exact, max_sequences=rows, max_tokens=rows * tokens)
        with Engine(model, config=sizes, warmup="lazy") as engine:
            for _ in range(2):
                started = time.perf_counter()
                answers(engine, prompts, params)
                rates[name] = asked / (time.perf_counter() - started)
                engine.forget_prefixes()
    return rates


def main() -> None:
    """Measure, and print a line per shape. Raises GranitePagedError."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    add_model_options(parser)
    parser.add_argument("--turns", type=int, default=30, help="timed calls per mode and shape")
    parser.add_argument("--most", type=int, default=2048, help="leave out shapes of more tokens")
    parser.add_argument("--requests", type=int, default=512, help="mixed requests; 0: none")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write to its file of this GPU")
    options = parser.parse_args()
    for name, least in (("turns", 1), ("most", LEAST), ("requests", 0)):
        if getattr(options, name) < least:
            raise InvalidArgument(f"--{name} must be {least} or more, got {getattr(options, name)}")
    file = device_file(options.out, options.device) if options.out else None
    loaded = loaded_model(options)
    settings = {name: getattr(options, name) for name in ("turns", "most", "requests")}
    found = {"settings": settings, **measured(loaded.model, **settings)}
    if file is not None:
        add_entry(file, loaded, "exact_cost", found)
        print(f"written: {file}")


def measured(model: Any, turns: int, most: int, requests: int) -> dict[str, dict[str, Any]]:
    """Measure steps of at most `most` tokens, and mixed requests; print and return the numbers."""
    found = dict[str, dict[str, Any]]()
    decodes = [(rows, context) for rows, context in DECODES if rows * LEAST <= most]
    prefills = [(rows, tokens) for rows, tokens in PREFILLS if rows * tokens <= most]
    modes = {
        name: Mode(model, max(rows for rows, _ in decodes + prefills), 2048, exact=exact)
        for name, exact in MODES.items()
    }
    for kind, shapes in (("decode", decodes), ("prefill", prefills)):
        for rows, tokens in shapes:
            print(f"{kind} {rows} x {tokens}".ljust(20), end="", flush=True)
            steps = {name: getattr(mode, kind)(rows, tokens) for name, mode in modes.items()}
            medians = compared(steps, Clock(model.device), turns)
            found.setdefault(f"{kind}_ms", {})[f"{rows} x {tokens}"] = medians
    for mode in modes.values():
        mode.runner.close()
    if requests:
        rates = mixed(model, requests, 128, 1024, min(512, most))
        share = rates["exact"] / rates["normal"]
        shown = "   ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        print(f"{requests} mixed requests   {shown} tokens per second   {share:.0%}")
        found["mixed_tokens_per_second"] = {name: round(rate) for name, rate in rates.items()}
    return found


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
