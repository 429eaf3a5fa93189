"""How attention is laid out for FlexAttention: folds, masks, plans and kernel options."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from granite_paged.device import has_tma
from granite_paged.errors import GeometryError
from granite_paged.layers import attention
from granite_paged.layers.attention import DecodePlan, kernel_options, prefill_options
from granite_paged.layers.tuning import TUNED, DecodeConstants, PrefillConstants
from granite_paged.paging.masks import QUERY_BLOCK, blocks_of
from tests.helpers.strategies import make_geometry

B, HKV, G, S, D = 2, 3, 5, 4, 7
HQ, SLOTS = HKV * G, 48
BIG = 2**31
CPU = torch.device("cpu")


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def mask_like(rows: int, page_size: int = 16, batch: int = B) -> Any:
    return SimpleNamespace(shape=(batch, 1, rows, SLOTS), BLOCK_SIZE=(128, page_size))


def pool_like(
    elements: int = 100, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, **more: Any
) -> Any:
    """Return what is asked of a pool, without memory."""
    shape = (1, 2, SLOTS, head_dim)
    sizes = {"shape": shape, "dtype": dtype, "itemsize": dtype.itemsize, "device": CPU}
    return SimpleNamespace(**{"numel": lambda: elements, "is_cuda": True, **sizes, **more})


# -- folds ----------------------------------------------------------------------------------------


def test_heads_of_a_group_are_folded_into_rows_token_by_token() -> None:
    query = numbers(B, HQ, S, D)
    folded = attention._fold(query, HKV, (B, 1, S * G, SLOTS))
    assert folded.shape == (B, HKV, S * G, D)
    for head in range(HQ):
        rows = folded[:, head // G, head % G :: G]
        assert torch.equal(rows, query[:, head])
    assert torch.equal(attention._unfold(folded, query.shape), query)


@pytest.mark.parametrize(("rows", "tokens"), [(0, 3), (2, 0), (2, 3)])
def test_a_fold_is_padded_at_its_end_to_the_shape_of_the_mask(rows: int, tokens: int) -> None:
    query = numbers(B, HQ, S, D)
    plain = attention._fold(query, HKV, (B, 1, S * G, SLOTS))
    folded = attention._fold(query, HKV, (B + rows, 1, S * G + tokens, SLOTS))
    assert folded.shape == (B + rows, HKV, S * G + tokens, D)
    assert torch.equal(folded[:B, :, : S * G], plain)
    assert not folded[B:].any()
    assert not folded[:, :, S * G :].any()
    assert torch.equal(attention._unfold(folded, query.shape), query)


@pytest.mark.parametrize(("batch", "rows"), [(B, S * G), (B + 1, S * G), (B, S * G + 1)])
def test_a_mask_for_enough_rows_and_tokens_is_taken(batch: int, rows: int) -> None:
    query, keys = numbers(B, HQ, S, D), numbers(1, HKV, SLOTS, D)
    attention._check_mask(query, keys, mask_like(rows, batch=batch))


@pytest.mark.parametrize(
    ("batch", "rows", "slots"),
    [(B - 1, S * G, SLOTS), (B, S * G - 1, SLOTS), (B, S * G, SLOTS - 1), (B, S * G, SLOTS + 1)],
)
def test_a_mask_for_fewer_rows_or_tokens_or_another_pool_is_refused(
    batch: int, rows: int, slots: int
) -> None:
    query, keys = numbers(B, HQ, S, D), numbers(1, HKV, slots, D)
    with pytest.raises(GeometryError, match=f"{batch} sequences, {rows} folded rows"):
        attention._check_mask(query, keys, mask_like(rows, batch=batch))


# -- query blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 26), (2, 60)])
def test_query_blocks_are_unfolded_in_their_order(batch: int, tokens: int) -> None:
    """A kernel that returns its queries gives each query its own place again."""
    query = numbers(batch, tokens, HQ, D)
    mask: Any = SimpleNamespace(shape=(20, 1, QUERY_BLOCK, SLOTS), BLOCK_SIZE=(128, 16))
    given = []

    def returned(function: Any, blocks: Tensor, *args: Any) -> Tensor:
        given.append((function, blocks.shape, *args))
        return blocks

    keys = pool_like()
    queries = attention.block_queries(query, mask, kv_heads=HKV)
    queries.places.copy_(query.view(batch, tokens, 1, HKV, G, D))
    with mock.patch.object(attention, "_call_compiled", returned):
        out = attention.block_attention(queries, keys, keys, mask, scale=0.5)
    assert torch.equal(out, query)
    shape, options = (20, HKV, QUERY_BLOCK, D), attention._device_options(mask, keys)
    assert given == [(attention._fused, shape, keys, keys, mask, 0.5, options)]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 26), (2, 60)])
def test_a_row_fills_whole_query_blocks(batch: int, tokens: int) -> None:
    mask: Any = SimpleNamespace(shape=(20, 1, QUERY_BLOCK, SLOTS))
    blocks, places = attention.block_queries(numbers(batch, tokens, HQ, D), mask, kv_heads=HKV)
    assert places.shape == (batch, tokens, 1, HKV, G, D)
    blocks.zero_()
    places += torch.arange(1, batch + 1)[:, None, None, None, None, None]
    each = blocks_of(tokens, G)
    for number in range(batch):
        row = blocks[number * each : (number + 1) * each].transpose(0, 1).flatten(1, 2)
        assert (row[:, : tokens * G] == 1 + number).all()
        assert not row[:, tokens * G :].any()
    assert not blocks[batch * each :].any()


def test_each_part_of_a_row_has_a_copy_of_its_queries() -> None:
    plan = DecodePlan(parts=9, splits=3, block=16, warps=4, stages=1)
    parts, places = attention.split_queries(numbers(B, HQ, D), plan, kv_heads=HKV)
    assert parts.shape == (9, HKV, G, D)
    parts.zero_()
    query = numbers(B, HQ, D)
    places.copy_(query.view(B, 1, 1, HKV, G, D))
    for part in range(B * 3):
        assert torch.equal(parts[part].view(HQ, D), query[part // 3])
    assert not parts[B * 3 :].any()


# -- plans of decode steps ------------------------------------------------------------------------

GEOMETRY = make_geometry(page_size=128, kv_heads=4, group=3, head_dim=128, dtype=torch.bfloat16)
CONSTANTS = DecodeConstants(batch=1, parts_per_multiprocessor=1.5, block=64, warps=4, stages=3)


@pytest.fixture(autouse=True)
def _multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 100)


@pytest.mark.parametrize(
    ("batch", "pages", "parts", "splits"),
    [
        (1, 999, 37, 37),
        (2, 999, 37, 18),
        (18, 999, 37, 2),
        (1, 36, 37, 36),
        (19, 999, 50, 1),
        (37, 999, 50, 1),
        (1, 1, 50, 1),
    ],
)
def test_parts_are_shared_by_the_rows_and_their_kv_heads(
    batch: int, pages: int, parts: int, splits: int
) -> None:
    """All batches whose rows are split have as many parts, and so have all others."""
    plan = DecodePlan.from_constants(CONSTANTS, GEOMETRY, batch, pages, CPU, most=50)
    assert plan == DecodePlan(parts=parts, splits=splits, block=64, warps=4, stages=3)


def test_a_block_of_a_plan_is_no_larger_than_a_page() -> None:
    geometry = dataclasses.replace(GEOMETRY, page_size=32)
    assert DecodePlan.from_constants(CONSTANTS, geometry, 1, 9, CPU, 1).block == 32


def block_with(memory: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(attention, "shared_memory", lambda device: memory)
    return DecodePlan.choose(GEOMETRY, 1, 10, CPU, 1).block


def test_blocks_are_halved_until_their_pipeline_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = TUNED.for_batch(1)
    assert constants.block == 128
    per_token = constants.stages * 2 * 128 * 2  # K and V of one token, in bfloat16
    assert block_with(128 * per_token, monkeypatch) == 128
    assert block_with(128 * per_token - 1, monkeypatch) == 64
    assert block_with(64 * per_token, monkeypatch) == 64
    assert block_with(64 * per_token - 1, monkeypatch) == 32
    assert block_with(1, monkeypatch) == 16, "the kernel needs blocks of 16"


def test_bytes_of_a_block_are_those_of_k_and_v() -> None:
    assert attention._kv_bytes(3, 5, 7) == 2 * 3 * 5 * 7


def test_decode_steps_use_the_main_kernel() -> None:
    assert DecodePlan(9, 2, 64, 4, 3).options() == {
        "BLOCK_M": 16,
        "BLOCK_N": 64,
        "num_warps": 4,
        "num_stages": 3,
        "FORCE_USE_FLEX_ATTENTION": True,
    }


# -- kernel options -------------------------------------------------------------------------------

UNTUNED = {"BLOCK_N": 64, "BLOCK_M": 64}


@pytest.mark.parametrize("rows", [17, 128])
def test_a_prefill_in_half_precision_has_the_tuned_options(rows: int) -> None:
    expected = prefill_options(TUNED.prefill, 128)
    assert "num_stages" in expected
    for head_dim in (16, 128):
        assert kernel_options(mask_like(rows, 128), pool_like(head_dim=head_dim)) == expected


def test_wider_heads_and_full_precision_have_options_that_always_fit() -> None:
    mask = mask_like(17, 128)
    assert kernel_options(mask, pool_like(head_dim=129)) == UNTUNED
    assert kernel_options(mask, pool_like(dtype=torch.float32)) == UNTUNED
    assert kernel_options(mask_like(17, 32), pool_like(head_dim=256))["BLOCK_N"] == 32


def test_a_step_of_sixteen_rows_or_fewer_is_no_prefill() -> None:
    for rows in (1, 16):
        assert kernel_options(mask_like(rows, 128), pool_like()) == {**UNTUNED, "BLOCK_M": 16}


@pytest.mark.parametrize(("elements", "beyond"), [(BIG, True), (BIG - 1, False), (100, False)])
def test_offsets_of_64_bits_need_the_main_kernel(elements: int, beyond: bool) -> None:
    options = kernel_options(mask_like(1), pool_like(elements))
    assert options.get("FORCE_USE_FLEX_ATTENTION", False) is beyond


def test_a_prefill_block_is_no_larger_than_a_page() -> None:
    constants = PrefillConstants(BLOCK_M=64, BLOCK_N=32, warps=4, stages=2)
    expected = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    assert prefill_options(constants, 16) == expected
    assert prefill_options(constants, 128) == {**expected, "BLOCK_N": 32}


@pytest.mark.parametrize("tma", [False, True])
def test_a_device_gets_the_stages_that_fit_and_tma_if_it_has_it(
    tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = TUNED.prefill.stages
    stage = 2 * TUNED.prefill.BLOCK_N * 96 * 2  # K and V of a block, in bfloat16
    full = {**prefill_options(TUNED.prefill, 128), "USE_TMA": tma}

    monkeypatch.setattr(attention, "has_tma", lambda device: tma)

    def found(memory: int, head_dim: int = 96, **pool: Any) -> Any:
        """Return the options for a device that has `memory` bytes for K and V."""
        queries = 64 * 128 * 2  # a block of queries in half precision
        monkeypatch.setattr(attention, "shared_memory", lambda device: queries + memory)
        return attention._device_options(mask_like(17, 128), pool_like(head_dim=head_dim, **pool))

    assert found(stages * stage) == full
    assert found(stages * stage - 1) == {**full, "num_stages": stages - 1}
    assert found(0) == {**full, "num_stages": 1}
    assert found(0, is_cuda=False) is None
    assert found(0, head_dim=256) is None, "nothing is tuned, so nothing is changed"


@pytest.mark.parametrize(
    ("device", "capability", "version", "has"),
    [
        ("cuda", (9, 0), "2.11.0+cu130", True),
        ("cuda", (10, 0), "3.0.0a0+git1", True),
        ("cuda", (8, 9), "2.11.0+cu130", False),
        ("cuda", (9, 0), "2.9.1", False),
        ("cpu", (9, 0), "2.11.0", False),
    ],
)
def test_tma_needs_a_new_gpu_and_a_torch_that_looks_for_it(
    device: str, capability: Any, version: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert has_tma.__wrapped__(torch.device(device)) is has


# -- what is compiled -----------------------------------------------------------------------------


def test_functions_are_compiled_whole_and_for_fixed_shapes() -> None:
    with mock.patch.object(torch, "compile") as compiled:
        attention._compiled.__wrapped__(attention._fused)
    compiled.assert_called_once_with(attention._fused, fullgraph=True, dynamic=False)


def test_a_function_may_be_compiled_1024_times_per_process() -> None:
    """Dynamo's own limits count all models, dtypes and shapes together."""
    config = torch._dynamo.config
    before = config.recompile_limit
    with mock.patch.object(attention, "_compiled", lambda function: function):
        limits = attention._call_compiled(
            lambda: (config.recompile_limit, config.accumulated_recompile_limit)
        )
    assert limits == (1024, 1024)
    assert config.recompile_limit == before


@pytest.mark.parametrize("cuda", [False, True])
def test_kernel_options_are_made_for_gpus_and_where_none_are_given(cuda: bool) -> None:
    query, attend = mock.Mock(is_cuda=cuda), mock.Mock(return_value=torch.ones(1))
    mask, keys, given = mask_like(1), pool_like(), {"BLOCK_M": 32}
    with mock.patch.object(attention, "flex_attention", attend):
        attention._fused(query, keys, keys, mask, 1.0, given)  # type: ignore[arg-type]
        assert attend.call_args.kwargs["kernel_options"] is given
        attention._fused(query, keys, keys, mask, 1.0, None)
        expected = kernel_options(mask, keys) if cuda else None
        assert attend.call_args.kwargs["kernel_options"] == expected


def compiled_call(**options: Any) -> Any:
    """Return the options with which a compiled call runs the kernel."""
    query, keys = numbers(B, HQ, S, 16), numbers(1, HKV, SLOTS, 16)
    called = mock.Mock(side_effect=lambda function, folded, *args: folded)
    with (
        mock.patch.object(attention, "_call_compiled", called),
        mock.patch.object(attention, "_device_options", return_value={"num_stages": 1}),
    ):
        out = attention.paged_attention(
            query, keys, keys, mask_like(S * G), scale=1.0, backend="compiled", **options
        )
    assert torch.equal(out, query)
    return called.call_args.args[-1]


def test_options_of_the_caller_come_before_those_for_a_small_device() -> None:
    assert compiled_call() == {"num_stages": 1}
    assert compiled_call(options={"BLOCK_M": 32}) == {"BLOCK_M": 32}


def test_sizes_are_checked_before_anything_is_compiled() -> None:
    query, keys = numbers(B, HQ, S, 16), numbers(1, HKV, SLOTS, 16)
    with mock.patch.object(attention, "check_compilable", side_effect=GeometryError) as check:
        mask = mask_like(S * G, 8)
        with pytest.raises(GeometryError):
            attention.paged_attention(query, keys, keys, mask, scale=1.0, backend="compiled")
    check.assert_called_once_with(CPU, torch.float32, page_size=8, head_dim=16)


@pytest.mark.parametrize(("head_dim", "eager"), [(16, False), (8, True)])
def test_the_size_of_a_head_decides_what_runs(head_dim: int, eager: bool) -> None:
    query = torch.empty(B, HQ, 64, head_dim)
    with mock.patch.object(attention, "attention_backend") as backend:
        backend.side_effect = lambda name, device, dtype, size: "eager" if size < 16 else "compiled"
        assert attention._is_eager("auto", query) is eager
