"""Rows set aside: they keep their pages, no step touches them, and they go on when resumed."""

from __future__ import annotations

import pytest
import torch

from granite_paged import PagedCache, PagedConfig, paged
from granite_paged.errors import InvalidRequest
from granite_paged.hf.compat import with_cache
from tests.helpers.tiny_models import VOCABULARY, tiny_model

CONFIG = PagedConfig(page_size=8)
FLAVOURS = ["hybrid", "rotary", "experts", "dense"]


def ids(tokens: int = 70, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, tokens), generator=draw)


@pytest.mark.parametrize("flavour", FLAVOURS)
@torch.inference_mode()
def test_resumed_rows_go_on_any_number_of_times(flavour: str) -> None:
    model, prompt = tiny_model(flavour), ids()
    expected = model(prompt).logits[:, 48:]
    with paged(model, CONFIG):
        cache = PagedCache.for_model(model, CONFIG)
        model(prompt[:, :48], **with_cache(cache))
        parked = cache.park()
        for _ in range(3):
            cache.resume(parked)
            cache.check_valid()
            model(ids(20, seed=1), **with_cache(cache))  # somebody else's continuation
            cache.resume(parked)
            cache.batch_repeat_interleave(2)
            logits = model(prompt[:, 48:].expand(2, -1), **with_cache(cache)).logits
            cache.check_valid()
            assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.inference_mode()
def test_parked_pages_are_held_until_they_are_discarded() -> None:
    model = tiny_model()
    with paged(model, CONFIG):
        cache = PagedCache.for_model(model, CONFIG)
        model(ids(), **with_cache(cache))
        parked = cache.park()
        cache.reset()
        cache.check_valid()
        assert cache.allocator.held == 9
        cache.resume(parked)
        cache.discard(parked)
        cache.check_valid()
        assert cache.allocator.held == 9
        cache.reset()
        cache.check_valid()
        assert cache.allocator.held == 0


@torch.inference_mode()
def test_a_failed_step_leaves_what_is_parked() -> None:
    model = tiny_model()
    expected = model(ids()).logits[:, -1:]
    with paged(model, CONFIG):
        cache = PagedCache.for_model(model, CONFIG)
        model(ids()[:, :64], **with_cache(cache))
        parked = cache.park()
        cache.begin_step(1, 3)
        cache.fail_step("a step was made to fail")
        cache.resume(parked)
        logits = model(ids()[:, 64:], **with_cache(cache)).logits[:, -1:]
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_what_cannot_be_parked_or_resumed_is_refused() -> None:
    model = tiny_model()
    cache = PagedCache.for_model(model, CONFIG)
    with pytest.raises(InvalidRequest, match="no rows to park"):
        cache.park()
    with paged(model, CONFIG), torch.inference_mode():
        model(ids(), **with_cache(cache))
        parked = cache.park()
        cache.discard(parked)
        for use in (cache.resume, cache.discard, PagedCache.for_model(model, CONFIG).resume):
            with pytest.raises(InvalidRequest, match="not parked here"):
                use(parked)
        cache.check_valid()
