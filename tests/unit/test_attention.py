"""Attention over a pool of pages: folding, shapes, backends and errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from granite_paged.errors import GeometryError
from granite_paged.layers import gathered
from granite_paged.layers.attention import (
    DecodePlan,
    kernel_options,
    paged_attention,
)
from granite_paged.layers.backend import attention_backend
from granite_paged.layers.tuning import TUNED
from tests.helpers.reference import attention
from tests.helpers.strategies import (
    DTYPES,
    GROUPS,
    HEAD_DIMS,
    PagedSequences,
    Step,
    assert_right,
    assert_same_outputs,
    make_geometry,
)
from tests.helpers.tolerance import ATTENTION_FLOAT64, relative_error


def make(
    past: tuple[int, ...] = (37, 5, 16), added: int = 1, **geometry: object
) -> tuple[PagedSequences, dict[int, int], Step]:
    """Return a ragged batch, and the step that adds `added` tokens to each row."""
    paged = PagedSequences(make_geometry(**geometry))
    growth = {paged.open(tokens): added for tokens in past}
    return paged, growth, paged.step(growth)


def call(step: Step, mask: BlockMask, **tensors: torch.Tensor) -> torch.Tensor:
    step = step.replace(**tensors)
    return paged_attention(step.query, step.keys, step.values, mask, scale=step.scale)


# -- shapes that broke others -------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", GROUPS)
def test_decode_is_right_for_every_group_and_head_size(group: int, head_dim: int) -> None:
    """Seen in torch: decode kernels refuse head size 96 and groups that are no power of two."""
    paged, added, step = make(group=group, head_dim=head_dim, dtype=torch.float32)
    assert_right(paged, step, added, step.attend())


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 17, 43, 128, 129])
def test_any_number_of_query_tokens_is_right(tokens: int) -> None:
    paged, added, step = make(added=tokens)
    assert_right(paged, step, added, step.attend())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_queries_over_a_long_past_are_right(dtype: torch.dtype) -> None:
    """Seen in torch: wrong output for a large KV with a small Q."""
    paged, added, step = make(past=(3000, 1), page_size=64, dtype=dtype)
    assert_right(paged, step, added, step.attend())


@pytest.mark.parametrize("page_size", [1, 2, 4, 16, 64, 128])
@pytest.mark.parametrize("past", [0, 1, 63, 64, 127, 128])
def test_lengths_around_page_boundaries_are_right(page_size: int, past: int) -> None:
    paged, added, step = make(past=(past, 40), page_size=page_size)
    assert_right(paged, step, added, step.attend())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_has_the_shape_and_dtype_of_the_queries(dtype: torch.dtype) -> None:
    _, _, step = make(added=5, dtype=dtype)
    out = step.attend()
    assert (out.shape, out.dtype) == (step.query.shape, dtype)


# -- folding ------------------------------------------------------------------------------------


def test_queries_may_have_any_memory_layout() -> None:
    """A model passes a transposed view."""
    _, _, step = make(added=5)
    assert not step.query.is_contiguous()
    packed = step.replace(query=step.query.contiguous())
    assert_same_outputs(packed.attend(), step.attend())


def test_a_query_head_reads_its_own_kv_head() -> None:
    """Heads are folded by group, not interleaved."""
    _, _, step = make(group=3, kv_heads=2)
    values = step.values.clone()
    values[:, 1] = 7.0
    out = step.replace(values=values).attend()
    seven = torch.full_like(out[:, 3:], 7.0)
    assert_same_outputs(out[:, 3:], seven)
    assert torch.equal(out[:, :3], step.attend()[:, :3])


@pytest.mark.parametrize("spare", [1, 8, 60])
def test_a_mask_may_cover_more_tokens_than_the_query(spare: int) -> None:
    """Shapes are bucketed: the mask of a bucket serves every smaller step."""
    _, _, step = make(added=5)
    positions = torch.nn.functional.pad(step.positions, (0, spare), value=-1)
    bucket = step.replace(positions=positions).mask()
    assert_same_outputs(call(step, bucket), step.attend())


@pytest.mark.parametrize("scale", [1 / 64, 0.0078125, 0.3, 1.0])
def test_the_given_scale_is_used(scale: float) -> None:
    paged, added, step = make(past=(20,))
    (sequence,) = added
    keys, values = paged.keys[sequence], paged.values[sequence]
    exact = attention(step.query[0], keys, values, 20, scale)
    assert relative_error(step.attend(scale=scale)[0], exact) <= ATTENTION_FLOAT64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_eager_rounds_half_types_only_once(dtype: torch.dtype) -> None:
    """Softmax weights rounded to a half type on the way would be a second error."""
    _, _, step = make(added=5, dtype=dtype)
    operands = ("query", "keys", "values")
    single = step.replace(**{name: getattr(step, name).float() for name in operands})
    assert torch.equal(step.attend(), single.attend().to(dtype))


def test_the_same_step_gives_the_same_bits() -> None:
    _, _, step = make(added=5, dtype=torch.float32)
    assert torch.equal(step.attend(), step.attend())


def test_the_pool_is_read_only() -> None:
    _, _, step = make()
    before = step.keys.clone(), step.values.clone()
    step.attend()
    assert torch.equal(step.keys, before[0])
    assert torch.equal(step.values, before[1])


# -- the cost follows the tokens attended -------------------------------------------------------


@pytest.mark.parametrize("added", [1, 9])
def test_eager_reads_only_the_pages_of_the_longest_row(added: int, monkeypatch) -> None:
    """Seen here: 64 tokens in a pool of 131,072 took 248 times transformers' time."""
    paged, _, step = make(added=added)
    for _ in range(40):
        paged.open(100)
    copied = []
    right = gathered.scaled_dot_product_attention

    def attend(query: torch.Tensor, keys: torch.Tensor, *args: object, **options: object) -> object:
        copied.append(keys.shape)
        return right(query, keys, *args, **options)

    monkeypatch.setattr(gathered, "scaled_dot_product_attention", attend)
    step.attend()
    assert [shape[2] for shape in copied] == [37 + added]


def test_layers_of_one_step_share_what_was_gathered() -> None:
    _, _, step = make(added=5)
    mask, calls = step.mask(), []
    right = mask.mask_mod
    mask.mask_mod = lambda *indices: calls.append(1) or right(*indices)
    first, second = call(step, mask), call(step, mask)
    assert torch.equal(first, second)
    assert len(calls) == 1


def test_a_long_prompt_masks_its_tokens_in_parts(monkeypatch) -> None:
    """The mask_mod keeps several 64-bit integers per pair of query and token."""
    _, _, step = make(added=9)
    whole = step.attend()
    monkeypatch.setattr(gathered, "MASKED_AT_ONCE", 300)
    assert torch.equal(step.attend(), whole)


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [4, 16])
def test_a_mask_of_another_page_size_is_refused(page_size: int) -> None:
    """Seen in vLLM: unequal page sizes of manager and kernel cut accuracy from 0.85 to 0.02."""
    _, _, step = make(page_size=8)
    other = step.replace(geometry=dataclasses.replace(step.geometry, page_size=page_size))
    with pytest.raises(GeometryError, match="same batch, page size and pool"):
        call(step, other.mask())


@pytest.mark.parametrize("rows", [[0], [0, 1]], ids=str)
def test_a_mask_of_another_batch_is_refused(rows: list[int]) -> None:
    _, _, step = make()
    with pytest.raises(GeometryError, match="same batch"):
        call(step, step.rows(rows).mask())


def test_a_mask_for_fewer_tokens_is_refused() -> None:
    _, _, step = make(added=5)
    shorter = step.replace(positions=step.positions[:, 1:])
    with pytest.raises(GeometryError, match="15 rows"):
        call(step, shorter.mask())


def test_float64_is_refused_when_compiled() -> None:
    _, _, step = make(dtype=torch.float64)
    with pytest.raises(GeometryError, match="float64 has no fused kernel"):
        step.attend(backend="compiled")


@pytest.mark.parametrize("page_size", [1, 8])
def test_the_compiled_kernel_refuses_pages_smaller_than_its_block(page_size: int) -> None:
    """Seen in torch with AVX2: a block of 8 tokens writes over its neighbours."""
    _, _, step = make(page_size=page_size, dtype=torch.float32)
    with pytest.raises(GeometryError, match=f"page_size {page_size} is too small .* at least 16"):
        step.attend(backend="compiled")


# -- backends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_is_eager_on_the_cpu(dtype: torch.dtype) -> None:
    assert attention_backend("auto", torch.device("cpu"), dtype, 64) == "eager"


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_an_explicit_backend_is_used(backend: str) -> None:
    assert attention_backend(backend, torch.device("cpu"), torch.float32, 64) == backend


def test_eager_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public flex_attention would trace every new shape."""
    _, _, step = make()
    monkeypatch.setattr(torch, "compile", None)
    assert step.attend().isfinite().all()


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("added", [1, 2, 100])
def test_a_kernel_block_never_spans_two_pages(page_size: int, added: int) -> None:
    """Seen in torch: the output depends on where pages lie."""
    _, _, step = make(page_size=page_size, added=added)
    options = kernel_options(step.mask(), step.keys)
    assert page_size % options["BLOCK_N"] == 0
    assert 128 % options["BLOCK_M"] == 0


@pytest.mark.parametrize(
    ("dtype", "head_dim", "expected"),
    [
        (torch.bfloat16, 64, "compiled"),
        (torch.float32, 16, "compiled"),
        (torch.float64, 64, "eager"),
        (torch.bfloat16, 8, "eager"),
    ],
)
def test_auto_is_compiled_on_cuda_if_a_kernel_exists(
    dtype: torch.dtype, head_dim: int, expected: str
) -> None:
    assert attention_backend("auto", torch.device("cuda"), dtype, head_dim) == expected


def test_a_mask_with_padded_rows_and_tokens_changes_no_output() -> None:
    """Shapes are padded to buckets, so that compiled kernels are used again."""
    _, _, step = make(added=5)
    more = torch.nn.functional.pad(step.positions, (0, 3, 0, 2), value=-1)
    table = torch.nn.functional.pad(step.physical, (0, 0, 0, 2))
    padded = step.replace(positions=more, physical=table)
    actual, expected = call(step, padded.mask()), call(step, step.mask())
    assert relative_error(actual, expected) <= ATTENTION_FLOAT64


# -- split rows ---------------------------------------------------------------------------------

CPU = torch.device("cpu")
GEOMETRY = make_geometry(page_size=128, kv_heads=4, group=3, head_dim=128, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make plans for the 132 multiprocessors of an H200."""
    monkeypatch.setattr("granite_paged.layers.attention.multiprocessors", lambda device: 132)


@pytest.mark.parametrize(
    ("batch", "pages", "splits"), [(1, 1024, 33), (1, 5, 5), (8, 1024, 4), (32, 32, 1), (999, 9, 1)]
)
def test_rows_are_split_to_occupy_every_multiprocessor(batch: int, pages: int, splits: int) -> None:
    plan = DecodePlan.choose(GEOMETRY, batch, pages, CPU, batch)
    assert plan.splits == splits
    assert plan.block <= 128


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_a_decode_block_never_spans_two_pages(page_size: int) -> None:
    geometry = dataclasses.replace(GEOMETRY, page_size=page_size)
    assert page_size % DecodePlan.choose(geometry, 1, 10, CPU, 1).block == 0


@pytest.mark.parametrize(
    ("memory", "block"), [(227 * 1024, 128), (163 * 1024, 64), (99 * 1024, 64), (48 * 1024, 32)]
)
def test_a_gpu_with_less_shared_memory_gets_smaller_blocks(
    memory: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("granite_paged.layers.attention.shared_memory", lambda device: memory)
    assert TUNED.for_batch(1).block == 128
    assert DecodePlan.choose(GEOMETRY, 1, 10, CPU, 1).block == block
