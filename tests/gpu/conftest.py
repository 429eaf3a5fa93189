"""Fixtures of the tests that need a CUDA device, and their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from granite_paged.models import load

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


@pytest.fixture(scope="module")
def model() -> Any:
    """granite-4.0-h-1b with random weights, in bfloat16."""
    return load(random_weights="granite-4.0-h-1b", device="cuda", dtype="bfloat16").model


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()
