"""A pytest plugin that patches every Granite-4 model of transformers' tests before it runs.

    python -m pytest -p tools.upstream.plugin tests/models/granitemoehybrid

Two inputs that a patched model refuses would keep most tests from reaching a paged step, so the
plugin changes them: models in eval mode run without gradients, and the padding that the tests put
on the right goes to the left. A test's property `paged_steps` is its number of steps on pages.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from transformers import GraniteMoeHybridForCausalLM, set_seed

from granite_paged import PagedConfig
from granite_paged.hf.cache import PagedCache
from granite_paged.hf.patching import is_patched, patch

SIZES = PagedConfig(page_size=16)

STEPS = "paged_steps"

SEED = 0
SHARED = "tests.test_modeling_common"  # transformers' module with the tests' own random generator


def _patching(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a model that patches the model, unless it is patched."""

    @functools.wraps(method)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_patched(model):
            patch(model, SIZES)
        with torch.set_grad_enabled(torch.is_grad_enabled() and model.training):
            return method(model, *args, **kwargs)

    return call


def _padding_left(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Return a tester's `prepare_config_and_inputs` whose attention mask pads on the left."""

    @functools.wraps(prepare)
    def call(tester: Any) -> tuple[Any, ...]:
        config, token_ids, mask, *others = prepare(tester)
        return config, token_ids, None if mask is None else mask.flip(1), *others

    return call


def _counting(begin_step: Callable[..., Any]) -> Callable[..., Any]:
    """Return `PagedCache.begin_step` that counts its calls."""

    @functools.wraps(begin_step)
    def begin(cache: PagedCache, *args: Any, **kwargs: Any) -> Any:
        begin.calls += 1  # type: ignore[attr-defined]
        return begin_step(cache, *args, **kwargs)

    begin.calls = 0  # type: ignore[attr-defined]
    return begin


def pytest_configure() -> None:
    """Wrap what runs a model: its call, and `generate()`."""
    model: Any = GraniteMoeHybridForCausalLM
    model.__call__ = _patching(model.__call__)
    model.generate = _patching(model.generate)
    PagedCache.begin_step = _counting(PagedCache.begin_step)  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the testers of the collected classes pad on the left."""
    classes = (getattr(item, "cls", None) for item in items)
    testers: set[Any] = {getattr(cls, "model_tester_class", None) for cls in classes} - {None}
    for tester in testers:
        tester.prepare_config_and_inputs = _padding_left(tester.prepare_config_and_inputs)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Seed a test, and record how many paged steps it ran.

    Random token ids may end with the padding token, from which `generate()` infers a mask.
    """
    set_seed(SEED)
    if SHARED in sys.modules:
        sys.modules[SHARED].global_rng.seed(SEED)
    steps: Any = PagedCache.begin_step
    before = steps.calls
    try:
        yield
    finally:
        item.user_properties.append((STEPS, steps.calls - before))
