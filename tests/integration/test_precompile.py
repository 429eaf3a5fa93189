"""Workers that compile steps ahead: who does what, and what happens when they cannot."""

from __future__ import annotations

import io
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_paged.runner import precompile
from granite_paged.runner.precompile import compiled_ahead, keep_caches, shares

DIGEST, kernels_of = precompile._digest, precompile._kernels_of
SHAPES = [(1, 32), (1, 64), (1, 1), (2, 1), (16, 64)]


class Compiler:
    """In place of `Steps`: pickled, it is what a worker calls."""

    def __init__(
        self, folder: Path, broken: tuple[int, int] | None = None, content: str = "a"
    ) -> None:
        self.folder, self.broken, self._content = folder, broken, content

    def content(self) -> str:
        return self._content

    def compile(self, batch: int, length: int) -> None:
        if (batch, length) == self.broken:
            raise MemoryError("no memory for a worker")
        (self.folder / f"{batch}x{length}").touch()

    def done(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


class SlowToLeave(Compiler):
    """A compiler that takes a moment to end, in a worker: there it was pickled."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.is_copy = True

    def __del__(self) -> None:
        if hasattr(self, "is_copy"):
            time.sleep(0.5)
            (self.folder / "left").touch()


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "caches" / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own" / "triton"))
    monkeypatch.setattr(precompile.os, "cpu_count", lambda: 2)  # one worker
    monkeypatch.setattr(precompile, "_digest", lambda shapes, content: f"note-{content}")
    (tmp_path / "done").mkdir()
    return tmp_path


def warm_up(compiler: Any) -> None:
    with compiled_ahead(compiler, SHAPES) as wait:
        for shape in SHAPES:
            wait(shape)


def test_a_worker_is_started_without_waiting_until_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe does not hold its input, and it imports for 10 s: eight took 30 s to start."""
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(precompile.sys, "executable", str(slow))
    begin = time.monotonic()
    worker = precompile._Worker(bytes(1 << 20), SHAPES)
    worker.stop()
    assert time.monotonic() - begin < 20


def test_a_worker_compiles_all_but_the_first_shape_once(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(caches / "done")
    with compiled_ahead(compiler, SHAPES) as wait:
        wait((1, 32))  # returns at once: this process compiles it
        for shape in SHAPES[1:]:
            wait(shape)
            assert f"{shape[0]}x{shape[1]}" in compiler.done()
    assert compiler.done() == {"1x64", "1x1", "2x1", "16x64"}
    monkeypatch.setattr(precompile, "_Worker", None)
    warm_up(compiler)  # its kernels are in the caches
    with pytest.warns(UserWarning, match="a worker failed: 'NoneType'"):
        warm_up(Compiler(caches / "done", content="another"))
    warm_up(Compiler(caches / "done", content="another"))  # compiled here, and noted as well
    notes = caches / "caches" / "inductor" / "granite_paged"
    assert (caches / "own" / "triton").is_dir(), "it was made, with its parent"
    assert {path.name for path in notes.iterdir()} == {"note-a", "note-another"}


def test_a_worker_without_work_ends_by_itself(caches: Path) -> None:
    """It gives back what it shares; killed, it would not."""
    compiler = SlowToLeave(caches / "done")
    warm_up(compiler)
    assert "left" in compiler.done()


def test_an_interrupted_warm_up_is_not_noted(caches: Path) -> None:
    def interrupt() -> None:
        with compiled_ahead(Compiler(caches / "done"), SHAPES):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not (caches / "caches" / "inductor" / "granite_paged").exists()


def test_a_worker_that_fails_leaves_its_shapes_with_one_warning(caches: Path) -> None:
    compiler = Compiler(caches / "done", broken=(16, 64))
    with pytest.warns(
        UserWarning, match="one by one: a worker failed: MemoryError: no memory"
    ) as caught:
        warm_up(compiler)
    assert [warned.filename for warned in caught] == [precompile.__file__]
    assert "16x64" not in compiler.done()


def test_what_cannot_be_shared_is_compiled_here(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompile.os, "cpu_count", lambda: 6)
    compiler = SimpleNamespace(
        content=str, compile=lambda batch, length: None
    )  # lambdas cannot be pickled
    with pytest.warns(UserWarning, match="one by one: a worker failed: .*pickle") as caught:
        warm_up(compiler)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("cores", "shapes", "workers"),
    [
        (None, 73, 0),
        (1, 73, 0),
        (2, 73, 1),
        (6, 73, 3),
        (64, 73, 8),
        (64, 3, 2),
        (64, 1, 0),
        (64, 0, 0),
    ],
)
def test_workers_take_half_of_the_cores_and_share_the_shapes(
    cores: int | None, shapes: int, workers: int, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[list[tuple[int, int]]] = []

    class Noted:
        def __init__(self, shared: bytes, shapes: list[tuple[int, int]]) -> None:
            parts.append(shapes)

        def stop(self) -> None:
            pass

    monkeypatch.setattr(precompile.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(precompile, "_Worker", Noted)
    asked = [(1, 32 + n) for n in range(shapes)]
    with compiled_ahead(Compiler(caches / "done"), asked):
        assert len(parts) == workers
    if workers:
        assert sorted(shape for part in parts for shape in part) == asked[1:]


DECODES = [(1 << n, 1) for n in range(9)]
PREFILLS = [(rows, length) for length in (32, 64, 128, 256, 512, 1024) for rows in (1, 4)]


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((1, 1), ("decode", 1)),
        ((2, 1), ("decode", 16)),
        ((16, 1), ("decode", 16)),
        ((32, 1), ("decode", 32)),
        ((1, 2), ("prefill", 2)),
        ((4, 64), ("prefill", 64)),
    ],
)
def test_steps_share_kernels_by_rows_or_by_tokens(
    shape: tuple[int, int], kernels: tuple[str, int]
) -> None:
    assert kernels_of(shape) == kernels


def test_a_worker_gets_one_kind_of_step_where_there_are_enough() -> None:
    parts = shares([*PREFILLS[::2], *DECODES, *PREFILLS[1::2]], 8)
    assert parts == [
        [(1, 1)],
        [(2, 1), (4, 1), (8, 1), (16, 1)],  # products of up to 16 rows are the same
        [(32, 1)],
        [(64, 1)],
        [(128, 1)],
        [(256, 1)],
        [(1, 64), (1, 256), (1, 1024), (4, 64), (4, 256), (4, 1024)],
        [(1, 128), (1, 512), (4, 128), (4, 512)],
    ]


@pytest.mark.parametrize("count", range(1, 13))
@given(st.lists(st.sampled_from([*DECODES, *PREFILLS]), min_size=2, unique=True))
def test_shares_end_at_about_the_same_time(count: int, shapes: list[tuple[int, int]]) -> None:
    """No later than the mean, and one group: assigning the longest first allows no more."""
    parts = shares(shapes, count)
    here = {shape for shape in shapes if kernels_of(shape) == kernels_of(shapes[0])}
    assert sorted(shape for part in parts for shape in part) == sorted({*shapes} - here)
    assert all(part == sorted(part, key=shapes.index) for part in parts)
    owners: dict[Any, set[int]] = {}
    for number, part in enumerate(parts):
        for shape in part:
            owners.setdefault(kernels_of(shape), set()).add(number)
    assert all(len(workers) == 1 for workers in owners.values())
    if parts:
        ends = [precompile.seconds_to_compile([*{*map(kernels_of, part)}]) for part in parts]
        assert max(ends) <= sum(ends) / count + precompile.ATTENTION_COST + precompile.DECODE_COST


def test_the_time_to_compile_counts_attention_of_each_kind_once() -> None:
    steps = [("decode", 1), ("prefill", 64), ("decode", 16)]
    assert precompile.seconds_to_compile(steps) == 2 * 6.0 + 2 * 5.0 + 2.5
    assert precompile.seconds_to_compile([]) == 0


def test_a_note_depends_on_the_code_that_decides_what_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(precompile.torch.cuda, "get_device_name", lambda: "a GPU")
    read: list[Path] = []

    def noted(path: Path, *args: Any, **options: Any) -> str:
        read.append(path)
        return "text"

    monkeypatch.setattr(precompile.Path, "read_text", noted)
    first = DIGEST(SHAPES, "a")
    assert {path.parent.name for path in read} >= {"layers", "triton", "paging", "runner"}
    assert first == DIGEST(SHAPES[::-1], "a")
    assert first != DIGEST(SHAPES, "b")
    assert first != DIGEST(SHAPES[:1], "a")


def test_a_cache_that_cannot_be_written_moves_with_a_warning(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = caches / "file"
    blocked.touch()
    at_exit = []
    monkeypatch.setattr(
        precompile.atexit, "register", lambda call, *a, **k: at_exit.append(lambda: call(*a, **k))
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(blocked / "below"))
    reason = r"Triton's cache .*file/below cannot be written"
    with (
        pytest.warns(UserWarning, match=reason) as caught,
        compiled_ahead(Compiler(caches / "done"), SHAPES[:2]),
    ):
        pass
    assert caught[0].filename == __file__, "the warning points at the caller"
    assert keep_caches() == caches / "caches" / "inductor"
    moved = Path(precompile.os.environ["TRITON_CACHE_DIR"])
    assert moved.is_dir()
    assert moved != blocked
    (moved / "kernel").touch()
    for call in at_exit * 2:  # also if something else has removed it
        call()
    assert not moved.exists()


def test_a_worker_says_when_each_shape_is_compiled(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output is a pipe: what is not flushed arrives at its end."""
    compiler, said = Compiler(caches / "done"), []
    work = (SHAPES[:2], pickle.dumps(compiler), "module.of.the.user")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pickle.dumps(work))))
    monkeypatch.setattr(precompile, "print", lambda *a, **k: said.append((a, k)), raising=False)
    monkeypatch.setattr(precompile.torch.cuda, "ipc_collect", lambda: None)
    precompile.main()
    assert compiler.done() == {"1x32", "1x64"}
    assert said == [((f"compiled 1 {n}",), {"flush": True}) for n in (32, 64)]


def test_keys_name_the_same_module_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    precompile._put_first("module.of.the.user")
    assert precompile._first_with_torch() == "module.of.the.user"
