"""Fixtures that compare with golden data, and the rule that each one must compare once."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from tests.helpers.golden_extension import FIXTURES, LogitsExtension, TableExtension, claims

HERE = Path(__file__).parent
_CLAIMS = pytest.StashKey[dict[Path, list[str]] | None]()


@pytest.fixture
def golden_logits(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    """Golden logits, to compare once: `assert golden_logits == Measured(...)`."""
    return snapshot.use_extension(LogitsExtension)


@pytest.fixture
def golden_table(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    """A golden table, to compare once: `assert golden_table == text`."""
    return snapshot.use_extension(TableExtension)


@pytest.fixture
def golden_claims(pytestconfig: pytest.Config) -> dict[Path, list[str]]:
    """The ids of the tests that compare with each golden file, for this whole folder."""
    claimed = pytestconfig.stash[_CLAIMS]
    if claimed is None:
        pytest.skip("only part of this folder was collected, so owners may be missing")
    return claimed


@pytest.hookimpl(tryfirst=True)  # before -k, -m and --deselect take any test away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_CLAIMS] = claims(items) if _is_whole(config, items) else None


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Fail a test that takes a golden fixture but compares nothing: it would keep a stale file."""
    result = yield
    for fixture in FIXTURES.keys() & pyfuncitem.funcargs.keys():
        assert pyfuncitem.funcargs[fixture].num_executions, f"nothing was compared with {fixture}"
    return result


def _is_whole(config: pytest.Config, items: list[pytest.Item]) -> bool:
    narrowed = config.getoption("lf", default=False) or any("::" in arg for arg in config.args)
    return not narrowed and {item.path for item in items} >= set(HERE.glob("test_*.py"))
