"""Bytes of tensors that a paged cache holds, compared with those of transformers' cache."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from granite_paged import PagedCache, PagedConfig, paged
from tests.helpers.tiny_models import EOS, PAD, VOCABULARY, cache_of, tiny_model

LENGTHS = (500, 40, 7, 260, 90, 3, 120, 33)


def storage_bytes(root: Any) -> int:
    """Sum the bytes of all distinct tensor storages reachable from an object's attributes."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type | torch.dtype | torch.device):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set):
            waiting.extend(item)
        elif hasattr(item, "__dict__"):
            waiting.extend(vars(item).values())
    return sum(storages.values())


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    width = max(LENGTHS)
    ids = torch.randint(EOS + 1, VOCABULARY, (len(LENGTHS), width), generator=draw)
    mask = torch.arange(width)[None] >= width - torch.tensor(LENGTHS)[:, None]
    return ids.where(mask, PAD), mask.long()


@pytest.fixture(scope="module")
def caches() -> tuple[DynamicCache, PagedCache]:
    """Both caches after the same ragged prompts and 8 steps, in an attention-only model."""
    model = tiny_model("dense")
    ids, mask = ragged()
    options = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    default = cache_of(model.generate(ids, attention_mask=mask, **options))
    with paged(model, PagedConfig(page_size=16)):
        ours = cache_of(model.generate(ids, attention_mask=mask, **options))
    gc.collect()
    return default, ours


def test_pools_hold_exactly_the_needed_pages(
    caches: tuple[DynamicCache, PagedCache],
) -> None:
    _, cache = caches
    needed = sum(cache.geometry.pages_for(length + 8) for length in LENGTHS)
    assert cache.allocator.held == needed
    pool_bytes = sum(pool.nbytes for pool in cache.store.pools.values())
    assert pool_bytes == (1 + needed) * cache.geometry.bytes_per_page  # and the null page


def test_a_paged_cache_takes_less_than_a_padded_one(
    caches: tuple[DynamicCache, PagedCache],
) -> None:
    default, cache = caches
    tokens = sum(length + 8 for length in LENGTHS)
    padded = len(LENGTHS) * (max(LENGTHS) + 8)
    assert storage_bytes(default) == padded * cache.geometry.bytes_per_token
    # the tokens' share of the padded bytes, one more page per sequence, and page tables
    share = (tokens + len(LENGTHS) * cache.geometry.page_size) / padded
    assert storage_bytes(cache) <= 1.05 * share * storage_bytes(default)
    assert share < 0.35


def test_a_dropped_cache_leaves_no_tensors() -> None:
    model, (ids, mask) = tiny_model(), ragged()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    def run() -> None:
        with paged(model, PagedConfig(page_size=16)):
            model.generate(ids, attention_mask=mask, max_new_tokens=4)

    run()
    before = tensors()
    run()
    assert tensors() <= before
