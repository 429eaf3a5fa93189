"""Tests of one slow fixture go to one worker of pytest-xdist."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("xdist")

from tests.helpers.spread import WHOLE, Spread

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("test", "sent"),
    [
        ("tests/integration/test_ray.py::test_a[x::y]", "tests/integration/test_ray.py"),
        ("tests/unit/test_pool.py::test_a", "tests/unit/test_pool.py"),
        ("tests/integration/test_engine.py::test_a", "tests/integration/test_engine.py::test_a"),
    ],
    ids=["a slow fixture", "unit tests", "other tests"],
)
def test_a_test_is_sent_with_its_file_or_alone(test: str, sent: str) -> None:
    assert object.__new__(Spread)._split_scope(test) == sent


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_whole_file_exists(name: str) -> None:
    assert len(list(TESTS.glob(f"*/{name}"))) == 1
