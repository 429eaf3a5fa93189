"""Compile the kernels of many steps at once, in processes that share the runner's memory.

::

    this process                      workers, each with its share of the shapes
    sends model and buffers   ─────>  open them by CUDA IPC: no copy
    waits for a shape         <─────  compute its padding once, which compiles into the caches
    captures it, compiled

A worker writes to the null row and the null page only, as every padding does. Where workers cannot
start, or fail, this process compiles what they left. A note beside Inductor's cache says which
configurations were compiled before; those start without workers.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import init_reductions

from granite_paged.digests import sha256

if TYPE_CHECKING:
    from granite_paged.runner.steps import Steps

StepShape = tuple[int, int]
"""Rows, and tokens per row; 1 is a decode step."""

StepKernels = tuple[str, int]
"""What steps that launch the same kernels have in common: "prefill" and the tokens per row, or
"decode" and the rows. Products of 2 to 16 rows are computed as those of 16 rows are."""

MOST_WORKERS = 8
"""A worker takes 0.5 GB of device memory for its context, and a core."""

ATTENTION_COST, DECODE_COST, PREFILL_COST = 6.0, 5.0, 2.5
"""Seconds until a process has compiled attention of one kind of step, and the other kernels of one
decode step and of one prefill step. Measured where one process compiled all steps of
granite-4.0-h-1b, beside an H100, with torch 2.11; only their ratios matter."""

_COSTS = {"decode": DECODE_COST, "prefill": PREFILL_COST}

_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "Inductor's", "TRITON_CACHE_DIR": "Triton's"}
_SOURCES = ("layers", "paging", "runner")  # folders whose code decides what is compiled
_READY = "compiled "
_GOODBYE_SECONDS = 5.0


@contextlib.contextmanager
def compiled_ahead(
    steps: Steps, shapes: Sequence[StepShape]
) -> Iterator[Callable[[StepShape], None]]:
    """Let workers compile steps of these shapes while the block runs.

    Args:
        steps: of one runner; pickled, they are what workers compile.
        shapes: in the order in which the block needs them.

    Yields:
        A function that waits until no worker will compile a shape any more.
    """
    count = min(MOST_WORKERS, (os.cpu_count() or 1) // 2)
    parts = shares(shapes, count) if count else []
    if not parts:
        yield lambda shape: None
        return
    note = keep_caches() / "granite_paged" / _digest(shapes, steps.content())
    if note.exists():
        yield lambda shape: None
        return
    with contextlib.ExitStack() as running:
        yield _started(steps, parts, running)
    with contextlib.suppress(OSError):  # without the note, the next start asks workers again
        note.parent.mkdir(exist_ok=True)
        note.touch()


def keep_caches() -> Path:
    """Return the folder of Inductor's cache.

    A cache that cannot be written moves to a new folder, which is removed when this process ends.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # slow to import

    triton_dir = str(Path("~/.triton/cache").expanduser())
    folders = {
        "TORCHINDUCTOR_CACHE_DIR": cache_dir(),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", triton_dir),
    }
    for name, folder in folders.items():
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"\0")
        except OSError as error:
            folders[name] = os.environ[name] = tempfile.mkdtemp(prefix="granite-paged-")
            atexit.register(shutil.rmtree, folders[name], ignore_errors=True)
            warnings.warn(
                f"{_CACHES[name]} cache {folder} cannot be written ({error.strerror}): kernels are "
                f"compiled at every start; set {name} to a folder that can",
                stacklevel=4,
            )
    return Path(folders["TORCHINDUCTOR_CACHE_DIR"])


def _digest(shapes: Sequence[StepShape], content: Any) -> str:
    import triton  # not everywhere

    package = Path(__file__).parents[1]
    files = [file for name in _SOURCES for file in sorted((package / name).rglob("*.py"))]
    sources = [sha256(file.read_text()) for file in files]
    versions = [torch.__version__, triton.__version__]
    return sha256([sources, versions, torch.cuda.get_device_name(), sorted(shapes), content])


def shares(shapes: Sequence[StepShape], count: int) -> list[list[StepShape]]:
    """Divide shapes among up to `count` workers, so that all end at about the same time.

    Steps that launch the same kernels stay together. The first, and those with its kernels, are in
    no share: the process that captures the steps compiles them.
    """
    wanted = {*map(_kernels_of, shapes)} - {*map(_kernels_of, shapes[:1])}
    parts: list[list[StepKernels]] = [[] for _ in range(count)]
    for kernels in sorted(wanted, key=lambda each: (-_COSTS[each[0]], each)):  # the longest first
        part = min(parts, key=lambda part: seconds_to_compile([*part, kernels]))
        part.append(kernels)
    divided = [[shape for shape in shapes if _kernels_of(shape) in part] for part in parts]
    return [part for part in divided if part]


def seconds_to_compile(steps: Sequence[StepKernels]) -> float:
    """Return the seconds in which one process compiles the kernels of these steps."""
    kinds = [kind for kind, _ in steps]
    return ATTENTION_COST * len({*kinds}) + sum(_COSTS[kind] for kind in kinds)


def _kernels_of(shape: StepShape) -> StepKernels:
    batch, length = shape
    return ("prefill", length) if length > 1 else ("decode", 1 if batch == 1 else max(16, batch))


def _started(
    steps: Steps, parts: Sequence[Sequence[StepShape]], running: contextlib.ExitStack
) -> Callable[[StepShape], None]:
    """Start a worker for each part, to end with `running`. Return what `compiled_ahead` yields."""
    owner: dict[StepShape, _Worker] = {}
    for part in parts:
        try:
            worker = _Worker(_pickled(steps), part)  # each has handles of its own
        except Exception as error:  # whatever cannot be shared or started: this process compiles
            _explain(str(error))
            break
        running.callback(worker.stop)
        owner.update(dict.fromkeys(part, worker))

    def wait(shape: StepShape) -> None:
        if shape in owner:
            owner[shape].wait(shape)

    return wait


class _Worker:
    """A process that compiles shapes, one after the other."""

    def __init__(self, shared: bytes, shapes: Sequence[StepShape]) -> None:
        self._left = list(shapes)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `stop`)
        with tempfile.TemporaryFile() as work:  # not a pipe, which is full until the worker reads
            pickle.dump((list(shapes), shared, _first_with_torch()), work)
            work.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=work,
                stdout=subprocess.PIPE,
                stderr=self._log,
                # a worker is one of many already; and it must import what this process imports
                env={
                    **os.environ,
                    "TORCHINDUCTOR_COMPILE_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
            )

    def wait(self, shape: StepShape) -> None:
        """Wait until a shape is compiled, or the process ended."""
        assert self._process.stdout is not None
        while shape in self._left:
            line = self._process.stdout.readline().decode()
            if line.startswith(_READY):
                batch, length = map(int, line.removeprefix(_READY).split())
                self._left.remove((batch, length))
            elif not line:
                self._left.clear()
                self._log.seek(0)
                last = self._log.read().decode(errors="replace").strip().splitlines()
                _explain(last[-1] if last else "it ended without a word")

    def stop(self) -> None:
        """End the process, unless it ends by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._left else _GOODBYE_SECONDS)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._log):
            if stream is not None:
                stream.close()


def _explain(reason: str) -> None:
    warnings.warn(f"kernels are compiled one by one: a worker failed: {reason}", stacklevel=2)


def _pickled(shared: Any) -> bytes:
    """Pickle with handles to tensors on the GPU in place of their contents."""
    init_reductions()  # type: ignore[no-untyped-call]
    buffer = io.BytesIO()
    ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(shared)
    return buffer.getvalue()


def _first_with_torch() -> str:
    """Return which loaded module pickle names as the owner of torch's constants.

    They have no module, so it is the first with an attribute `torch`: that depends on the order of
    imports, and is part of Inductor's cache keys (torch 2.11).
    """
    return str(pickle.whichmodule(torch.contiguous_format, str(torch.contiguous_format)))  # type: ignore[attr-defined]


def _put_first(name: str) -> None:
    """Let `_first_with_torch` return this name."""
    loaded = dict(sys.modules)
    first = loaded.pop(name, None) or types.ModuleType(name)
    first.__dict__.setdefault("torch", torch)
    sys.modules.clear()
    sys.modules.update({name: first, **loaded})


def main() -> None:
    """Compile the shapes that standard input names, with what it shares."""
    shapes, shared, first = pickle.loads(sys.stdin.buffer.read())
    _put_first(first)
    steps: Steps = pickle.loads(shared)
    for batch, length in shapes:
        steps.compile(batch, length)
        print(f"{_READY}{batch} {length}", flush=True)
    del steps
    gc.collect()  # gives the tensors back to their owner
    torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
