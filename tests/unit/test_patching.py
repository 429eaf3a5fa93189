"""What the hooks of a patched model check, note and reserve."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from granite_paged import PagedCache, PagedConfig, paged
from granite_paged.errors import (
    AlreadyPatched,
    CacheReleased,
    GeometryError,
    InferenceOnly,
    InvalidRequest,
    NonFinite,
    PromptError,
)
from granite_paged.geometry import CacheGeometry
from granite_paged.hf import exact, patching
from granite_paged.hf.compat import CACHE, with_cache
from granite_paged.hf.step import CacheStep
from granite_paged.layers.mamba import MambaSizes
from granite_paged.layers.one_token import ExactForward
from tests.helpers.tiny_models import VOCABULARY, cache_of, prompts, shortest_model, tiny_model

PAGES = PagedConfig(page_size=4)
LONG, ONE = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[5]])


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """A tiny model, patched for the whole file."""
    hybrid = shortest_model().requires_grad_(False)
    with paged(hybrid, PAGES):
        yield hybrid


def fresh(model: Any) -> PagedCache:
    return PagedCache.for_model(model, PAGES)


def nan(module: Any, args: Any, output: Tensor) -> Tensor:
    return output * torch.nan


# -- what is checked ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors",
    [
        {"input_ids": torch.tensor([5, 6])},
        {"input_ids": LONG[None]},
        {"inputs_embeds": torch.zeros(2, 48)},
        {"inputs_embeds": torch.zeros(1, 2, 1, 48)},
    ],
    ids=["ids of one dimension", "ids of three", "embeddings of two", "embeddings of four"],
)
def test_inputs_of_another_shape_are_refused(model: Any, tensors: dict[str, Tensor]) -> None:
    own = fresh(model)
    with pytest.raises(InvalidRequest, match=r"got \["):
        model.base_model(**tensors, **with_cache(own))
    assert not own.is_initialized


def test_a_step_without_input_is_refused(model: Any) -> None:
    with pytest.raises(PromptError, match="neither"):
        model.base_model(**with_cache(fresh(model)))


@pytest.mark.parametrize("dimensions", [1, 3, 4])
def test_a_mask_of_another_shape_is_refused(model: Any, dimensions: int) -> None:
    mask = torch.ones([1] * (dimensions - 1) + [5], dtype=torch.long)
    with pytest.raises(InvalidRequest, match="2-D attention_mask"):
        model.base_model(LONG, attention_mask=mask, **with_cache(fresh(model)))


def test_a_mask_that_is_no_tensor_is_refused(model: Any) -> None:
    mask = SimpleNamespace(ndim=2)
    with pytest.raises(InvalidRequest, match="2-D attention_mask"):
        model.base_model(LONG, attention_mask=mask, **with_cache(fresh(model)))


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("columns", [1, 2])
def test_a_token_outside_the_vocabulary_is_refused(model: Any, before: int, columns: int) -> None:
    """Except in a decode step, whose tokens were sampled."""
    own, ids = fresh(model), torch.full((1, columns), VOCABULARY)
    if before:
        model(LONG[:, :before], **with_cache(own))
    decodes = before and columns == 1
    with pytest.raises(IndexError if decodes else PromptError):
        model(ids, **with_cache(own))


def test_a_decode_step_may_feed_embeddings(model: Any) -> None:
    by_id, by_embedding = fresh(model), fresh(model)
    for own in (by_id, by_embedding):
        model(LONG, **with_cache(own))
    embedded = model.get_input_embeddings()(ONE)
    expected = model(ONE, **with_cache(by_id)).logits
    assert torch.equal(model(inputs_embeds=embedded, **with_cache(by_embedding)).logits, expected)


def test_an_empty_row_of_ids_is_refused(model: Any) -> None:
    with pytest.raises(PromptError, match="empty prompt"):
        model(LONG[:, :0], **with_cache(fresh(model)))


def test_options_of_the_call_come_before_those_of_the_config(model: Any) -> None:
    option = patching._option
    assert option(model, {"use_cache": False}, "use_cache") is False
    assert option(model, {"use_cache": None}, "use_cache") is True
    assert option(model, {}, "no_such_option") is False


def test_positional_arguments_have_the_names_of_the_decoders_forward() -> None:
    class Decoder:
        def forward(self, input_ids: Any, attention_mask: Any = None) -> None:
            """Do nothing."""

    assert patching._parameters(Decoder) == ("input_ids", "attention_mask")


def test_router_logits_are_refused_in_exact_mode_only() -> None:
    experts = shortest_model("experts").requires_grad_(False)
    with paged(experts, PagedConfig(page_size=4, exact=True)):
        experts.base_model(ONE)
        with pytest.raises(InvalidRequest, match="router logits"):
            experts.base_model(ONE, output_router_logits=True)
    with paged(experts, PAGES):
        assert experts.base_model(LONG, output_router_logits=True).router_logits is not None


def test_exact_mode_computes_every_part_token_by_token() -> None:
    own = shortest_model().requires_grad_(False)
    forward = mock.patch.object(exact, "mamba", wraps=exact.mamba)
    with forward as by_token, paged(own, PagedConfig(page_size=4, exact=True)):
        for module in (own.lm_head, own.model.norm, own.model.layers[0].shared_mlp):
            assert isinstance(vars(module)["forward"], ExactForward)
        own(LONG)
    assert by_token.call_count == 1
    with forward as by_token, paged(own, PAGES):
        own(LONG)
    by_token.assert_not_called()


def test_mamba_layers_keep_no_inputs_where_plain_pytorch_runs(model: Any) -> None:
    own = fresh(model)
    model(LONG, **with_cache(own))
    expected = MambaSizes.of(model.model.layers[0].mamba).state_bytes(torch.float32)
    assert own.layers[0].nbytes == expected


def test_gradients_are_refused_where_weights_require_them() -> None:
    own = shortest_model()
    with paged(own, PAGES):
        with pytest.raises(InferenceOnly, match="no_grad"):
            own(LONG)
        with torch.no_grad():
            own(LONG)
        own.requires_grad_(False)(LONG)


def test_only_a_patched_model_refuses_another_attention() -> None:
    own = shortest_model()
    with paged(own, PAGES):
        own.set_attn_implementation("sdpa")
        with pytest.raises(AlreadyPatched, match="'eager'"):
            own.set_attn_implementation("eager")
        kept = own.set_attn_implementation
    kept("eager")  # ours, which the user kept
    assert own.config._attn_implementation == "eager"


def test_a_cache_of_another_model_is_refused_after_a_step_too() -> None:
    own_model = shortest_model().requires_grad_(False)
    with paged(own_model, PAGES):
        own = fresh(own_model)
        own_model(LONG, **with_cache(own))
        own_model.double()
        with pytest.raises(GeometryError, match="another model, dtype or device"):
            own_model(ONE, **with_cache(own))


def test_a_cache_of_another_device_is_refused(model: Any) -> None:
    own = fresh(model)
    own.device = torch.device("meta")
    with pytest.raises(GeometryError, match="another model, dtype or device"):
        model(LONG, **with_cache(own))


def test_a_cache_is_compared_with_its_model_once(model: Any) -> None:
    own = fresh(model)
    with mock.patch.object(CacheGeometry, "from_config", wraps=CacheGeometry.from_config) as made:
        for ids in (LONG, ONE, ONE):
            model(ids, **with_cache(own))
    assert made.call_count == 1


def test_a_cache_of_a_model_with_an_equal_config_is_taken(model: Any) -> None:
    twin = shortest_model()
    own = fresh(twin)
    model(LONG, **with_cache(own))
    assert own.get_seq_length() == LONG.shape[1]


def test_a_step_that_fails_releases_its_pages_at_once(model: Any) -> None:
    own = fresh(model)
    with pytest.raises(IndexError), mock.patch.object(patching, "check_token_range"):
        model(torch.full((1, 3), VOCABULARY), **with_cache(own))
    assert not own.in_step
    assert own.allocator.held == 0
    with pytest.raises(CacheReleased, match="failed before it ended"):
        model(LONG, **with_cache(own))


# -- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("as_tuple", [False, True])
def test_nan_of_the_logits_alone_is_refused(model: Any, as_tuple: bool) -> None:
    own = fresh(model)
    hook = model.lm_head.register_forward_hook(nan)
    try:
        with pytest.raises(NonFinite, match="logits"):
            model(LONG, return_dict=not as_tuple, **with_cache(own))
    finally:
        hook.remove()
    assert own.allocator.held == 0


def test_nan_of_the_last_row_alone_is_refused(model: Any) -> None:
    hook = model.base_model.norm.register_forward_hook(
        lambda module, args, output: output.index_fill(0, torch.tensor([1]), torch.nan)
    )
    try:
        with pytest.raises(NonFinite, match="the last norm"):
            model.base_model(LONG.expand(2, -1), **with_cache(fresh(model)))
    finally:
        hook.remove()


def test_a_model_may_return_a_tuple(model: Any) -> None:
    first = model(LONG, return_dict=False, **with_cache(fresh(model)))[0]
    assert torch.equal(first, model(LONG, **with_cache(fresh(model))).logits)


def test_logits_are_not_checked_unless_asked_for() -> None:
    plain = shortest_model().requires_grad_(False)
    plain.lm_head.register_forward_hook(nan)
    with paged(plain, PagedConfig(page_size=4, check_finite=False)):
        assert plain(LONG).logits.isnan().all()
    with paged(plain, PAGES):  # and not without a paged cache
        assert plain(LONG, use_cache=False).logits.isnan().all()


def noted_of(layer_types: list[str], check: bool = True) -> list[Any]:
    """Return the parts whose numbers a step notes."""
    deep = tiny_model(num_hidden_layers=len(layer_types), layer_types=layer_types)
    noted: list[Any] = []
    right = CacheStep.check_finite

    def recorded(step: CacheStep) -> None:
        noted.extend(step.finite)
        right(step)

    with (
        mock.patch.object(CacheStep, "check_finite", recorded),
        paged(deep.requires_grad_(False), PagedConfig(page_size=4, check_finite=check)),
    ):
        deep(LONG)
    return noted


def test_a_step_notes_only_what_no_later_layer_shows() -> None:
    """K and V of an attention layer show what went wrong in the Mamba layers before it."""
    last = "the last norm, after the last layer"
    kinds = ["mamba", "attention"] * 3 + ["mamba"] * 2
    assert noted_of(kinds) == [1, 3, 5, "Mamba layer 6", "Mamba layer 7", last]
    assert noted_of(["attention", "mamba", "attention"]) == [0, 2, last]
    assert noted_of(kinds, check=False) == []


# -- what is reserved -----------------------------------------------------------------------------


def test_at_most_2048_new_tokens_are_reserved_before_the_first_step() -> None:
    expected = patching._tokens_expected
    assert expected({}, 2, 10) == [10, 10]
    assert expected({"position_ids": torch.arange(7)[None]}, 3, 10) == [10, 10, 10]
    assert expected({"position_ids": torch.zeros(3, 1, 7)}, 1, 9_000) == [7 + 2048]
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    assert expected({"attention_mask": mask}, 1, 4) == [2, 4, 1]
    assert expected({"attention_mask": mask}, 1, 3) == [2, 4, 1]
    assert expected({"attention_mask": mask}, 1, 12) == [10, 12, 9]
    assert expected({"attention_mask": mask}, 1, 9_000) == [2050, 2052, 2049]


def test_a_row_of_padding_is_named_before_the_first_step() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(PromptError, match="row 1 is all padding"):
        patching._tokens_expected({"attention_mask": mask}, 2, 9)


@pytest.mark.parametrize(
    ("ways", "rows"),
    [({}, 2), ({"num_beams": 3, "num_return_sequences": 2}, 6),
     ({"num_return_sequences": 4, "do_sample": True}, 8)],
)  # fmt: skip
def test_generate_reserves_pages_for_every_copy_of_a_row(
    model: Any, ways: dict[str, Any], rows: int
) -> None:
    ids = prompts((5, 5))[0]
    with mock.patch.object(PagedCache, "reserve") as reserve:
        model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **ways)
    assert reserve.call_args.args == ([8] * rows,)


def test_generate_makes_a_paged_cache_for_dynamic_ones_only(model: Any) -> None:
    def made(**options: Any) -> Any:
        out = model.generate(LONG, max_new_tokens=2, return_dict_in_generate=True, **options)
        return cache_of(out)

    assert isinstance(made(), PagedCache)
    assert isinstance(made(cache_implementation="dynamic"), PagedCache)
    assert not isinstance(made(cache_implementation="static"), PagedCache)
    assert made(use_cache=False) is None
    for own in (DynamicCache(config=model.config), fresh(model)):
        assert made(**{CACHE: own}) is own


def test_a_cache_of_the_user_is_reserved_for_the_call(model: Any) -> None:
    own = fresh(model)
    model.generate(LONG, max_new_tokens=4, **with_cache(own))
    assert own.allocator.pages == 1 + own.geometry.pages_for(5 + 3)


def test_the_attention_of_other_steps_is_the_models_own(model: Any) -> None:
    own = shortest_model().requires_grad_(False)
    own.set_attn_implementation("eager")
    expected = own(LONG, use_cache=False).logits
    with paged(own, PAGES):
        assert torch.equal(own(LONG, use_cache=False).logits, expected)
