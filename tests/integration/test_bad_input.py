"""Bad input raises one of our errors with a one-line message, and everything stays usable."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged import PagedCache, PagedConfig, is_patched, paged, patch
from granite_paged.errors import (
    CacheReleased,
    GeometryError,
    GranitePagedError,
    InvalidRequest,
    NonFinite,
    NotPatched,
    OutOfPages,
    OutOfRows,
    PaddingError,
    PromptError,
)
from granite_paged.geometry import CacheGeometry
from granite_paged.hf.compat import with_cache
from tests.helpers.tiny_models import PAD, VOCABULARY, prompts, tiny_model
from tests.helpers.tolerance import assert_same_logits

PAGE = 4
PAGES = PagedConfig(page_size=PAGE)
LENGTHS = (21, 16, 8)
NEXT = torch.tensor([[7], [30], [51]])


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    hybrid = tiny_model().requires_grad_(False)
    with paged(hybrid, PAGES):
        yield hybrid


def fresh(model: Any, **options: Any) -> PagedCache:
    return PagedCache.for_model(model, PagedConfig(**{"page_size": PAGE, **options}))


def filled(model: Any, **options: Any) -> PagedCache:
    own = fresh(model, **options)
    ids, mask = prompts(LENGTHS)
    model(ids, attention_mask=mask, **with_cache(own))
    return own


def more(mask: Tensor, columns: int = 1, value: int = 1) -> Tensor:
    return torch.nn.functional.pad(mask, (0, columns), value=value)


def state(own: PagedCache) -> tuple[Any, ...]:
    """Return everything that a refused call must not change."""
    own.check_valid()
    tables = [own.allocator.pages_of(sequence) for sequence in own.sequences]
    slots = [page * PAGE + i for table in tables for page in table for i in range(PAGE)]
    stored = [pool.keys[:, :, slots].tolist() for pool in own.store.pools.values()]
    return own.sequences, tables, own.get_seq_length(), own.allocator.held, stored


def refused(
    kind: type[GranitePagedError], match: str, model: Any, own: PagedCache, **inputs: Any
) -> GranitePagedError:
    """Run a step that must be refused with a one-line message and an unchanged cache."""
    before = state(own)
    with pytest.raises(kind, match=match) as caught:
        model(**with_cache(own), **inputs)
    assert "\n" not in str(caught.value)
    assert state(own) == before
    return caught.value


def assert_goes_on(model: Any, own: PagedCache) -> None:
    """Check that the next step answers as if nothing had been refused."""
    mask = more(prompts(LENGTHS)[1])
    actual = model(NEXT, attention_mask=mask, **with_cache(own)).logits
    expected = model(NEXT, attention_mask=mask, **with_cache(filled(model))).logits
    assert_same_logits(actual, expected)


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [12, 0, -16, 3])
def test_page_size_must_be_a_power_of_two(page_size: int) -> None:
    with pytest.raises(GeometryError, match=rf"page_size must be .*, got {page_size}$"):
        PagedConfig(page_size=page_size)


def test_max_tokens_must_hold_one_page() -> None:
    with pytest.raises(GeometryError, match="max_tokens must be at least page_size 128, got 100"):
        PagedConfig(page_size=128, max_tokens=100)


@pytest.mark.parametrize(
    "options", [{"memory_fraction": 0.0}, {"memory_fraction": 1.1}, {"max_sequences": 0}]
)
def test_an_impossible_budget_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(GeometryError, match=next(iter(options))):
        PagedConfig(**options)


def test_a_pool_too_small_names_both_numbers_and_stays_usable(
    model: Any,
) -> None:
    own = filled(model, max_tokens=56)  # 14 pages, 12 of them held
    ids = prompts((10, 10, 10), seed=3)[0]
    mask = prompts(LENGTHS)[1]
    error = refused(
        OutOfPages,
        "out of pages: 8 needed, 2 free; raise PagedConfig.max_tokens",
        model,
        own,
        input_ids=ids,
        attention_mask=more(mask, 10),
    )
    assert isinstance(error, OutOfPages)
    assert (error.needed, error.free) == (8, 2)
    assert_goes_on(model, own)


def test_a_prompt_longer_than_the_pool_is_refused(model: Any) -> None:
    own = fresh(model, max_tokens=20)
    refused(OutOfPages, "6 needed, 5 free", model, own, input_ids=prompts((21,))[0])
    assert not own.is_initialized
    out = model(prompts((20,))[0], **with_cache(own))
    assert out.logits.isfinite().all()


def test_generate_refuses_a_prompt_longer_than_the_pool() -> None:
    model = tiny_model().requires_grad_(False)
    with paged(model, PagedConfig(page_size=PAGE, max_tokens=20)):
        with pytest.raises(OutOfPages, match="6 needed, 5 free"):
            model.generate(prompts((21,))[0], max_new_tokens=2)
        out = model.generate(prompts((12,))[0], max_new_tokens=8, min_new_tokens=8)
    assert out.shape == (1, 20)


def test_a_batch_larger_than_max_sequences_is_refused(model: Any) -> None:
    own = fresh(model, max_sequences=2)
    ids, mask = prompts(LENGTHS)
    error = refused(
        OutOfRows, "batch has 3 .* 2 rows", model, own, input_ids=ids, attention_mask=mask
    )
    assert isinstance(error, OutOfRows)
    assert (error.needed, error.rows) == (3, 2)
    assert model(ids[:2], **with_cache(own)).logits.shape[0] == 2


def test_more_forks_than_max_sequences_are_refused(model: Any) -> None:
    own = filled(model, max_sequences=5)
    before = state(own)
    with pytest.raises(OutOfRows) as caught:
        own.batch_repeat_interleave(2)
    assert (caught.value.needed, caught.value.rows) == (6, 5)
    assert state(own) == before
    assert_goes_on(model, own)


# -- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [VOCABULARY, 2**40, -1])
@pytest.mark.parametrize("turn", ["first", "later"])
def test_a_token_outside_the_vocabulary_is_refused(model: Any, token: int, turn: str) -> None:
    own = fresh(model) if turn == "first" else filled(model)
    ids, mask = prompts(LENGTHS)
    mask = mask if turn == "first" else torch.cat([mask, mask], dim=1)
    ids[1, -1] = token
    match = f"token {token} is outside the vocabulary of {VOCABULARY}"
    refused(PromptError, match, model, own, input_ids=ids, attention_mask=mask)


def test_a_one_token_prompt_outside_the_vocabulary_is_refused(model: Any) -> None:
    refused(PromptError, "outside", model, fresh(model), input_ids=torch.tensor([[VOCABULARY]]))


@pytest.mark.parametrize("shape", [(3, 0), (0, 5)])
def test_an_empty_prompt_is_refused(model: Any, shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.long)
    refused(PromptError, "empty prompt", model, fresh(model), input_ids=ids)


def test_generate_refuses_a_row_that_is_all_padding(model: Any) -> None:
    ids, mask = prompts(LENGTHS)
    mask[1] = 0
    with pytest.raises(PromptError, match="row 1 is all padding"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": torch.ones(5, dtype=torch.long)},
        {"input_ids": torch.ones(1, 2, 5, dtype=torch.long)},
        {"inputs_embeds": torch.ones(5, 48)},
    ],
    ids=["flat ids", "nested ids", "flat embeddings"],
)
def test_input_of_the_wrong_rank_is_refused(model: Any, inputs: dict[str, Tensor]) -> None:
    refused(InvalidRequest, r"must be \[batch, tokens\]", model, fresh(model), **inputs)


def test_missing_input_is_refused(model: Any) -> None:
    refused(PromptError, "neither input_ids nor inputs_embeds", model, fresh(model))


# -- masks --------------------------------------------------------------------------------------


def test_right_padding_is_refused_with_advice(model: Any) -> None:
    ids, mask = prompts(LENGTHS)
    error = refused(
        PaddingError,
        "padding on the right of row 1, 2",
        model,
        fresh(model),
        input_ids=ids.flip(1),
        attention_mask=mask.flip(1),
    )
    assert "padding_side = 'left'" in str(error)


def test_a_decode_step_that_pads_a_running_row_is_refused(model: Any) -> None:
    own = filled(model)
    mask = more(prompts(LENGTHS)[1])
    mask[2, -1] = 0
    match = "padding on the right of row 2"
    refused(PaddingError, match, model, own, input_ids=NEXT, attention_mask=mask)
    assert_goes_on(model, own)


def test_generate_refuses_right_padding(model: Any) -> None:
    ids, mask = prompts(LENGTHS)
    with pytest.raises(PaddingError, match="pad on the left"):
        model.generate(ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=2)


def test_a_mask_that_reveals_padding_is_refused(model: Any) -> None:
    own = filled(model)
    mask = more(prompts(LENGTHS)[1])
    mask[2] = 1
    match = "row 2 shows columns that were padding"
    refused(PaddingError, match, model, own, input_ids=NEXT, attention_mask=mask)
    assert_goes_on(model, own)


@pytest.mark.parametrize("shape", [(3, 1), (3, 21), (3, 23), (2, 22), (3, 22, 1)])
def test_a_mask_of_the_wrong_shape_is_refused(model: Any, shape: tuple[int, ...]) -> None:
    own = filled(model)
    refused(
        InvalidRequest,
        "attention_mask",
        model,
        own,
        input_ids=NEXT,
        attention_mask=torch.ones(shape, dtype=torch.long),
    )
    assert_goes_on(model, own)


def test_a_four_dimensional_mask_is_refused(model: Any) -> None:
    mask = torch.ones(3, 1, 21, 21).tril()
    refused(
        InvalidRequest,
        "2-D attention_mask",
        model,
        fresh(model),
        input_ids=prompts(LENGTHS)[0],
        attention_mask=mask,
    )


# -- numbers ------------------------------------------------------------------------------------


@pytest.fixture
def poisoned() -> Any:
    """Return a copy of the model to put NaN into."""
    return tiny_model().requires_grad_(False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
@pytest.mark.parametrize("layer", [1, 3])
def test_nan_in_keys_or_values_names_the_layer(
    poisoned: Any, layer: int, projection: str, value: float
) -> None:
    getattr(poisoned.model.layers[layer].self_attn, projection).weight[3, 5] = value
    with paged(poisoned, PAGES):
        own = fresh(poisoned)
        with pytest.raises(NonFinite, match=f"attention layer {layer}") as caught:
            poisoned(prompts((9,))[0], **with_cache(own))
        assert caught.value.layers[0] == layer
        assert "\n" not in str(caught.value)
        own.check_valid()
        assert own.allocator.held == 0
        with pytest.raises(CacheReleased, match=r"reset\(\)"):
            poisoned(NEXT[:1], **with_cache(own))


def test_numbers_that_are_not_finite_count_as_0_without_the_check(poisoned: Any) -> None:
    weight = poisoned.model.layers[1].self_attn.k_proj.weight
    config = PagedConfig(page_size=8, check_finite=False)
    shown = []
    for value in (float("nan"), float("inf")):
        weight[3, :] = value
        with paged(poisoned, config):
            own = PagedCache.for_model(poisoned, config)
            shown.append(poisoned(prompts((9,))[0], **with_cache(own)).logits)
    assert torch.isfinite(shown[0]).all()
    assert torch.equal(*shown)


LATE: dict[str, str] = {
    "model.layers.2.mamba.out_proj": "Mamba layer 2",
    "model.layers.3.mamba.in_proj": "Mamba layer 3",
    "model.layers.2.shared_mlp.output_linear": "Mamba layer 3",
    "model.layers.3.shared_mlp.input_linear": "the last norm",
    "model.norm": "the last norm",
    "lm_head": "the logits",
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", LATE)
def test_nan_after_the_last_attention_layer_names_the_part(name: str, value: float) -> None:
    kinds = ["mamba", "attention", "mamba", "mamba"]
    model = tiny_model(layer_types=kinds, tie_word_embeddings=False).requires_grad_(False)
    weight = model.get_submodule(name).weight
    healthy = weight.clone()
    ids = prompts((9,))[0]
    with paged(model, PAGES):
        own = fresh(model)
        answer = model.generate(ids, max_new_tokens=4, do_sample=False)
        weight[(7, 5)[: weight.ndim]] = value
        for run in (
            lambda: model(ids, **with_cache(own)),
            lambda: model.generate(ids, max_new_tokens=4, do_sample=False),
        ):
            with pytest.raises(NonFinite, match=f"in {LATE[name]}") as caught:
                run()
            assert not caught.value.layers
        assert own.allocator.held == 0
        with pytest.raises(CacheReleased, match=r"reset\(\)"):
            model(NEXT[:1], **with_cache(own))
        weight[:] = healthy
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), answer)


def test_numbers_that_are_not_finite_pass_where_they_are_not_checked() -> None:
    model = tiny_model().requires_grad_(False)
    model.model.norm.weight[5] = torch.nan
    with paged(model, PagedConfig(page_size=PAGE, check_finite=False)):
        assert model(prompts((9,))[0]).logits.isnan().any()


def test_a_cache_reset_after_nan_works_like_a_new_one(poisoned: Any) -> None:
    weight = poisoned.model.layers[1].self_attn.v_proj.weight
    healthy = weight.clone()
    ids, mask = prompts(LENGTHS)
    with paged(poisoned, PAGES):
        own = fresh(poisoned)
        weight[:] = torch.nan
        with pytest.raises(NonFinite):
            poisoned(ids, attention_mask=mask, **with_cache(own))
        weight[:] = healthy
        own.reset()
        again = poisoned(ids, attention_mask=mask, **with_cache(own)).logits
        expected = poisoned(ids, attention_mask=mask, **with_cache(fresh(poisoned))).logits
    assert_same_logits(again[mask.bool()], expected[mask.bool()])


# -- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["hybrid", "dense"])
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_our_cache_needs_a_patched_model(flavour: str, step: str) -> None:
    model = tiny_model(flavour).requires_grad_(False)
    ids = prompts((9,))[0]
    own = fresh(model)
    if step == "decode":  # the cache is used after its model is unpatched
        with paged(model, PAGES):
            model(ids, **with_cache(own))
    with pytest.raises(NotPatched, match="patched model only: use `with paged") as caught:
        model(ids if step == "prefill" else ids[:, :1], **with_cache(own))
    assert "\n" not in str(caught.value)
    own.check_valid()


def test_generate_with_our_cache_needs_a_patched_model() -> None:
    model = tiny_model()
    with pytest.raises(NotPatched):
        model.generate(prompts((9,))[0], **with_cache(fresh(model)), max_new_tokens=2)


@pytest.mark.parametrize("other", ["geometry", "dtype"])
def test_a_cache_of_another_model_is_refused(model: Any, other: str) -> None:
    stranger = tiny_model("dense") if other == "geometry" else tiny_model().bfloat16()
    stranger.requires_grad_(False)
    own = filled(model)
    with paged(stranger, PAGES):
        refused(
            GeometryError,
            r"another model, dtype or device: make one with PagedCache.for_model",
            stranger,
            own,
            input_ids=NEXT,
        )
    assert_goes_on(model, own)


def test_the_geometry_is_read_only_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = filled(model)
    monkeypatch.setattr(CacheGeometry, "from_config", None)
    model(NEXT, **with_cache(own))
    own.check_valid()


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_change_of_batch_size_is_refused(model: Any, rows: int) -> None:
    own = filled(model)
    ids = NEXT[:1].expand(rows, 1)
    match = f"holds 3 rows, the batch has {rows}"
    refused(InvalidRequest, match, model, own, input_ids=ids)
    assert_goes_on(model, own)


@pytest.mark.parametrize("columns", [1, 5, -3])
def test_cropping_is_refused(model: Any, columns: int) -> None:
    own = filled(model)
    with pytest.raises(InvalidRequest, match="cannot be cropped; fork it"):
        own.crop(columns)
    assert not own.is_croppable
    assert_goes_on(model, own)


def test_a_refused_model_is_left_unpatched() -> None:
    model = tiny_model()
    model.config.num_key_value_heads = 4
    with pytest.raises(GeometryError, match="6 query heads are no multiple of 4 KV heads"):
        patch(model, PAGES)
    assert not is_patched(model)


def test_a_config_is_checked_when_it_is_made() -> None:
    with pytest.raises(GeometryError):
        dataclasses.replace(PAGES, page_size=PAGE + 1)


def test_without_a_mask_padding_ids_are_ordinary_tokens(model: Any) -> None:
    """Tokens without a mask count, as under SDPA; padding is never guessed."""
    own = fresh(model)
    model(torch.full((1, 6), PAD), **with_cache(own))
    assert own.allocator.tokens == 6
