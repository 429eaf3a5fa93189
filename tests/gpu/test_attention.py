"""Compiled kernels against float64, at every geometry of the family and at awkward ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from granite_paged.bench.cases import Shape
from granite_paged.bench.kernel import KernelCase
from granite_paged.errors import GeometryError
from granite_paged.geometry import PagedConfig
from granite_paged.models import geometry_config
from tests.helpers import faults
from tests.helpers.paged_case import PagedCase
from tests.helpers.tolerance import SDPA_RATIO

HALF = torch.bfloat16
RAGGED = (700, 1, 257, 130)

KERNELS: dict[str, tuple[Any, ...]] = {
    "1b decode": (RAGGED, 1, 128, 4, 3, 128, HALF),
    "1b prefill": ((300, 700), 300, 128, 4, 3, 128, HALF),
    "1b chunked prefill": ((4000, 2500), 1024, 128, 4, 3, 128, HALF),
    "350m decode": (RAGGED, 1, 128, 4, 3, 64, HALF),
    "micro decode": (RAGGED, 1, 128, 8, 5, 64, HALF),
    "micro prefill": ((300, 40), 300, 128, 8, 5, 64, HALF),
    "group 1": (RAGGED, 1, 64, 2, 1, 128, HALF),
    "group 2": (RAGGED, 7, 64, 2, 2, 64, HALF),
    "group 4, page 256": ((900, 300), 200, 256, 8, 4, 64, HALF),
    "group 8, head 96": ((130, 90, 700), 7, 64, 2, 8, 96, HALF),
    "group 12": (RAGGED, 3, 32, 1, 12, 64, HALF),
    "head 96 prefill": ((130, 200), 200, 32, 2, 3, 96, HALF),
    "page 16": (RAGGED, 1, 16, 4, 3, 128, HALF),
    "float16": ((130, 90, 700), 200, 32, 2, 5, 64, torch.float16),
    "float32 decode": (RAGGED, 1, 128, 4, 3, 128, torch.float32),
    "float32 prefill": ((300, 70), 300, 64, 2, 3, 96, torch.float32),
    "float64 is eager": ((300, 70), 30, 64, 2, 3, 64, torch.float64),
    "32k decode": ((32768, 5, 20000), 1, 128, 4, 3, 128, HALF),
    "32k chunked prefill": ((32768,), 256, 128, 4, 3, 128, HALF),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_is_as_accurate_as_sdpa(name: str) -> None:
    case = PagedCase(*KERNELS[name])
    ours, sdpa = case.errors()
    assert ours <= max(SDPA_RATIO * sdpa, torch.finfo(torch.float64).eps), (ours, sdpa)


@pytest.mark.parametrize("queries", [1, 300])
def test_a_pool_beyond_32_bit_offsets_works(queries: int) -> None:
    kv_heads, head_dim, page_size = 4, 128, 128
    pages = 2**31 // (kv_heads * head_dim * page_size) + 64
    case = PagedCase((700, 3000), queries, page_size, kv_heads, 3, head_dim, HALF, pages)
    assert case.keys.numel() > 2**31
    ours, sdpa = case.errors()
    assert ours <= SDPA_RATIO * sdpa


@pytest.mark.parametrize(
    ("batch", "context", "kernels"), [(1, 4096, 3), (8, 4096, 3), (32, 4096, 1)]
)
def test_a_decode_step_launches_the_fewest_kernels(batch: int, context: int, kernels: int) -> None:
    """FlexAttention launches one kernel. Split rows add one that combines their parts, and one that
    scales the logsumexp of these."""
    shape = SimpleNamespace(config=geometry_config("granite-4.0-h-1b"), dtype=HALF)
    case = KernelCase(shape, PagedConfig(), Shape(batch, context), 0, torch.device("cuda"))
    with torch.inference_mode():
        case.paged()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            case.paged()
            torch.cuda.synchronize()
    launched = [e.name for e in recorded.events() if e.device_type == DeviceType.CUDA]
    assert len(launched) == kernels, launched


def test_nan_in_foreign_and_free_pages_reaches_no_output() -> None:
    case = PagedCase(RAGGED, 1, 128, 4, 3, 128, HALF)
    expected = case.ours()
    kept = torch.zeros(case.keys.shape[2], dtype=torch.bool, device="cuda")
    for own in case.pages:  # whole pages, since the cache keeps their tails finite
        slots = own[:, None] * case.page_size + torch.arange(case.page_size)
        kept[slots.flatten().cuda()] = True
    case.keys[:, :, ~kept] = torch.nan
    case.values[:, :, ~kept] = torch.nan
    assert torch.equal(case.ours(), expected)


def test_a_partial_page_taken_as_full_is_detected() -> None:
    case = PagedCase((300, 70), 1, 128, 4, 3, 128, HALF)
    with faults.partial_page_taken_as_full():
        ours, sdpa = case.errors()
    assert ours > 10 * sdpa


def test_a_page_too_small_for_the_kernel_is_refused() -> None:
    case = PagedCase((30, 7), 1, 8, 2, 3, 64, HALF)
    with pytest.raises(GeometryError, match="at least 16"):
        case.ours()
