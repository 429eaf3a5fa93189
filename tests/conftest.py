"""Settings of all tests. A test's marker is the name of the folder that holds it."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

gc.disable()  # until all tests are collected: modules are no garbage, and to search them takes 2 s

if sys.dont_write_bytecode and not sys.pycache_prefix:
    # each of the processes that tests start would compile transformers again, for seconds
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

TESTS = Path(__file__).parent
LAYERS = ("unit", "property", "golden", "integration", "gpu")
# a set of several elements or an address: other text in another process
CHANGING_NAME = re.compile(r"\{[^{}:]*,[^{}:]*\}|0x[0-9a-f]{8}")

settings.register_profile(
    "default",
    deadline=None,
    max_examples=50,
    derandomize=True,  # the same cases everywhere, so that a failure can be reproduced
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "deep", settings.get_profile("default"), max_examples=2000, derandomize=False, print_blob=True
)
settings.register_profile("wide", settings.get_profile("deep"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def sharded_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint folder as authors publish one. Tests only read it."""
    from tests.helpers.sharded_checkpoint import write_checkpoint  # noqa: PLC0415  # after the above

    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@functools.cache
def has_gpu() -> bool:
    import torch  # noqa: PLC0415  # a process that only starts workers does without

    return torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") != "no":  # this process starts workers, and runs no tests
        gc.enable()
        return
    import torch  # noqa: PLC0415

    # workers share the cores: one thread each is faster, and fixes the order of sums
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    if has_gpu():
        return
    # set before Triton is imported, so that its kernels run on the CPU
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests.helpers import fast_interpreter  # noqa: PLC0415

        fast_interpreter.install()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.helpers.spread import Spread  # noqa: PLC0415  # only where pytest-xdist is installed

    return Spread(config, log) if config.getvalue("dist") in ("load", "loadgroup") else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip a folder that `-m` selects nothing from, since to import its modules takes seconds."""
    layer, expression = collection_path.name, config.option.markexpr
    names = set(re.findall(r"\w+", expression)) - {"and", "or", "not"}
    if collection_path.parent != TESTS or layer not in LAYERS or not names or names - {*LAYERS}:
        return None
    return None if eval(expression, {}, {name: name == layer for name in LAYERS}) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(
        reason="no CUDA device: run `nox -s gpu_tests` on a machine with a GPU"
    )
    for item in items:
        layer = item.path.relative_to(TESTS).parts[0]
        assert layer in LAYERS, f"{item.path} is in none of the folders {LAYERS}: move it into one"
        assert not CHANGING_NAME.search(item.name), (
            f"{item.nodeid} has another name in every process, which pytest-xdist refuses: "
            "give its parameters ids"
        )
        item.add_marker(layer)
        if layer == "gpu" and not has_gpu():
            item.add_marker(no_gpu)
