"""Workers that compile steps ahead: who does what, and what happens when they cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.runner import precompile
from granite_paged.runner.precompile import compiled_ahead, keep_caches

SHAPES = [(1, 32), (1, 64), (1, 1), (2, 1), (16, 32)]


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


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(precompile.os, "cpu_count", lambda: 2)  # one worker
    monkeypatch.setattr(precompile, "_digest", lambda shapes, content: f"note-{content}")
    (tmp_path / "done").mkdir()
    return tmp_path


def warm_up(compiler: Any) -> None:
    with compiled_ahead(compiler, SHAPES) as wait:
        for shape in SHAPES:
            wait(shape)


def test_a_worker_compiles_all_but_the_first_shape_once(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(caches / "done")
    with compiled_ahead(compiler, SHAPES) as wait:
        wait((1, 32))  # returns at once: this process compiles it
        for shape in SHAPES[1:]:
            wait(shape)
            assert f"{shape[0]}x{shape[1]}" in compiler.done()
    assert compiler.done() == {"1x64", "1x1", "2x1", "16x32"}
    monkeypatch.setattr(precompile, "_Worker", None)
    warm_up(compiler)  # its kernels are in the caches
    with pytest.warns(UserWarning, match="a worker failed: 'NoneType'"):
        warm_up(Compiler(caches / "done", content="another"))


def test_an_interrupted_warm_up_is_not_noted(caches: Path) -> None:
    def interrupt() -> None:
        with compiled_ahead(Compiler(caches / "done"), SHAPES):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not (caches / "inductor" / "granite_paged").exists()


def test_a_worker_that_fails_leaves_its_shapes_with_one_warning(caches: Path) -> None:
    compiler = Compiler(caches / "done", broken=(16, 32))
    with pytest.warns(UserWarning, match="one by one: a worker failed: .*no memory") as caught:
        warm_up(compiler)
    assert len(caught) == 1
    assert "16x32" not in compiler.done()


def test_what_cannot_be_shared_is_compiled_here(caches: Path) -> None:
    compiler = SimpleNamespace(
        content=str, compile=lambda batch, length: None
    )  # lambdas cannot be pickled
    with pytest.warns(UserWarning, match="one by one: a worker failed: .*pickle") as caught:
        warm_up(compiler)
    assert len(caught) == 1


def test_a_cache_that_cannot_be_written_moves_with_a_warning(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = caches / "file"
    blocked.touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(blocked / "below"))
    with pytest.warns(UserWarning, match=r"Triton's cache .*file/below cannot be written"):
        keep_caches()
    moved = Path(precompile.os.environ["TRITON_CACHE_DIR"])
    assert moved.is_dir()
    assert moved != blocked


def test_keys_name_the_same_module_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    precompile._put_first("module.of.the.user")
    assert precompile._first_with_torch() == "module.of.the.user"
