"""An engine under random traffic for a long time: `python -m tests.helpers.soak 3600 --seed 1`.

::

    run      engine after engine, until the time is over
    engine   `ROUNDS` rounds; preempts by swap or by recompute; closed under open requests
    round    some of what `traffic.py` does; then all is answered and nothing may be held

After each round the garbage is collected, free memory is returned to the system, and memory is
looked at. It must be flat after the warm-up: no kind of object of the package and no tensor is
alive more often than in the warm-up, and the median resident size of the last third is at most
`FLAT` above that of the first third.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import statistics
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.helpers.traffic import Pool, Traffic, TrafficHarness, soaked_model

FLAT = 0.01
"""Most growth of the resident size after the warm-up, as a share."""

HOUR = 3600.0
ROUNDS = 3
WARM_UP = 0.25
"""Share of the time in which memory may still grow."""

LEAST = 9
"""Rounds of the shortest run: three of them warm up, and the rest make three windows."""

BOUNDED = {"granite_paged.runner.shapes"}
"""Modules whose objects are not counted: a cache of bounded size keeps them for the process."""

EVERY = 60.0
"""Seconds between two lines of progress, at least."""

SETTLE = 10.0
"""Seconds in which the thread of asynchronous streams ends after its last one."""

REQUIRED = (
    *("answers", "scored", "streams read", "finish stop", "finish length", "finish cancelled"),
    *("NonFiniteRequest", "TokenizerFailed", "CallbackFailed", "EngineClosed", "PromptError"),
    *("preempted by swap", "preempted by recompute", "restarted", "hits"),
)
"""What every run must reach."""

KINDS = (
    *("answers", "scored", "streams read", "hits", "preempted by rank", "preempted by swap"),
    *("preempted by recompute", "resumed", "restarted", "forks under pressure"),
    *("beams under pressure", "evicted while in use", "finish cancelled", "calls interrupted"),
    *("NonFiniteRequest", "TokenizerFailed", "CallbackFailed", "StepFailed", "EngineClosed"),
)


HELD = (
    *("waiting", "running", "rows_held", "pages_held", "pages_cached"),
    *("state_bytes", "swapped_bytes"),
)
"""Statistics that are 0 when nothing is held."""


class SoakFailed(AssertionError):
    """Something grew."""


@dataclass
class Memory:
    """What is alive after each round.

    Attributes:
        resident: bytes in memory, after each round of the run proper.
        most: of each type of the package, and of tensors, the most objects after a round of the
            warm-up.
    """

    resident: list[int] = field(default_factory=list)
    most: Counter[str] = field(default_factory=Counter)

    def warm_up(self) -> None:
        """Note what is alive after a round of the warm-up."""
        self.most |= alive()
        resident_bytes()

    def look(self) -> None:
        """Note the resident size, and check the numbers of objects."""
        grown = alive() - self.most
        if grown:
            raise SoakFailed(f"objects leak: alive above the warm-up's number are {dict(grown)}")
        self.resident.append(resident_bytes())

    @property
    def growth(self) -> float:
        """Return the growth of the median from the first third to the last, as a share."""
        third = max(1, len(self.resident) // 3)
        first, last = self.resident[:third], self.resident[-third:]
        return statistics.median(last) / statistics.median(first) - 1

    def check_flat(self) -> None:
        """Raise SoakFailed if the resident size grew."""
        if self.growth > FLAT:
            raise SoakFailed(f"memory grew by {self.growth:.1%}, at most {FLAT:.0%} is flat")


def alive() -> Counter[str]:
    """Return the number of live objects of each type of the package, and of tensors."""
    gc.collect()
    types = Counter(map(type, gc.get_objects()))
    return Counter(
        {
            f"{kind.__module__}.{kind.__qualname__}": count
            for kind, count in types.items()
            if kind is torch.Tensor or _is_ours(str(kind.__module__))
        }
    )


def _is_ours(module: str) -> bool:
    return module.startswith("granite_paged.") and module not in BOUNDED


def resident_bytes() -> int:
    """Return this process's resident size, after free memory was given back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


class Soak:
    """A run from a seed.

    Args:
        size: number of different requests to sample.
        progress: called with (seconds, line) after each engine.
    """

    def __init__(
        self, seed: int, size: int, progress: Callable[[float, str], None] = lambda *_: None
    ) -> None:
        self.met: Counter[str] = Counter()
        self.memory = Memory()
        self.rounds = self.engines = self.steps = 0
        self._chance = random.Random(seed)
        self._deck: list[str] = []
        self._model = soaked_model()
        self._pool = Pool(self._model, self._chance, size)
        self._progress = progress

    def run(self, seconds: float) -> None:
        """Run for a number of seconds, and at least `LEAST` rounds.

        Raises:
            AssertionError: for a wrong answer, anything held, or memory that grows.
        """
        started = time.monotonic()
        while (passed := time.monotonic() - started) < seconds or self.rounds < LEAST:
            is_warm = passed >= WARM_UP * seconds and self.rounds >= WARM_UP * LEAST
            look = self.memory.look if is_warm else self.memory.warm_up
            self.run_engine(look)
            self._progress(time.monotonic() - started, self.line())
        self.memory.check_flat()
        missed = [what for what in REQUIRED if not self.met[what]]
        assert not missed, f"the run never met {missed}"

    def run_engine(self, after_round: Callable[[], None]) -> None:
        """Run one engine, and close it while requests are open."""
        self.engines += 1
        preemption = ("swap", "recompute")[self.engines % 2]
        harness = TrafficHarness(self._pool, self._model, preemption)
        traffic = Traffic(harness, self._chance, self.met, self._deck)
        for number in range(1, ROUNDS + 1):
            traffic.run()
            if number < ROUNDS:
                harness.drain()
            else:
                traffic.sample()
                harness.close()
            check_nothing_held(harness)
            self.rounds += 1
            if number < ROUNDS:
                after_round()
        self.steps += harness.engine.stats().steps
        self.met += harness.met
        del harness, traffic
        after_round()

    def line(self) -> str:
        """Return the state of the run in one line."""
        faults = sum(count for what, count in self.met.items() if what.endswith("Failed"))
        memory = (
            f"{self.memory.resident[-1] / 1e6:.1f} MB" if self.memory.resident else "warming up"
        )
        return f"{self.met['answers']:,} answers, {faults:,} faults, {memory}"

    def table(self) -> list[tuple[str, str]]:
        """Return what the run did, as (what, number)."""
        rows: list[tuple[str, Any]] = [("rounds", self.rounds), ("engines", self.engines)]
        rows += [("steps", self.steps), *((kind, self.met[kind]) for kind in KINDS)]
        table = [(what, f"{count:,}") for what, count in rows]
        resident = self.memory.resident
        third = max(1, len(resident) // 3)
        for window, part in (("first", resident[:third]), ("last", resident[-third:])):
            table.append((f"MB resident, {window} third", f"{statistics.median(part) / 1e6:.1f}"))
        return [*table, ("growth of memory", f"{self.memory.growth:+.2%}")]


def check_nothing_held(harness: TrafficHarness) -> None:
    """Check that an engine without open requests holds no memory, and that its thread ended."""
    engine = harness.engine
    engine.check_valid()
    stats = engine.stats()
    held = {name: getattr(stats, name) for name in HELD if getattr(stats, name)}
    assert not held, f"the idle engine holds {held}"
    assert engine.idle, "the engine is not idle"
    limit = time.monotonic() + SETTLE
    while any(thread.name == "granite_paged streams" for thread in threading.enumerate()):
        assert time.monotonic() < limit, "the thread of streams does not end"
        time.sleep(0.01)


def main() -> int:
    """Run from the command line. Return the exit status."""
    parser = argparse.ArgumentParser(description="Soak the engine in random traffic.")
    parser.add_argument("seconds", type=float, nargs="?", default=HOUR)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"soak: {arguments.seconds:.0f} seconds from seed {arguments.seed}", flush=True)
    last = 0.0

    def progress(passed: float, line: str) -> None:
        nonlocal last
        if passed - last >= EVERY:
            last = passed
            print(f"{passed:6.0f} s  {line}", flush=True)

    soak = Soak(arguments.seed, 60, progress)
    try:
        soak.run(arguments.seconds)
    except Exception as error:
        traceback.print_exc()
        what = str(error).splitlines()[0] if str(error) else repr(error)
        print(
            f"soak: failed in round {soak.rounds + 1} of seed {arguments.seed}: {what}", flush=True
        )
        return 1
    for what, number in soak.table():
        print(f"{what:<28}{number:>12}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
