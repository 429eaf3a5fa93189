"""Tuning: which constants of the rules of kernel options are best on this GPU?

A group is constants that are chosen together, and shapes that they are chosen by: decode attention
of one batch at several contexts, one kind of product in a decode step. Every candidate is timed in
every shape of its group. Its loss in a shape is how much longer it takes there than the
best candidate does; chosen is the candidate whose worst loss is least. The constants that are there
stay unless another's worst loss is smaller by more than the noise, so that files do not change for
nothing. A candidate that a compiler refuses, or that does not fit, is out.
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
"""Of a time: medians of replays repeat to about this."""

Layout = dict[str, Any]
"""What a rule makes of constants in one shape: splits, block sizes, warps, stages."""

Timer = Callable[[Layout], float]
"""Seconds of one call laid out like that."""


@dataclass(frozen=True, slots=True)
class TunedShape:
    """One shape.

    Attributes:
        name: for people, and for `Tuned.microseconds`.
        layout: the rule.
        prepare: makes the tensors, which live as long as the timer.
    """

    name: str
    layout: Callable[[Any], Layout]
    prepare: Callable[[], Timer]


@dataclass(frozen=True, slots=True)
class Group:
    """Constants that are chosen together.

    Attributes:
        candidates: the first is what the rule has now.
        shapes: that they are chosen by.
        noise: of a time, relative.
        settle: told which candidate was chosen, before the next group is swept.
    """

    candidates: tuple[Constants, ...]
    shapes: tuple[TunedShape, ...]
    noise: float = NOISE
    settle: Callable[[Constants], None] = lambda chosen: None

    @property
    def trials(self) -> int:
        """How many there are to make."""
        return len(self.candidates) * len(self.shapes)


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate in one shape: microseconds of a call, or why there are none."""

    layout: Layout
    microseconds: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a group.

    Attributes:
        candidates: of the group.
        trials: shape -> a trial for each candidate.
        chosen: which candidate.
    """

    candidates: tuple[Constants, ...]
    trials: dict[str, list[Trial]]
    chosen: int

    @property
    def skipped(self) -> int:
        """Trials that came to nothing."""
        return sum(trial.microseconds is None for line in self.trials.values() for trial in line)

    def loss(self, shape: str) -> float:
        """Of the rule's own choice, in a shape."""
        return losses(self.trials[shape])[0]

    def best(self, shape: str) -> Trial:
        """The fastest in a shape."""
        return self.trials[shape][losses(self.trials[shape]).index(0.0)]

    def worst(self, candidate: int = 0) -> float:
        """The largest loss of a candidate; the rule's own where none is named."""
        return max(losses(line)[candidate] for line in self.trials.values())

    def to_json(self) -> dict[str, Any]:
        """Every trial."""
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
    """Of each candidate in one shape: 0 for the fastest, 0.1 for ten per cent longer.

    Infinite where a candidate does not run, for all of them where none does.
    """
    times = [math.inf if t.microseconds is None else t.microseconds for t in trials]
    best = min(times)
    return [time / best - 1 if time < math.inf else math.inf for time in times]


def choose(trials: Iterable[Sequence[Trial]], noise: float = NOISE) -> int:
    """The candidate whose worst loss over the shapes is least; 0, the rule's, within `noise`."""
    worst = [max(of_one) for of_one in zip(*map(losses, trials), strict=True)]
    least = min(range(len(worst)), key=worst.__getitem__)
    return least if worst[0] > worst[least] + noise else 0


def retuned(tuned: Tuned, outcomes: Sequence[Outcome], environment: dict[str, str]) -> Tuned:
    """The constants with those chosen in place; what was not tried stays as it was.

    environment: device, torch and triton, as in `Tuned`.
    """
    for outcome in outcomes:
        tuned = tuned.having(outcome.candidates[outcome.chosen])
    microseconds = {**_kept(tuned, environment), **_microseconds(outcomes)}
    where: dict[str, Any] = {**environment, "microseconds": microseconds}
    return replace(tuned, **where)


def _kept(tuned: Tuned, environment: dict[str, str]) -> dict[str, float]:
    """Earlier times, where they are of the same device and versions."""
    same = all(getattr(tuned, name) == value for name, value in environment.items())
    return tuned.microseconds if same else {}


def _microseconds(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of the chosen constants, shape by shape."""
    found = {}
    for outcome in outcomes:
        for shape, line in outcome.trials.items():
            time = line[outcome.chosen].microseconds
            assert time is not None
            found[shape] = round(time, 2)
    return found


# -- a sweep ------------------------------------------------------------------------------------


def sweep_all(groups: Sequence[Group], progress: Progress = silent) -> list[Outcome]:
    """Sweep each group, and report progress in trials. Raises CannotJudge, as `sweep` does."""
    total, done = sum(group.trials for group in groups), itertools.count()
    return [sweep(group, lambda shape: progress(shape, next(done), total)) for group in groups]


@torch.inference_mode()
def sweep(group: Group, on_trial: Callable[[str], None] = lambda shape: None) -> Outcome:
    """Time every candidate in every shape; call `on_trial` with the shape before each trial.

    Raises:
        CannotJudge: if the rule's own choice does not run.
    """
    trials = {shape.name: _try_all(shape, group.candidates, on_trial) for shape in group.shapes}
    for name, (rule, *_) in trials.items():
        if rule.microseconds is None:
            raise CannotJudge(f"what the rule says for {name} does not run here: {rule.error}")
    chosen = choose(trials.values(), group.noise)
    group.settle(group.candidates[chosen])
    return Outcome(group.candidates, trials, chosen)


def _try_all(
    shape: TunedShape, candidates: Sequence[Constants], on_trial: Callable[[str], None]
) -> list[Trial]:
    """In one shape; what the rule lays out alike is timed once."""
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
    except Exception as error:  # compilers have no common error; `sweep` judges the rule's own
        return Trial(layout, error=reason(error))
