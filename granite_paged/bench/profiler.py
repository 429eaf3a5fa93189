"""Where the time of one step goes: a trace for Perfetto, and kernels by kind of layer.

A kernel belongs to the layer whose module launched it, where there are modules to see (eager
modes). Replayed from a CUDA graph or compiled, it has only its name, and `KERNEL_RULES` decide: the
first rule whose pattern is found in the name. Products of matrices run in every kind of layer under
the same names, so by name alone they are `matmul`.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function

from granite_paged.bench.measure import Clock, Prepared
from granite_paged.errors import DeviceError
from granite_paged.report.bench_results import writable_folder

KERNEL_RULES: tuple[tuple[str, str], ...] = (
    ("attention", r"^_(write_pages|split_pages)$"),
    ("mamba", r"^_(step|pass_on|store_ring|convolve|chunk_states|chunk_outputs)$"),
    ("matmul", r"^_(few_rows|one_row)$"),
    ("head", r"^_(embed|write_argmax)$"),
    ("attention", r"flex|attention|flash|fmha|sdpa|_attn|(?<!log)_softmax|modindex"),
    (
        "mamba",
        r"mamba|ssm|ssd|selective|chunk_state|scan|cumsum|conv(?!ert)"
        r"|softplus|_exp(?![a-z])|tri[lu]",
    ),
    ("norm", r"norm|rsqrt|mean"),
    ("mlp", r"mlp|swiglu|moe|expert|grouped_mm|topk"),
    ("head", r"embedding|lm_head|argmax|logits|log_softmax"),
    ("matmul", r"gemm|gemv|cutlass|nvjet|cublas|xmma|addmm|\bmm\b|bmm|matmul|splitk"),
    ("mlp", r"silu"),
)
"""Kind and pattern, first found wins. Our own kernels are known by their names; Inductor calls its
kernels after what they fused: a Mamba state's update says softplus or exp, a norm rsqrt."""

MODULE_RULES: tuple[tuple[str, str], ...] = (
    ("mamba", r"\.mamba$"),
    ("attention", r"\.self_attn$"),
    ("mlp", r"\.(shared_mlp|block_sparse_moe)$"),
    ("norm", r"(layer)?norm$"),
    ("head", r"lm_head$|embed_tokens$"),
)
"""Kind of a module by its name in a `GraniteMoeHybridForCausalLM`."""

_WARM_UP = 3
_RANGE = "layer kind: "  # what the ranges of modules are called in the trace


@dataclass(frozen=True, slots=True)
class KernelCost:
    """All launches of one kernel for one kind of layer."""

    kind: str
    name: str
    calls: int
    microseconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One profiled step.

    Attributes:
        trace: Chrome trace, for https://ui.perfetto.dev.
        snapshot: memory snapshot, for https://pytorch.org/memory_viz; None where not taken.
        kernels: costliest first.
    """

    trace: str
    snapshot: str | None
    kernels: list[KernelCost]

    def by_kind(self) -> list[tuple[str, float]]:
        """Microseconds of each kind of layer, most first."""
        sums: defaultdict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            sums[kernel.kind] += kernel.microseconds
        return sorted(sums.items(), key=lambda item: -item[1])

    def to_json(self) -> dict[str, Any]:
        """Plain types only."""
        return {**asdict(self), "kinds": dict(self.by_kind())}


def profile_step(
    prepared: Prepared,
    model: Any,
    clock: Clock,
    folder: Path,
    name: str,
    *,
    steps: int = 3,
    memory: bool = False,
) -> Profile:
    """Profile some steps and write `<name>.trace.json`, and `<name>.memory.pickle` if asked for.

    Raises:
        DeviceError: for a memory snapshot without a GPU.
        CannotWrite: for a folder that cannot be written.
    """
    if memory and not clock.gpu:
        raise DeviceError("a memory snapshot shows CUDA memory: leave --memory out here")
    folder = writable_folder(folder)
    trace = folder / f"{name}.trace.json"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if clock.gpu else [])]
    snapshot = folder / f"{name}.memory.pickle" if memory else None
    with _memory_history(snapshot), layer_ranges(model):
        for _ in range(_WARM_UP):  # the hooks are new to whatever was warm
            _play(prepared, clock)
        with profile(activities=activities) as recorded:
            for _ in range(steps):
                _play(prepared, clock)
    recorded.export_chrome_trace(str(trace))
    kernels = kernel_costs(recorded.events() or (), steps=steps, gpu=clock.gpu)
    return Profile(str(trace), None if snapshot is None else str(snapshot), kernels)


def _play(prepared: Prepared, clock: Clock) -> None:
    prepared.reset()
    prepared.step()
    clock.wait()


@contextlib.contextmanager
def _memory_history(snapshot: Path | None) -> Iterator[None]:
    if snapshot is None:
        yield
        return
    memory: Any = torch.cuda.memory
    memory._record_memory_history()
    try:
        yield
        memory._dump_snapshot(str(snapshot))
    finally:
        memory._record_memory_history(enabled=None)


@contextlib.contextmanager
def layer_ranges(model: Any) -> Iterator[None]:
    """Name what modules launch after their kind of layer, for as long as this lasts."""
    hooks: list[Any] = []
    for name, module in model.named_modules():
        kind = module_kind(name)
        if kind is not None:
            hooks += _ranged(module, kind)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _ranged(module: torch.nn.Module, kind: str) -> list[Any]:
    open_ranges: list[Any] = []

    def begin(*_: Any) -> None:
        if not torch.compiler.is_compiling():
            open_ranges.append(record_function(f"{_RANGE}{kind}"))
            open_ranges[-1].__enter__()

    def end(*_: Any) -> None:
        if open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def module_kind(name: str) -> str | None:
    """Kind of a module by its name; None for those that hold others, or do nothing."""
    return next((kind for kind, pattern in MODULE_RULES if re.search(pattern, name)), None)


def kernel_kind(name: str) -> str:
    """Kind of a kernel by its name alone."""
    found = (kind for kind, pattern in KERNEL_RULES if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def kernel_costs(events: Iterable[Any], *, steps: int, gpu: bool) -> list[KernelCost]:
    """Sum a profiler's events by kernel and kind of layer, a step; costliest first."""
    times = _device_times(list(events)) if gpu else _host_times(events)
    costs = [
        KernelCost(kind, name, max(1, len(each) // steps), sum(each) / steps)
        for (kind, name), each in times.items()
        if each
    ]
    return sorted(costs, key=lambda cost: -cost.microseconds)


Times = dict[tuple[str, str], list[float]]
"""Microseconds of every launch, by kind of layer and kernel."""


def _device_times(events: list[Any]) -> Times:
    """Kernels by the module around their launch, the others by their names.

    What was not launched by an operator of torch, as from a CUDA graph, hangs on no host event: so
    all of the device's own events are taken, less those that a module accounts for.
    """
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    accounted: Counter[str] = Counter()
    for event in events:
        kind = _enclosing_kind(event)
        for kernel in event.kernels if kind and not event.is_user_annotation else ():
            times[str(kind), kernel.name].append(float(kernel.duration))
            accounted[kernel.name] += 1
    for event in events:
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        if accounted[event.name]:
            accounted[event.name] -= 1
        else:
            times[kernel_kind(event.name), event.name].append(event.time_range.elapsed_us())
    return times


def _host_times(events: Iterable[Any]) -> Times:
    """Operations on the CPU, each without those that it calls."""
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if not event.name.startswith(_RANGE) and event.self_cpu_time_total > 0:
            kind = _enclosing_kind(event) or kernel_kind(event.name)
            times[kind, event.name].append(float(event.self_cpu_time_total))
    return times


def _enclosing_kind(event: Any) -> str | None:
    """Kind of the innermost range around an event."""
    while event is not None:
        if event.name.startswith(_RANGE):
            return str(event.name.removeprefix(_RANGE))
        event = event.cpu_parent
    return None
