"""Search for the kernel constants that are fastest on this GPU.

A group holds constants that are chosen together and the shapes that decide: decode attention of
one batch size at several contexts, or one kind of matrix product in a decode step. Every candidate
is timed in every shape of its group. Its loss in a shape is its time relative to the fastest
candidate there, minus 1. The candidate with the smallest worst-case loss wins. The constants in
use stay unless the winner's worst-case loss is smaller by more than the noise, so that files do
not change without a reason. A candidate that does not compile, or does not fit, drops out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from granite_paged.bench.measure import reason
from granite_paged.errors import CannotJudge
from granite_paged.layers.tuning import Constants, Tuned
from granite_paged.progress import Progress, silent

NOISE = 0.02
"""Relative timing noise: medians of replays agree to about 2 %."""

Layout = dict[str, Any]
"""Kernel options for constants in one shape: splits, block sizes, warps, stages."""

Timer = Callable[[Layout], float]
"""Returns the seconds of one call with a layout."""


@dataclass(frozen=True, slots=True)
class TunedShape:
    """A shape in which candidates are timed.

    Attributes:
        name: shown to the user, and the key in `Tuned.microseconds`.
        layout: turns constants into kernel options.
        prepare: makes the tensors, which live as long as the timer.
    """

    name: str
    layout: Callable[[Any], Layout]
    prepare: Callable[[], Timer]


@dataclass(frozen=True, slots=True)
class Group:
    """Constants that are chosen together.

    Attributes:
        candidates: the first holds the constants in use.
        shapes: shapes that decide.
        noise: relative timing noise.
        settle: called with the chosen constants, before the next group is swept.
    """

    candidates: tuple[Constants, ...]
    shapes: tuple[TunedShape, ...]
    noise: float = NOISE
    settle: Callable[[Constants], None] = lambda chosen: None

    @property
    def trials(self) -> int:
        """Number of trials in a sweep."""
        return len(self.candidates) * len(self.shapes)


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate in one shape: microseconds per call, or why it did not run."""

    layout: Layout
    microseconds: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of sweeping a group.

    Attributes:
        candidates: the group's candidates.
        trials: name of a shape -> one trial per candidate.
        chosen: index of the chosen candidate.
    """

    candidates: tuple[Constants, ...]
    trials: dict[str, list[Trial]]
    chosen: int

    @property
    def skipped(self) -> int:
        """Number of trials that did not run."""
        return sum(trial.microseconds is None for line in self.trials.values() for trial in line)

    def loss(self, shape: str) -> float:
        """Return the loss of the constants in use, in one shape."""
        return losses(self.trials[shape])[0]

    def best(self, shape: str) -> Trial:
        """Return the fastest trial of a shape."""
        return self.trials[shape][losses(self.trials[shape]).index(0.0)]

    def worst(self, candidate: int = 0) -> float:
        """Return the largest loss of a candidate over the shapes; by default, of the one in use."""
        return max(losses(line)[candidate] for line in self.trials.values())

    def to_json(self) -> dict[str, Any]:
        """Return every trial as plain types."""
        return {
            "rule": asdict(self.candidates[0]),
            "chosen": asdict(self.candidates[self.chosen]),
            "shapes": {
                name: [
                    {"constants": asdict(constants), **asdict(trial)}
                    for constants, trial in zip(self.candidates, line, strict=True)
                ]
                for name, line in self.trials.items()
            },
        }


# -- choosing: pure functions of times ----------------------------------------------------------


def losses(trials: Sequence[Trial]) -> list[float]:
    """Return each candidate's loss in one shape: 0 for the fastest, 0.1 for 10 % longer.

    A candidate that did not run has an infinite loss.
    """
    times = [math.inf if t.microseconds is None else t.microseconds for t in trials]
    best = min(times)
    return [time / best - 1 if time < math.inf else math.inf for time in times]


def choose(trials: Iterable[Sequence[Trial]], noise: float = NOISE) -> int:
    """Return the index of the smallest worst-case loss; 0, the one in use, within `noise`."""
    worst = [max(of_one) for of_one in zip(*map(losses, trials), strict=True)]
    least = min(range(len(worst)), key=worst.__getitem__)
    return least if worst[0] > worst[least] + noise else 0


def retuned(tuned: Tuned, outcomes: Sequence[Outcome], environment: dict[str, str]) -> Tuned:
    """Return `tuned` with the chosen constants in place; others stay unchanged.

    `environment` names device, torch and triton, as in `Tuned`. Times of others are dropped.
    """
    for outcome in outcomes:
        tuned = tuned.having(outcome.candidates[outcome.chosen])
    same = all(getattr(tuned, name) == value for name, value in environment.items())
    microseconds = dict(tuned.microseconds) if same else {}
    for outcome in outcomes:
        for shape, line in outcome.trials.items():
            time = line[outcome.chosen].microseconds
            assert time is not None
            microseconds[shape] = round(time, 2)
    where: dict[str, Any] = {**environment, "microseconds": microseconds}
    return replace(tuned, **where)


# -- a sweep ------------------------------------------------------------------------------------


def sweep_all(groups: Sequence[Group], progress: Progress = silent) -> list[Outcome]:
    """Sweep each group, and report progress in trials. Raises CannotJudge, as `sweep` does."""
    total, done = sum(group.trials for group in groups), itertools.count()
    return [sweep(group, lambda shape: progress(shape, next(done), total)) for group in groups]


@torch.inference_mode()
def sweep(group: Group, on_trial: Callable[[str], None] = lambda shape: None) -> Outcome:
    """Time every candidate in every shape; call `on_trial` with the shape before each trial.

    Raises:
        CannotJudge: the constants in use do not run.
    """
    trials = {shape.name: _try_all(shape, group.candidates, on_trial) for shape in group.shapes}
    for name, (in_use, *_) in trials.items():
        if in_use.microseconds is None:
            raise CannotJudge(f"the constants in use for {name} do not run here: {in_use.error}")
    chosen = choose(trials.values(), group.noise)
    group.settle(group.candidates[chosen])
    return Outcome(group.candidates, trials, chosen)


def _try_all(
    shape: TunedShape, candidates: Sequence[Constants], on_trial: Callable[[str], None]
) -> list[Trial]:
    """Time the candidates in one shape; those with equal layouts are timed once."""
    timer, known, trials = shape.prepare(), {}, []
    for constants in candidates:
        on_trial(shape.name)
        layout = shape.layout(constants)
        key = tuple(layout.items())
        if key not in known:
            known[key] = _try(timer, layout)
        trials.append(known[key])
    return trials


def _try(timer: Timer, layout: Layout) -> Trial:
    try:
        return Trial(layout, 1e6 * timer(layout))
    except Exception as error:  # compilers share no base class; `sweep` checks the constants in use
        return Trial(layout, error=reason(error))
