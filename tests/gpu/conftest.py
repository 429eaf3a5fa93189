"""Fixtures of the tests that need a CUDA device, and their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

LONGEST = (
    "test_accuracy.py",
    "test_warm_up.py",
    "test_models.py",
    "test_runner.py",
    "test_evaluate.py",
)
"""Files that take up to two minutes, or whose tests do. They start first, so that several processes
end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of `LONGEST` to the front."""
    here = Path(__file__).parent
    rank = {here / name: place - len(LONGEST) for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, 0))


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()
