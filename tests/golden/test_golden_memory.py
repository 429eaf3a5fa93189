"""KV memory of a ragged load, to the byte: a gate on the cost of paging.

Lengths are drawn with a fixed seed, and the allocator decides the pages. A difference means that
users need more memory, or less.
"""

from __future__ import annotations

import pytest
import torch

from granite_paged.geometry import CacheGeometry
from granite_paged.models import geometry_config
from granite_paged.verify import KVMemory, kv_memory
from tests.helpers.tolerance import WASTE

PAGE_SIZES = (16, 32, 64, 128, 256)
MODELS = ("granite-4.0-h-350m", "granite-4.0-h-1b", "granite-4.0-h-small", "granite-4.0-1b")


def of(model: str, page_size: int) -> KVMemory:
    config = geometry_config(model)
    geometry = CacheGeometry.from_config(config, page_size=page_size, dtype=torch.bfloat16)
    return kv_memory(geometry, seed=0)


@pytest.mark.parametrize("model", MODELS)
def test_kv_memory_of_256_ragged_sequences(model: str, golden_table) -> None:
    lines = ["bfloat16, 256 sequences of 1 to 4096 tokens", ""]
    for page_size in PAGE_SIZES:
        kv = of(model, page_size)
        lines.append(
            f"pages of {page_size:>3}: {kv.bytes_paged:>14,} bytes in pages, "
            f"{kv.bytes_contiguous:>14,} padded, waste {kv.waste_fraction:.4%}"
        )
    assert golden_table == "\n".join(lines) + "\n"


@pytest.mark.parametrize("page_size", [size for size in PAGE_SIZES if size <= 128])
def test_pages_of_up_to_128_tokens_waste_little(page_size: int) -> None:
    assert of("granite-4.0-h-1b", page_size).waste_fraction <= WASTE
