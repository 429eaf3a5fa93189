"""One benchmark run on one model: all cases, their shapes, and the modes side by side."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch

from granite_paged.bench.capacity import padded_capacity, paged_capacity
from granite_paged.bench.cases import BenchCase, Kind, Shape, chosen_cases
from granite_paged.bench.coldstart import in_fresh_processes
from granite_paged.bench.conditions import Reading, read_conditions
from granite_paged.bench.kernel import KernelCase, time_kernels
from granite_paged.bench.measure import (
    FAILURES,
    Clock,
    Prepared,
    Repeats,
    Samples,
    interleaved,
    level_workspaces,
    reason,
    release_cached_memory,
    released,
)
from granite_paged.bench.modes import make_mode
from granite_paged.bench.profiler import Profile, profile_step
from granite_paged.bench.roofline import ModelSizes, measure_rates
from granite_paged.bench.served import prepare_batches, prepare_engine
from granite_paged.device import device_name, dtype_name
from granite_paged.environment import mamba_kernels, versions
from granite_paged.errors import InvalidArgument
from granite_paged.geometry import CacheGeometry, PagedConfig
from granite_paged.models import LoadedModel
from granite_paged.names import BASELINES, MAMBA_REFERENCE
from granite_paged.progress import Progress, silent
from granite_paged.report.bench_results import WITH_MAMBA_SSM, Latency, Rates, Result, Row

_WARM_UP = 3  # torch.compile records CUDA graphs in the second call, replays from the third
_CPU_BUDGET = 2**30  # bytes to fill in the memory case, without a GPU
_BUDGET_FRACTION = 0.5  # part of a GPU's memory to fill in the memory case

ROUNDS, NEW_ROUNDS = 20, 4
"""Rounds in which a GPU's rates are measured, and how many of them are new at each measurement."""

_SKIPPED = "not measured: the budget"
_ALONE = "timed alone: it did not fit with the other modes"


@dataclass(slots=True)
class Measured:
    """What was measured of one mode in one shape.

    `held` is what its step keeps allocated, and `reading` what the driver said after the last step.
    """

    samples: Samples = field(default_factory=Samples)
    peak_bytes: int | None = None
    note: str = ""
    held: int = 0
    reading: Reading = field(default_factory=Reading)


class Session:
    """A model on its device, with the settings to measure it.

    Args:
        loaded: the model; not patched.
        config: for the paged mode; rows and pages are sized for each shape.
        seed: draws prompts and lengths.
        repeats: how often each step is timed.
        fresh_arguments: command line options that load the same model in another process.

    `weights` and `workspace` are the bytes of the model and of the matrix library's workspace.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: PagedConfig,
        *,
        seed: int = 0,
        repeats: Repeats | None = None,
        fresh_arguments: Sequence[str] = (),
    ) -> None:
        self.model = loaded.model
        self.name = loaded.name
        self.config = config
        self.seed = seed
        self.repeats = repeats or Repeats()
        self.clock = Clock(torch.device(self.model.device))
        self._rounds: deque[Rates] = deque(maxlen=ROUNDS if self.clock.gpu else 1)
        self.measure_rates()
        self.sizes = ModelSizes.of(self.model)
        self._fresh_arguments = tuple(fresh_arguments)
        self.level_workspaces()
        self.weights = self.clock.allocated() - self.workspace

    def level_workspaces(self) -> None:
        """See `measure.level_workspaces`. Call this while no step is ready."""
        self.workspace = level_workspaces(self.clock.device)
        self._own_workspace = False  # whether a step has run on a stream of its own since

    def measure_rates(self) -> None:
        """Measure the device's rates again, which set the floor: the medians of the last rounds.

        One round strays by a per cent, because a GPU that multiplies is limited by its power.
        """
        full = len(self._rounds) == self._rounds.maxlen
        for _ in range(NEW_ROUNDS if full else self._rounds.maxlen or 1):
            self._rounds.append(measure_rates(self.clock.device, self.model.dtype))
        self.rates = Rates(
            median(rates.bytes_per_second for rates in self._rounds),
            median(rates.flops_per_second for rates in self._rounds),
        )

    @property
    def device_name(self) -> str:
        """Name of the device, as its driver reports it."""
        return device_name(self.clock.device)

    def result(self, rows: list[Row]) -> Result:
        """Return the rows with the device, model and versions that they belong to."""
        return Result(
            device=self.device_name,
            model=self.name,
            dtype=dtype_name(self.model.dtype),
            versions=versions(),
            seed=self.seed,
            rates=self.rates,
            rows=rows,
        )

    def floor(self, case: BenchCase, shape: Shape) -> float | None:
        """Return the shortest time of a step in seconds; None for a case without model steps."""
        work = case.work(self.sizes, shape)
        return work.seconds(self.rates) if work else None

    # -- rows -----------------------------------------------------------------------------------

    def rows(self, case: BenchCase, shape: Shape, modes: Sequence[str]) -> list[Row]:
        """Measure one shape of a case in each of `modes` that can run it."""
        chosen = case.able(modes)
        if case.kind == "kernel":
            return [self._kernel_row(case, shape) for _ in chosen]
        if case.kind == "memory":
            return [self._capacity_row(case, shape, mode) for mode in chosen]
        if case.kind == "coldstart":
            return self._coldstart_rows(case, shape) if chosen else []
        measured = self.measure(case, shape, chosen)
        return [self.row(case, shape, mode, part) for mode, part in measured.items()]

    def row(self, case: BenchCase, shape: Shape, mode: str, part: Measured) -> Row:
        """Return a measured mode as a row; transformers' modes say what ran the Mamba layers."""
        floor = self.floor(case, shape)
        floor_ms = None if floor is None else 1e3 * floor
        base = Row(case.name, mode, *shape[:2], floor_ms=floor_ms, error=part.samples.error)
        if mode in BASELINES and self.sizes.state_bytes:
            base = replace(base, mamba=mamba_kernels(), variant=self._mamba_variant(mode))
        if base.error:
            return base
        latency = part.samples.latency()
        return replace(
            base,
            latency_ms=latency,
            tokens_per_second=1e3 * case.step_tokens(shape) / latency.median,
            peak_bytes=part.peak_bytes,
            note=part.note,
            clock_mhz=part.reading.clock_mhz,
            busy=part.reading.busy,
        )

    def _mamba_variant(self, mode: str) -> str:
        """Return the variant of the rows of a mode that runs model steps here."""
        reference = mamba_kernels() == MAMBA_REFERENCE or not self.sizes.state_bytes
        return "" if reference or mode not in BASELINES else WITH_MAMBA_SSM

    def has_row(self, result: Result, case: BenchCase, shape: Shape, mode: str) -> bool:
        """Whether the result has what this session would measure; a skipped shape is missing."""
        variants = {shape.variant} if case.kind == "kernel" else {self._mamba_variant(mode)}
        return any(
            (row.case, row.mode, row.context) == (case.name, mode, shape.context)
            and not row.error.startswith(_SKIPPED)
            and (case.kind in ("memory", "coldstart") or row.variant in variants)
            and (case.kind == "memory" or row.batch == shape.batch)
            for row in result.rows
        )

    def _kernel_row(self, case: BenchCase, shape: Shape) -> Row:
        base = Row(case.name, "paged", *shape[:2], variant=shape.variant)
        before = self.clock.allocated()
        try:
            kernels = KernelCase(self.model, self.config, shape, self.seed, self.clock.device)
            times = time_kernels(kernels, self.clock, self.repeats)
            peak = self.clock.peak(kernels.paged)
        except FAILURES as error:
            return replace(base, error=reason(error))
        latency = times.paged.latency()
        return replace(
            base,
            latency_ms=latency,
            tokens_per_second=1e3 * case.step_tokens(shape) / latency.median,
            peak_bytes=None if peak is None else peak - before,
            floor_us=1e6 * times.kv_bytes / self.rates.bytes_per_second,
            sdpa_us=1e3 * times.sdpa.latency().median,
            paged_us=1e3 * latency.median,
            note="one layer; peak without weights",
        )

    def _capacity_row(self, case: BenchCase, shape: Shape, mode: str) -> Row:
        budget, longest = _CPU_BUDGET, shape.context
        if self.clock.gpu:
            total = torch.cuda.get_device_properties(self.clock.device).total_memory
            budget = int(_BUDGET_FRACTION * total)
        if mode == "paged":
            geometry = CacheGeometry.from_config(
                self.model.config, page_size=self.config.page_size, dtype=self.model.dtype
            )
            fits = paged_capacity(geometry, self.sizes, budget, longest=longest, seed=self.seed)
        else:
            fits = padded_capacity(self.sizes, budget, longest=longest)
        return Row(
            case.name,
            mode,
            fits.sequences,
            longest,
            peak_bytes=fits.bytes,
            variant=shape.variant,
            note=f"sequences that fit {budget / 1e9:.1f} GB, Mamba states included; counted",
        )

    def _coldstart_rows(self, case: BenchCase, shape: Shape) -> list[Row]:
        base = Row(case.name, "paged", *shape[:2])
        context = ("--context", str(shape.context))
        try:
            stages = list(in_fresh_processes((*self._fresh_arguments, *context)))
        except FAILURES as error:
            return [replace(base, error=reason(error))]
        return [
            replace(base, variant=stage, latency_ms=Latency(1e3 * seconds, n=1))
            for stage, seconds in stages
        ]

    # -- steps ----------------------------------------------------------------------------------

    def measure(
        self, case: BenchCase, shape: Shape, modes: Sequence[str], repeats: Repeats | None = None
    ) -> dict[str, Measured]:
        """Time the modes side by side; time a mode alone if it does not fit with the others."""
        repeats = repeats or self.repeats
        together = self._side_by_side(case, shape, modes, repeats)
        out_of_memory = [m for m in modes if "OutOfMemory" in together[m].samples.error]
        if len(modes) > 1:
            for mode in out_of_memory:
                alone = self._side_by_side(case, shape, [mode], repeats)[mode]
                alone.note = f"{_ALONE}; {alone.note}" if alone.note else _ALONE
                together[mode] = alone
        return together

    def _side_by_side(
        self, case: BenchCase, shape: Shape, modes: Sequence[str], repeats: Repeats
    ) -> dict[str, Measured]:
        measured = {mode: Measured() for mode in modes}
        steps: dict[str, Prepared] = {}
        self.level_workspaces()
        with released(steps, self.clock.device):
            for mode in modes:
                try:
                    steps[mode] = self.ready(case, shape, mode, measured[mode])
                except FAILURES as error:
                    measured[mode].samples.error = reason(error)
                release_cached_memory(self.clock.device)
            for mode, samples in interleaved(steps, self.clock, repeats).items():
                measured[mode].samples = samples
            reading = read_conditions(self.clock.device)
            for part in measured.values():
                part.reading = reading
        return measured

    def ready(self, case: BenchCase, shape: Shape, mode: str, measured: Measured) -> Prepared:
        """Prepare a step, warm it up, and record its peak without what other steps hold.

        One workspace of the matrix library counts. Steps with a stream of their own share one.
        """
        before = self.clock.allocated()
        prepared = self._prepared(case.kind, shape, mode)
        if prepared.own_workspace and self._own_workspace:
            before -= self.workspace  # an earlier step allocated it
        others = before - self.weights
        try:
            slow = case.kind == "serve" and mode in BASELINES  # a run has many warm steps
            for _ in range(1 if slow else _WARM_UP):
                prepared.step()
                self.clock.wait()
                prepared.reset()
            peak = self.clock.peak(prepared.step)
            prepared.reset()
        except BaseException:
            prepared.release()
            raise
        if prepared.own_workspace:
            self._own_workspace = True
        else:
            others -= self.workspace
        measured.peak_bytes = None if peak is None else peak - others
        measured.note = prepared.note
        measured.held = self.clock.allocated() - before
        return prepared

    def profile(
        self,
        kind: Kind,
        shape: Shape,
        mode: str,
        folder: Path,
        *,
        name: str = "",
        memory: bool = False,
    ) -> Profile:
        """Profile a step of one shape in one mode; see `profile_step`."""
        name = name or f"{kind}-{mode}-{shape.batch}x{shape.context}"
        prepared = self._prepared(kind, shape, mode)
        with released({mode: prepared}, self.clock.device):
            return profile_step(prepared, self.model, self.clock, folder, name, memory=memory)

    def _prepared(self, kind: Kind, shape: Shape, mode: str) -> Prepared:
        if kind == "serve":
            if mode == "paged":
                return prepare_engine(self.model, self.config, shape, self.seed)
            return prepare_batches(self.model, shape, self.seed, static=mode == "static")
        if kind != "kernel":
            return make_mode(mode, self.model, self.config, self.seed).prepare(kind, shape)
        kernels = KernelCase(self.model, self.config, shape, self.seed, self.clock.device)
        return Prepared(torch.inference_mode()(kernels.paged))


# -- a whole run --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """Shapes to run, in order; no shape starts after `budget` seconds.

    No modes mean those that each case runs without being asked.
    """

    shapes: list[tuple[BenchCase, Shape]]
    modes: tuple[str, ...]
    budget: float | None = None


def make_plan(
    session: Session,
    cases: Sequence[str],
    modes: Sequence[str],
    *,
    quick: bool = False,
    batches: Sequence[int] = (),
    contexts: Sequence[int] = (),
    budget: float | None = None,
) -> BenchPlan:
    """Choose the shapes of a run for the session's device; `quick` chooses fewer.

    No names of cases mean all; no modes mean those that run without being asked. `batches` and
    `contexts` (tokens per sequence) replace the cases' own. No shape starts after `budget` seconds.

    Raises:
        InvalidArgument: a case is unknown, or none of the named modes can run it.
    """
    chosen = tuple(modes)
    for case in chosen_cases(cases) if cases else ():
        if not case.able(chosen):
            able, got = ", ".join(case.modes), ", ".join(chosen)
            raise InvalidArgument(f"case {case.name} runs in mode {able} only, got {got}")
    how = {"gpu": session.clock.gpu, "quick": quick}
    shapes = [
        (case, shape)
        for case in chosen_cases(cases)
        for shape in case.choose(**how, batches=batches, contexts=contexts)
    ]
    return BenchPlan(shapes, chosen, budget)


def missing_from(result: Result, session: Session, plan: BenchPlan) -> BenchPlan:
    """Return the plan without the shapes that the result has in every mode that can run them."""
    shapes = [
        (case, shape)
        for case, shape in plan.shapes
        if not all(session.has_row(result, case, shape, mode) for mode in case.able(plan.modes))
    ]
    return replace(plan, shapes=shapes)


def run(session: Session, plan: BenchPlan, progress: Progress = silent) -> Iterator[Row]:
    """Measure the plan's shapes, and yield each row as soon as it is measured.

    Shapes that the budget leaves no time for get a row that says so.
    """
    begin = time.perf_counter()
    for done, (case, shape) in enumerate(plan.shapes):
        progress(describe(case, shape), done, len(plan.shapes))
        spent = time.perf_counter() - begin
        if plan.budget is not None and spent > plan.budget:
            skipped = Measured(Samples(error=f"{_SKIPPED} of {plan.budget:g} s was spent"))
            for mode in case.able(plan.modes):
                row = session.row(case, shape, mode, skipped)
                yield replace(row, variant=row.variant or shape.variant)
        else:
            yield from session.rows(case, shape, plan.modes)


def first_steps(plan: BenchPlan) -> Iterator[tuple[BenchCase, Shape, str]]:
    """Yield the first shape of each case with repeatable steps, in each mode that can run it."""
    seen: set[str] = set()
    for case, shape in plan.shapes:
        if case.kind in ("prefill", "decode", "kernel") and case.name not in seen:
            seen.add(case.name)
            yield from ((case, shape, mode) for mode in case.able(plan.modes))


def describe(case: BenchCase, shape: Shape) -> str:
    """Return a short description of a shape."""
    return f"{case.name} {shape.batch} x {shape.context} {shape.variant}".strip()
