"""The pool that stores K and V, written by slot."""

from __future__ import annotations

import pytest
import torch

from granite_paged.geometry import CacheGeometry
from granite_paged.layers.attention import kernel_options
from granite_paged.paging.masks import paged_block_mask
from granite_paged.paging.pool import KVPool
from tests.helpers.strategies import CPU, make_geometry

GEOMETRY = make_geometry(page_size=4, kv_heads=2, head_dim=3, dtype=torch.float32)


def numbered_pool(pages: int = 5) -> KVPool:
    """Return a pool whose numbers are all different and not zero."""
    pool = KVPool(GEOMETRY, pages, CPU)
    count = pool.keys.numel()
    pool.keys.copy_(1 + torch.arange(count).view_as(pool.keys))
    pool.values.copy_(1 + count + torch.arange(count).view_as(pool.values))
    return pool


def states(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return [B, Hkv, S, D] in the layout of a model's projections: tokens before heads."""
    shape = (batch, tokens, GEOMETRY.kv_heads, GEOMETRY.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).transpose(1, 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_new_pool_is_zero(dtype: torch.dtype) -> None:
    """Never uninitialised: a NaN in an unused V slot reaches outputs as 0 * NaN."""
    pool = KVPool(make_geometry(dtype=dtype), 7, CPU)
    assert pool.keys.dtype == pool.values.dtype == dtype
    assert not pool.keys.any()
    assert not pool.values.any()


def test_the_pool_has_the_shape_that_attention_reads() -> None:
    pool = KVPool(GEOMETRY, 5, CPU)
    assert pool.keys.shape == pool.values.shape == (1, 2, 5 * 4, 3)
    assert pool.pages == 5


def test_pool_bytes_follow_from_the_geometry() -> None:
    assert KVPool(GEOMETRY, 5, CPU).nbytes == 5 * GEOMETRY.bytes_per_page


def test_keys_and_values_share_no_memory() -> None:
    pool = KVPool(GEOMETRY, 5, CPU)
    pool.keys.fill_(1)
    assert not pool.values.any()


# -- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 6), (3, 1), (3, 2)])
def test_write_changes_only_the_named_slots(batch: int, tokens: int) -> None:
    pool = numbered_pool()
    keys, values = states(batch, tokens), -states(batch, tokens)
    slots = torch.tensor([17, 4, 9, 6, 19, 11])[: batch * tokens]
    expected_keys, expected_values = pool.keys.clone(), pool.values.clone()
    for number, slot in enumerate(slots):
        row, token = divmod(number, tokens)
        expected_keys[0, :, slot] = keys[row, :, token]
        expected_values[0, :, slot] = values[row, :, token]
    pool.write(slots, keys, values)
    assert torch.equal(pool.keys, expected_keys)
    assert torch.equal(pool.values, expected_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_states_of_another_dtype_are_converted(dtype: torch.dtype) -> None:
    """autocast passes half types to a float32 cache."""
    pool = numbered_pool()
    keys = states(1, 2, dtype)
    pool.write(torch.tensor([5, 6]), keys, keys)
    assert torch.equal(pool.keys[0, :, 5:7], keys[0].float())


@pytest.mark.parametrize("slot", [-1, -20, 20, 2**40])
def test_a_slot_outside_the_pool_is_refused(slot: int) -> None:
    """Seen in torch PagedAttention.assign: page -1 wraps to the last page, of another sequence."""
    pool = numbered_pool()
    before = pool.keys.clone()
    with pytest.raises(IndexError):
        pool.write(torch.tensor([slot]), states(1, 1), states(1, 1))
    assert torch.equal(pool.keys, before)


def test_what_overflows_in_the_pools_dtype_is_not_finite() -> None:
    pool = KVPool(make_geometry(page_size=4, dtype=torch.float16), 2, torch.device("cpu"))
    keys = torch.full((1, pool.keys.shape[1], 1, pool.keys.shape[3]), 1e6)
    assert pool.write(torch.tensor([4]), keys, torch.ones_like(keys)).tolist() == [[False]]
    assert not pool.keys.any()


def test_write_needs_one_slot_per_token() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        numbered_pool().write(torch.tensor([5]), states(1, 2), states(1, 2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_are_stored_as_zero(value: float) -> None:
    """Seen in flash-attention and vLLM: NaN in the tail of the last page leaks as 0 * NaN."""
    pool = numbered_pool()
    keys, values = states(2, 2), states(2, 2)
    keys[0, 1, 1, 2], values[1, 0, 0, 2] = value, value
    slots = torch.tensor([5, 6, 9, 10])
    assert pool.write(slots, keys, values).tolist() == [[True, False], [False, True]]
    for stored, new in ((pool.keys, keys), (pool.values, values)):
        expected = new.where(new.isfinite(), 0).transpose(0, 1).flatten(1, 2)
        assert torch.equal(stored[0][:, slots], expected)


# -- copying ------------------------------------------------------------------------------------


def by_page(pool: KVPool) -> torch.Tensor:
    """Return keys and values by page, [2, Hkv, pages, page_size * D]."""
    return torch.stack([pool.keys[0], pool.values[0]]).view(2, 2, pool.pages, -1).clone()


def test_copy_pages_copies_whole_pages_of_keys_and_values() -> None:
    pool = numbered_pool()
    expected = by_page(pool)
    expected[:, :, [4, 3]] = expected[:, :, [1, 2]]
    pool.copy_pages(torch.tensor([1, 2]), torch.tensor([4, 3]))
    assert torch.equal(by_page(pool), expected)


def test_one_page_can_be_copied_to_several() -> None:
    pool = numbered_pool()
    expected = by_page(pool)
    expected[:, :, [2, 4]] = expected[:, :, [1, 1]]
    pool.copy_pages(torch.tensor([1, 1]), torch.tensor([2, 4]))
    assert torch.equal(by_page(pool), expected)


OUTSIDE, INSIDE = torch.tensor([5]), torch.tensor([1])


@pytest.mark.parametrize(
    ("operation", "pages"),
    [
        ("copy_pages", (OUTSIDE, INSIDE)),
        ("copy_pages", (INSIDE, OUTSIDE)),
        ("copy_pages", (-INSIDE, INSIDE)),
        ("copy_pages", (INSIDE, -INSIDE)),
    ],
)
def test_a_page_outside_the_pool_is_refused(operation: str, pages: tuple[torch.Tensor]) -> None:
    pool = numbered_pool()
    before = by_page(pool)
    with pytest.raises((IndexError, RuntimeError)):
        getattr(pool, operation)(*pages)
    assert torch.equal(by_page(pool), before)


# -- resizing -----------------------------------------------------------------------------------


def test_a_grown_pool_keeps_its_pages_and_adds_zeros() -> None:
    pool = numbered_pool(5)
    before = by_page(pool)
    pool.resize(9)
    assert torch.equal(by_page(pool)[:, :, :5], before)
    assert not by_page(pool)[:, :, 5:].any()


def test_a_pool_of_the_same_size_is_not_reallocated() -> None:
    """A captured graph holds its address."""
    pool = numbered_pool(5)
    before = pool.keys.data_ptr(), pool.values.data_ptr()
    pool.resize(5)
    assert (pool.keys.data_ptr(), pool.values.data_ptr()) == before


def test_a_shrunken_pool_works_and_can_grow_again() -> None:
    pool = numbered_pool(5)
    before = by_page(pool)
    pool.resize(3)
    assert pool.pages == 3
    pool.copy_pages(torch.tensor([1]), torch.tensor([2]))
    pool.resize(5)
    expected = torch.cat([before[:, :, [0, 1, 1]], torch.zeros_like(before[:, :, 3:])], dim=2)
    assert torch.equal(by_page(pool), expected)


# -- pools beyond 32 bits -----------------------------------------------------------------------

META = torch.device("meta")
HUGE = make_geometry(page_size=128, kv_heads=4, head_dim=128, dtype=torch.bfloat16)
PAGES_OF_2_31 = 2**31 // (128 * 4 * 128)  # K alone has 2**31 numbers


def huge_pool(geometry: CacheGeometry = HUGE) -> KVPool:
    """Return a pool with shapes and strides but no memory."""
    return KVPool(geometry, PAGES_OF_2_31, META)


def test_a_pool_of_2_31_numbers_has_the_right_size() -> None:
    """Seen in vLLM and torch: 32-bit offsets wrap."""
    pool = huge_pool()
    assert pool.keys.numel() == 2**31
    assert pool.nbytes == 2 * 2 * 2**31
    assert pool.pages == PAGES_OF_2_31


@pytest.mark.parametrize(("pages", "forced"), [(PAGES_OF_2_31 - 1, None), (PAGES_OF_2_31, True)])
def test_pools_beyond_32_bits_do_not_use_the_decode_kernel(pages: int, forced) -> None:
    """FlexAttention's decode kernel does not compile for 64-bit offsets (torch 2.11)."""
    mask = paged_block_mask(
        torch.zeros(1, 4, dtype=torch.int32),
        torch.full((8,), -1, dtype=torch.int32),
        torch.zeros(1, 1, dtype=torch.int32),
        page_size=128,
        group=3,
    )
    options = kernel_options(mask, KVPool(HUGE, pages, META).keys)
    assert options.get("FORCE_USE_FLEX_ATTENTION") is forced
