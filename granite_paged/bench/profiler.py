"""Profile one step: a trace for Perfetto, and kernels by kind of layer.

In eager modes, a kernel belongs to the layer whose module launched it. A kernel that is compiled
or replayed from a CUDA graph has only its name: the first of `KERNEL_RULES` whose pattern occurs
in it decides. Matrix products have the same names in every kind of layer, so by name they are
`matmul`.
"""

from __future__ import annotations

import contextlib
import os
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
    ("attention", r"^_(write_pages|list_blocks|list_parts|combine|attend)$"),
    (
        "mamba",
        r"^_(step|pass_on|store_ring|convolve|chunk_states|chunk_outputs|lines|keep|close)$",
    ),
    ("matmul", r"^_(few_rows|one_row|product)$"),
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
"""Kind and pattern; the first match wins. Our kernels are listed by name. Inductor names kernels
after the operations that they fuse: a Mamba state update has softplus or exp, a norm has rsqrt."""

MODULE_RULES: tuple[tuple[str, str], ...] = (
    ("mamba", r"\.mamba$"),
    ("attention", r"\.self_attn$"),
    ("mlp", r"\.(shared_mlp|block_sparse_moe)$"),
    ("norm", r"(layer)?norm$"),
    ("head", r"lm_head$|embed_tokens$"),
)
"""Kind and pattern of module names in a `GraniteMoeHybridForCausalLM`."""

_WARM_UP = 3
_RANGE = "layer kind: "  # prefix of the modules' ranges in the trace


@dataclass(frozen=True, slots=True)
class KernelCost:
    """Launches and time of one kernel in one kind of layer, per step."""

    kind: str
    name: str
    calls: int
    microseconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One profiled step.

    Attributes:
        trace: path of the Chrome trace, for https://ui.perfetto.dev.
        snapshot: path of the memory snapshot, for https://pytorch.org/memory_viz, if taken.
        kernels: most expensive first.
    """

    trace: str
    snapshot: str | None
    kernels: list[KernelCost]

    def by_kind(self) -> list[tuple[str, float]]:
        """Return the microseconds of each kind of layer, largest first."""
        sums: defaultdict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            sums[kernel.kind] += kernel.microseconds
        return sorted(sums.items(), key=lambda item: -item[1])

    def to_json(self) -> dict[str, Any]:
        """Return plain types only."""
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
    """Profile `steps` steps and write `<name>.trace.json` into the folder.

    With `memory`, also write a snapshot of CUDA memory to `<name>.memory.pickle`.

    Raises:
        DeviceError: a memory snapshot was requested without a GPU.
        CannotWrite: the folder cannot be written.
    """
    if memory and not clock.gpu:
        raise DeviceError("a memory snapshot shows CUDA memory: leave --memory out here")
    folder = writable_folder(folder)
    trace = folder / f"{name}.trace.json"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if clock.gpu else [])]
    snapshot = folder / f"{name}.memory.pickle" if memory else None
    if not clock.gpu:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # kineto would report a missing GPU
    with _memory_history(snapshot), layer_ranges(model):
        for _ in range(_WARM_UP):  # the hooks make compiled code compile again
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
    """Mark what each module launches with its kind of layer, inside the block."""
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
    """Return the kind of a module by its name; None for containers and other modules."""
    return next((kind for kind, pattern in MODULE_RULES if re.search(pattern, name)), None)


def kernel_kind(name: str) -> str:
    """Return the kind of a kernel by its name alone."""
    found = (kind for kind, pattern in KERNEL_RULES if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def kernel_costs(events: Iterable[Any], *, steps: int, gpu: bool) -> list[KernelCost]:
    """Sum a profiler's events per step, by kernel and kind of layer, most expensive first."""
    times = _device_times(list(events)) if gpu else _host_times(events)
    costs = [
        KernelCost(kind, name, max(1, len(each) // steps), sum(each) / steps)
        for (kind, name), each in times.items()
        if each
    ]
    return sorted(costs, key=lambda cost: -cost.microseconds)


Times = dict[tuple[str, str], list[float]]
"""(kind of layer, kernel) -> microseconds of every launch."""


def _device_times(events: list[Any]) -> Times:
    """Assign kernels to the module around their launch, and the rest by name.

    A kernel that no torch operator launched, such as one in a CUDA graph, has no host event.
    Therefore all events of the device count, except those already assigned to a module.
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
    """Return the time of each CPU operation, without the operations that it calls."""
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if not event.name.startswith(_RANGE) and event.self_cpu_time_total > 0:
            kind = _enclosing_kind(event) or kernel_kind(event.name)
            times[kind, event.name].append(float(event.self_cpu_time_total))
    return times


def _enclosing_kind(event: Any) -> str | None:
    """Return the kind of the innermost range around an event; None outside of all ranges."""
    while event is not None:
        if event.name.startswith(_RANGE):
            return str(event.name.removeprefix(_RANGE))
        event = event.cpu_parent
    return None
