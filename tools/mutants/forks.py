"""Run tests in forks of one process that has imported torch already, one mutant in each.

Importing takes seconds and a test milliseconds. The parent imports everything but the project
itself; a child imports the project, with one module changed, and runs the tests that reach it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest

MEMORY = 16 << 30  # bytes of address space a child may add: a mutant can allocate without end
GRACE = 20.0  # seconds added to five times what tests take without a mutant
RAISED = 70  # exit status of a child whose work raised; pytest has none like it
OWN = ("granite_paged", "tests", "conftest", "tools", "__main__", "__mp_main__")
TIMED = (  # tests of times, whose failures depend on the load
    "tests/unit/test_scheduler.py::test_scheduling_256_sequences_is_fast",
    "tests/integration/test_engine_asyncio.py::test_a_request_during_a_step_does_not_block_the_loop",
    "tests/integration/test_engine_asyncio.py::test_a_disconnect_during_a_step_does_not_block_the_loop",
)
OPTIONS = (
    *("-x", "-q", "-W", "ignore", "--tb=line", "--color=no"),
    "--assert=plain",  # rewriting a test file takes longer than its tests, and only explains
    *("-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception"),
    *(f"--deselect={test}" for test in TIMED),
)


class Run(NamedTuple):
    """How a child ended: its exit status, negative for a signal, or None past its time limit."""

    status: int | None
    output: str


class Reach(NamedTuple):
    """What the tests of one file reach.

    Attributes:
        seconds: time of each test that passed, by node id.
        lines: for each test, the lines that it ran, by module path.
        modules: modules of other projects that were imported.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[str, list[int]]]
    modules: list[str]


class Part(NamedTuple):
    """Tests of one file, all of them if none is named, and the time that they take."""

    file: str
    nodes: list[str]
    seconds: float


def in_child(work: Callable[[], int], limit: float) -> Run:
    """Call `work` in a fork for at most `limit` seconds. What it prints is returned.

    Raises:
        RuntimeError: if `work` raises.
    """
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _be_child(work, output.fileno())
        status = _wait(child, limit)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if status == RAISED:
        raise RuntimeError(text[-2000:])
    return Run(status, text)


def _be_child(work: Callable[[], int], output: int) -> None:
    status = RAISED
    try:
        gc.freeze()  # so that no collection walks what the parent imported
        os.setsid()  # so that what it starts ends with it
        os.dup2(output, 1)
        os.dup2(output, 2)
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = used * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        status = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(output, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _wait(child: int, limit: float) -> int | None:
    """Wait for a child, then end what is left of it."""
    status: int | None = None
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


# -- a changed module --------------------------------------------------------------------------


class _Source(Loader):
    """Loads a module from a text that is not in its file."""

    def __init__(self, code: CodeType) -> None:
        self.code = code

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


class _Changed(MetaPathFinder):
    """Finds one module in a changed text; the others where they are."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path = name, path
        self.code = compile(source, str(path), "exec")

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        return spec_from_file_location(fullname, self.path, loader=_Source(self.code))


def replace_module(root: Path, module: str, source: str) -> None:
    """Let the next import of a module, given by its path, run another text."""
    name = module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    assert name not in sys.modules, f"{name} was imported before it was changed"
    sys.meta_path.insert(0, _Changed(name, root / module, source))


# -- tests ---------------------------------------------------------------------------------------


class _NoShrinking:
    """Stops hypothesis at the first failure: how small it can be does not matter here."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings  # noqa: PLC0415  # not all who read this have it

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutants", settings(), phases=phases)
        settings.load_profile("mutants")


class _Selection:
    """Runs some tests of a file, in a given order."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self.order = {node: index for index, node in enumerate(nodes)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(chosen, key=lambda item: self.order[item.nodeid])


class _Recorder:
    """Records how long each test takes, and which lines of some files it runs."""

    def __init__(self, root: Path, modules: Collection[str]) -> None:
        self.paths = {str(root / module): module for module in modules}
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[str, list[int]]] = {}
        self._ran: dict[str, set[int]] = {}

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename in self.paths else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        self._ran.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
        return self._line

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        """Record what `torch.compile` reads as well: those lines never run as Python."""
        from torch._guards import TracingContext  # noqa: PLC0415  # not before the environment is set

        before = TracingContext.set_current_loc

        def read(path: str, line: int, function: str) -> None:
            if path in self.paths:
                self._ran.setdefault(path, set()).add(line)
            before(path, line, function)

        with mock.patch.object(TracingContext, "set_current_loc", read):
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._ran = {}
        began = time.perf_counter()
        threading.settrace(self._called)
        sys.settrace(self._called)
        try:
            with self._compiled():
                return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self.seconds[item.nodeid] = time.perf_counter() - began
            ran = {self.paths[path]: sorted(lines) for path, lines in self._ran.items()}
            self.lines[item.nodeid] = ran


def record_reach(
    root: Path, files: Sequence[str], modules: Collection[str], limit: float, *options: str
) -> Reach | str:
    """Run the tests of files and return what they reach, or pytest's output if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "reach.json")

        def work() -> int:
            recorder = _Recorder(root, modules)
            plugins = [recorder, _NoShrinking()]
            status = pytest.main([*OPTIONS, *options, *files], plugins=plugins)
            others = [m for m in sys.modules if m.partition(".")[0] not in OWN]
            reach = Reach(recorder.seconds, recorder.lines, others)
            report.write_text(json.dumps(reach), encoding="utf-8")
            return int(status)

        run = in_child(work, limit)
        empty = int(pytest.ExitCode.NO_TESTS_COLLECTED)
        if run.status not in (0, empty) or not report.exists():
            return f"{files[0]}: exit status {run.status}\n{run.output[-2000:]}"
        return Reach(*json.loads(report.read_text(encoding="utf-8")))


def warm_up(modules: Collection[str]) -> None:
    """Import modules of other projects, so that children have them."""
    for name in modules:
        if name.partition(".")[0] not in OWN and name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # some are made by their package, and cannot be imported
                continue


def run_tests(root: Path, module: str, source: str, part: Part) -> Run:
    """Run some tests of a file, or all where none is named, with one module changed."""

    def work() -> int:
        replace_module(root, module, source)
        selection = [_Selection(part.nodes)] if part.nodes else []
        return int(pytest.main([*OPTIONS, part.file], plugins=[*selection, _NoShrinking()]))

    return in_child(work, GRACE + 5 * part.seconds)


def by_file(seconds: Mapping[str, float]) -> list[Part]:
    """Group tests by file, the fastest tests and files first."""
    files: dict[str, list[str]] = {}
    for node in sorted(seconds, key=lambda node: seconds[node]):
        files.setdefault(node.partition("::")[0], []).append(node)
    parts = [Part(file, nodes, sum(seconds[n] for n in nodes)) for file, nodes in files.items()]
    return sorted(parts, key=lambda part: part.seconds)
