"""Bugs that other projects shipped, tested on live models.

Each docstring names the issue or pull request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import DynamicCache

from granite_paged import PagedCache, PagedConfig, paged
from granite_paged.errors import CacheReleased, NonFinite, PaddingError
from granite_paged.hf.compat import with_cache
from granite_paged.layers import attention
from granite_paged.layers.mamba import MambaRows
from tests.helpers.tiny_models import FLAVOURS, SIZES, VOCABULARY, prompts, tiny_model
from tests.helpers.tolerance import LOGITS_FLOAT32, largest_error

PAGES = PagedConfig(page_size=4)
CHUNK = SIZES["mamba_chunk_size"]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    hybrid = tiny_model().requires_grad_(False)
    with paged(hybrid, PAGES):
        yield hybrid


def fresh(model: Any) -> PagedCache:
    return PagedCache.for_model(model, PAGES)


def draw(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)


# -- Mamba states -------------------------------------------------------------------------------


def test_right_padding_is_refused_before_mamba_states_change(model: Any) -> None:
    """transformers #48256: dt is not masked, so the state decays over padding on the right."""
    ids, mask = prompts((12, 7))
    own = fresh(model)
    with pytest.raises(PaddingError, match="on the right of row 1"):
        model(ids.flip(1), attention_mask=mask.flip(1), **with_cache(own))
    assert not own.is_initialized
    assert sum(layer.nbytes for layer in own.layers if isinstance(layer, MambaRows)) == 0


def test_right_padding_would_give_wrong_logits() -> None:
    """Mutation test of the above: in transformers' own cache the next logits are wrong."""
    model = tiny_model().requires_grad_(False)
    ids, token = draw(1, 12), torch.tensor([[7]])
    alone = DynamicCache(config=model.config)
    model(ids, **with_cache(alone))
    expected = model(token, **with_cache(alone)).logits
    padded, mask = DynamicCache(config=model.config), torch.ones(1, 18, dtype=torch.long)
    mask[:, 12:] = 0
    model(torch.nn.functional.pad(ids, (0, 6)), attention_mask=mask, **with_cache(padded))
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    actual = model(
        token,
        attention_mask=mask,
        position_ids=torch.tensor([[12]]),
        **with_cache(padded),
    ).logits
    assert largest_error(actual, expected) > 0.01


@pytest.mark.parametrize("flavour", ["hybrid", "rotary"])
@pytest.mark.parametrize("chunks", [(16,) * 6, (32, 64), (80, 16), (48, 48)])
def test_chunked_prefill_keeps_mamba_states(flavour: str, chunks: tuple[int, ...]) -> None:
    """transformers #46032: all states but those of the last chunk were lost."""
    assert all(columns % CHUNK == 0 for columns in chunks)
    model, ids, token = tiny_model(flavour).requires_grad_(False), draw(2, 96), draw(2, 1, seed=1)
    with paged(model, PAGES):
        whole, parts = fresh(model), fresh(model)
        expected = [model(ids, **with_cache(whole)).logits]
        actual = [model(part, **with_cache(parts)).logits for part in ids.split(chunks, dim=1)]
        expected.append(model(token, **with_cache(whole)).logits)
        actual.append(model(token, **with_cache(parts)).logits)
    assert largest_error(torch.cat(actual, dim=1), torch.cat(expected, dim=1)) <= LOGITS_FLOAT32


def test_lost_mamba_states_are_detected(model: Any) -> None:
    """Mutation test of the above."""
    ids = draw(2, 96)
    expected = model(ids, **with_cache(fresh(model))).logits[:, 48:]
    own = fresh(model)
    model(ids[:, :48], **with_cache(own))
    for layer in own.layers:
        if isinstance(layer, MambaRows):
            layer.recurrent_states[0].zero_()
    actual = model(ids[:, 48:], **with_cache(own)).logits
    assert largest_error(actual, expected) > 100 * LOGITS_FLOAT32


@pytest.mark.parametrize("first", ["tokens", "chunk"])
def test_a_reset_cache_starts_the_next_sequence_from_zero_states(model: Any, first: str) -> None:
    """vLLM PR #56524: a slot kept the state of its last owner."""
    own = fresh(model)
    model(draw(3, 40, seed=1), **with_cache(own))
    model(draw(3, 1, seed=2), **with_cache(own))
    own.reset()
    columns = [1] * 9 if first == "tokens" else [9]
    ids, new = draw(3, 9, seed=3), fresh(model)
    parts = ids.split(columns, dim=1)
    actual = torch.cat([model(part, **with_cache(own)).logits for part in parts], dim=1)
    expected = torch.cat([model(part, **with_cache(new)).logits for part in parts], dim=1)
    assert largest_error(actual, expected) <= LOGITS_FLOAT32


def test_states_that_survive_a_reset_are_detected(model: Any) -> None:
    """Mutation test of the above."""
    own = fresh(model)
    model(draw(3, 40, seed=1), **with_cache(own))
    with mock.patch.object(MambaRows, "reset", return_value=None):
        own.reset()
    token = draw(3, 1, seed=3)
    actual = model(token, **with_cache(own)).logits
    expected = model(token, **with_cache(fresh(model))).logits
    assert largest_error(actual, expected) > 100 * LOGITS_FLOAT32


# -- logits, not argmax -------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_cached_and_uncached_logits_agree_at_every_position(flavour: str) -> None:
    """vLLM #43090: at a near-tie the argmax proves nothing, so logits are compared."""
    model, ids = tiny_model(flavour).requires_grad_(False), draw(2, 53)
    expected = model(ids, use_cache=False).logits
    with paged(model, PAGES):
        own = fresh(model)
        parts = ids.split([CHUNK, 2 * CHUNK, *[1] * 5], dim=1)
        actual = torch.cat([model(part, **with_cache(own)).logits for part in parts], dim=1)
    assert largest_error(actual, expected) <= LOGITS_FLOAT32


def test_logits_agree_even_at_a_tie() -> None:
    """Two tokens have logits that are equal up to rounding, so that a near-tie is certain."""
    model, ids = tiny_model(tie_word_embeddings=False).requires_grad_(False), draw(1, 37)
    best = int(model(ids, use_cache=False).logits[0, -1].argmax())
    model.lm_head.weight[best - 1] = model.lm_head.weight[best]
    expected = model(ids, use_cache=False).logits
    with paged(model, PAGES):
        own = fresh(model)
        parts = ids.split([CHUNK, CHUNK, 5], dim=1)
        actual = torch.cat([model(part, **with_cache(own)).logits for part in parts], dim=1)
    first, second = expected[0, -1].topk(2).values
    assert first - second <= LOGITS_FLOAT32 * first.abs(), (
        "the two best logits are not tied, so nothing is tested"
    )
    assert largest_error(actual, expected) <= LOGITS_FLOAT32


# -- compiling ----------------------------------------------------------------------------------


def test_a_step_past_the_recompile_limit_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At dynamo's limit, compiled FlexAttention silently becomes eager. Ours must not."""
    monkeypatch.setattr(attention, "RECOMPILE_LIMIT", 0)
    model = tiny_model().requires_grad_(False)
    config = PagedConfig(page_size=16, backend="compiled")
    with paged(model, config):
        own = PagedCache.for_model(model, config)
        with pytest.raises(FailOnRecompileLimitHit):
            model(draw(1, 23), **with_cache(own))
        with pytest.raises(CacheReleased):
            model(draw(1, 23), **with_cache(own))


def test_the_compiled_call_is_fullgraph_and_static() -> None:
    with mock.patch.object(torch, "compile") as compile_:
        attention._compiled.__wrapped__(attention._fused)
    assert compile_.call_args.kwargs == {"fullgraph": True, "dynamic": False}


# -- releasing ----------------------------------------------------------------------------------


def test_nan_does_not_reach_a_later_owner_of_the_page() -> None:
    """vLLM PR #53856, flash-attention #2374: 0 * NaN in the tail of a partly filled page is NaN."""
    model = tiny_model().requires_grad_(False)
    with paged(model, PAGES):
        own = fresh(model)
        with pytest.raises(NonFinite):
            model(inputs_embeds=torch.full((3, 14, 48), torch.nan), **with_cache(own))
        assert all(pool.keys.isfinite().all() for pool in own.store.pools.values())
        assert all(pool.values.isfinite().all() for pool in own.store.pools.values())
        own.reset()
        ids, mask = prompts((9, 5, 2))
        actual = model(ids, attention_mask=mask, **with_cache(own)).logits
        expected = model(ids, attention_mask=mask, **with_cache(fresh(model))).logits
    assert largest_error(actual[mask.bool()], expected[mask.bool()]) <= LOGITS_FLOAT32


def test_releasing_twice_frees_pages_once(model: Any) -> None:
    """torch 2.15 `erase`, transformers `free_blocks`: a page freed twice has two owners."""
    own = fresh(model)
    model(draw(3, 10), **with_cache(own))
    own.reorder_cache(torch.tensor([0, 0, 1]))
    own.reset()
    own.reset()
    own.check_valid()
    model(draw(5, 9), **with_cache(own))
    own.check_valid()
    pages = [page for s in own.sequences for page in own.allocator.pages_of(s)]
    assert len(pages) == len(set(pages)) == own.allocator.held
