"""Tests of one slow fixture go to one worker of pytest-xdist."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("xdist")

from tests.helpers.spread import TAKING_TURNS, WHOLE, Spread

TESTS = Path(__file__).parents[1]
SHORT = {"test_a_request_has_the_same_bits_in_any_company"}
"""Tests that wait for their turn, but not long enough to need one worker together."""


@pytest.mark.parametrize(
    ("test", "sent"),
    [
        ("tests/integration/test_ray.py::test_a[x::y]", "tests/integration/test_ray.py"),
        ("tests/unit/test_pool.py::test_a", "tests/unit/test_pool.py"),
        ("tests/integration/test_engine.py::test_a", "tests/integration/test_engine.py::test_a"),
        *((f"tests/gpu/test_models.py::{test}", "float64") for test in sorted(TAKING_TURNS)),
    ],
    ids=["a slow fixture", "unit tests", "other tests", *sorted(TAKING_TURNS)],
)
def test_a_test_is_sent_with_its_file_or_alone(test: str, sent: str) -> None:
    assert object.__new__(Spread)._split_scope(test) == sent


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_whole_file_exists(name: str) -> None:
    assert len(list(TESTS.glob(f"*/{name}"))) == 1


def test_tests_that_hold_a_float64_model_take_turns_in_one_worker() -> None:
    """All tests that call `large_turn` or `float64_copy`, but those of a fixture, and `SHORT`."""
    found = set[str]()
    for file in (TESTS / "gpu").glob("test_*.py"):
        for test in file.read_text(encoding="utf-8").split("\ndef ")[1:]:
            if "large_turn()" in test or "float64_copy(" in test:
                found.add(test.partition("(")[0])
    assert {name for name in found if name.startswith("test_")} == TAKING_TURNS | SHORT
