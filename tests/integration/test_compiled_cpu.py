"""The compiled kernel on the CPU: few cases, since each shape takes seconds to compile."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._inductor.exc import InductorError

from granite_paged.layers import attention
from tests.helpers.strategies import PagedSequences, Step, assert_right, make_geometry

PAST = (37, 5, 16)
HALF_ROUNDINGS = 2
"""The kernel rounds both the softmax weights and its output to the half type."""


def make(
    added: int = 1, seed: int = 0, **geometry: object
) -> tuple[PagedSequences, dict[int, int], Step]:
    """Make a step, by default always of the same shapes, so that decode is compiled only once."""
    sizes = {"page_size": 16, "head_dim": 64, "dtype": torch.float32, **geometry}
    paged = PagedSequences(make_geometry(**sizes), seed=seed)
    growth = {paged.open(tokens): added for tokens in PAST}
    return paged, growth, paged.step(growth)


def test_compiled_decode_is_right() -> None:
    paged, added, step = make()
    assert_right(paged, step, added, step.attend(backend="compiled"))


def test_a_step_of_the_same_shape_does_not_recompile() -> None:
    """Page tables, positions and masks are data; only shapes may be compiled."""
    make()[2].attend(backend="compiled")
    paged, added, step = make(seed=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = step.attend(backend="compiled")
    assert_right(paged, step, added, out)


def test_a_compiled_step_ignores_foreign_pages_and_tails() -> None:
    """Foreign pages are never read, so NaN there is harmless. Tails of a row's own pages are read
    with weight 0: they may hold any finite number, and a pool holds only finite numbers."""
    paged, added, step = make()
    unread = paged.unread_slots(added)
    own_pages = [page for sequence in added for page in paged.allocator.pages_of(sequence)]
    tails = torch.zeros_like(unread).view(-1, 16)
    tails[own_pages] = True
    tails = tails.flatten() & unread
    keys, values = step.keys.clone(), step.values.clone()
    keys[:, :, unread] = values[:, :, unread] = torch.nan
    keys[:, :, tails] = values[:, :, tails] = 1e30
    out = step.replace(keys=keys, values=values).attend(backend="compiled")
    assert torch.equal(out, step.attend(backend="compiled"))


def test_the_recompile_limit_raises_instead_of_falling_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen in torch: past the limit, compiled FlexAttention becomes eager with only a log line."""
    make()[2].attend(backend="compiled")
    monkeypatch.setattr(attention, "RECOMPILE_LIMIT", 1)
    other = make(kv_heads=1)[2]
    with pytest.raises(FailOnRecompileLimitHit):
        other.attend(backend="compiled")


def test_compiled_prefill_is_right() -> None:
    paged, added, step = make(added=45)
    assert_right(paged, step, added, step.attend(backend="compiled"))


def test_compiled_bfloat16_decode_is_right() -> None:
    paged, added, step = make(dtype=torch.bfloat16, head_dim=96)
    out = step.attend(backend="compiled")
    assert_right(paged, step, added, out, roundings=HALF_ROUNDINGS)


def test_compiled_decode_with_narrow_heads_is_right() -> None:
    paged, added, step = make(head_dim=16)
    assert_right(paged, step, added, step.attend(backend="compiled"))


def traced(step: Step) -> torch.Tensor:
    """Attend as a compiled layer does: no graph break, and no data of the host in the graph."""
    mask = step.mask()

    @torch.compile(fullgraph=True, dynamic=False)
    def layer(query: torch.Tensor) -> torch.Tensor:
        return attention.paged_attention(
            query, step.keys, step.values, mask, scale=step.scale, backend="eager"
        )

    return layer(step.query)


def test_attention_works_inside_a_traced_region() -> None:
    paged, added, step = make()
    assert_right(paged, step, added, traced(step))


def test_small_pages_are_refused_inside_a_traced_region() -> None:
    """With AVX2, torch's kernel would write past its block."""
    with pytest.raises(Unsupported, match="GeometryError"):
        traced(make(page_size=8)[2])


def test_the_compiled_kernel_needs_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/limits.md says so, and torch refuses by itself."""
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    _, _, step = make(added=2, page_size=32)  # a shape that no other test compiles
    with pytest.raises(InductorError, match="not supported for CPU"):
        step.attend(backend="compiled")
