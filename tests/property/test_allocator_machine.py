"""The allocator under any order of requests: generated cases and a long random walk."""

from __future__ import annotations

import os

import pytest

from granite_paged.paging.allocator import PageAllocator
from tests.helpers.allocator_model import AllocatorMachine, AllocatorModel, random_walk

DEEP_STEPS = int(os.environ.get("GRANITE_PAGED_DEEP_STEPS", "5000"))
"""Steps of the random walk; `nox -s property` asks for a million."""

TestAllocatorMachine = AllocatorMachine.TestCase


@pytest.mark.parametrize(("pages", "page_size"), [(16, 1), (20, 3), (24, 4), (40, 8)])
def test_a_long_random_walk_never_breaks_the_invariant(pages: int, page_size: int) -> None:
    model = AllocatorModel(PageAllocator(pages, page_size))
    random_walk(model, DEEP_STEPS // 4, seed=pages)
    model.release(*model.allocator.sequences)
    assert model.allocator.free == pages - 1
    refusals = {"OutOfPages", "DoubleFree", "UnknownSequence", "InvalidRequest"}
    assert refusals <= model.met.keys(), "the walk never met a refusal"
    assert model.met["copy"] or page_size == 1, "the walk never copied on write"
