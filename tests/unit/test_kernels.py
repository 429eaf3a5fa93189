"""Triton kernels against the plain PyTorch code that defines them, interpreted or on a GPU.

The interpreter computes bfloat16 products wrongly, so the CPU runs float32 and float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from granite_paged.layers.mamba import MambaSizes, MambaState, ScanWeights, mamba_forward
from granite_paged.paging.allocator import PageAllocator
from granite_paged.paging.store import PageStore
from tests.helpers import reference
from tests.helpers.mamba_layers import mamba_layer
from tests.helpers.strategies import make_geometry
from tests.helpers.tolerance import assert_as_defined

pytest.importorskip("triton")

from granite_paged import device
from granite_paged.layers import attention, backend
from granite_paged.layers.triton import linear as few_rows
from granite_paged.layers.triton import mamba, masks, pages, pointwise, tokens
from granite_paged.layers.triton.combine import combine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT32 = 2e-6
HALF = 2e-3
"""Bound for float16 operands with float32 sums: a few roundings of 2**-11 of the largest term."""


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


# -- where they run -----------------------------------------------------------------------------


@pytest.fixture
def nothing_known() -> Iterator[None]:
    """Forget what is cached about devices, before and after the test."""
    for known in (backend._cannot_compile, backend._warn_once):
        known.cache_clear()
    yield
    for known in (backend._cannot_compile, backend._warn_once):
        known.cache_clear()


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (("importlib.util.find_spec", lambda name: None), "Triton is not installed"),
        (("shutil.which", lambda name: None), "needs a C compiler"),
    ],
)
def test_a_gpu_that_cannot_compile_warns_once_and_runs_eager(
    missing: tuple[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*missing)
    gpu = torch.device("cuda", 0)
    assert reason in backend.kernel_refusal("auto", gpu, torch.bfloat16)
    with pytest.warns(UserWarning, match=reason) as warnings:
        found = [backend.attention_backend("auto", gpu, torch.bfloat16, 128) for _ in range(2)]
    assert found == ["eager", "eager"]
    assert len(warnings) == 1


@pytest.mark.usefixtures("nothing_known")
def test_an_old_gpu_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = torch.device("cuda", 0)
    assert "7.5 is older than 8.0" in backend.kernel_refusal("auto", gpu, torch.bfloat16)
    assert backend._cannot_compile(gpu) == ""


def test_a_gpu_with_less_shared_memory_gets_fewer_stages() -> None:
    assert device.stages_that_fit(4, 50_000, device.TUNED_SHARED_MEMORY) == 4
    assert device.stages_that_fit(4, 50_000, 99 * 1024) == 2
    assert device.stages_that_fit(4, 50_000, 30_000) == 1


# -- products of few rows -----------------------------------------------------------------------


def product_case(
    rows: int, columns: int, depth: int, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x, weight, residual, and the weights of the norms before and after."""
    torch.manual_seed(rows)
    shapes = ((rows, depth), (columns * (2 if gated else 1), depth), (rows, columns))
    x, weight, residual = (torch.randn(*shape, device=DEVICE) for shape in shapes)
    before, after = torch.randn(depth, device=DEVICE), torch.randn(columns, device=DEVICE)
    return x, weight, residual, before, after


def formula(x: Tensor, weight: Tensor, before: Tensor | None, gated: bool) -> Tensor:
    product = (x.double() if before is None else rms_norm(x, before)) @ weight.double().T
    if not gated:
        return product
    half = product.shape[1] // 2
    return silu(product[:, :half]) * product[:, half:]


@pytest.mark.parametrize("rows", [1, 2, 17, 40])
@pytest.mark.parametrize(("columns", "depth"), [(16, 128), (75, 200)])
@pytest.mark.parametrize(
    ("normed", "gated", "residual"),
    [(False, False, False), (True, True, False), (True, False, True), (False, True, True)],
)
def test_a_product_of_few_rows_equals_the_formula(
    rows: int, columns: int, depth: int, normed: bool, gated: bool, residual: bool
) -> None:
    x, weight, held, before, _ = product_case(rows, columns, depth, gated)
    expected = 0.22 * formula(x, weight, before if normed else None, gated)
    expected = expected + held if residual else expected
    given = few_rows.prenorm(x, before) if normed else x
    actual, nothing = few_rows.linear(
        given,
        weight,
        eps=1e-5,
        residual=held if residual else None,
        scale=0.22,
        gated=gated,
    )
    assert nothing is None
    assert_as_defined(actual.double(), expected, FLOAT32)


@pytest.mark.parametrize(("rows", "splits"), [(1, 1), (5, 1), (5, 2), (5, 3), (5, 7)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_consecutive_products_pass_on_their_norm(
    rows: int, splits: int, normed: bool, gated: bool
) -> None:
    x, weight, held, before, after = product_case(rows, 40, 300, gated)
    options = {} if rows == 1 else {"DEPTH": 64, "COLUMNS": 16, "SPLITS": splits}
    shared = few_rows.scratch(DEVICE)
    for factor in (1.0, -3.0):
        expected = formula(factor * x, weight, before if normed else None, gated) + held
        given = few_rows.prenorm(factor * x, before) if normed else factor * x
        actual, passed = few_rows.linear(
            given, weight, eps=1e-5, residual=held, gated=gated, norm=after, **options
        )
        assert_as_defined(actual.double(), expected, FLOAT32)
        assert passed is not None
        inverse = torch.rsqrt(passed.squares.sum(0) / 40 + 1e-5)[:, None]
        assert_as_defined(passed.values * inverse, rms_norm(actual, after), FLOAT32)
        assert not shared.arrived.any(), (
            "the counters must be 0 again, or the next product would not wait for its parts"
        )


@pytest.mark.parametrize("rows", [1, 5])
def test_three_products_of_one_input_run_as_one(rows: int) -> None:
    x = torch.randn(rows, 200, device=DEVICE)
    query, key, value = (torch.randn(columns, 200, device=DEVICE) for columns in (75, 40, 16))
    actual, _ = few_rows.linear(x, (query, key, value))
    expected = formula(x, torch.cat([query, key, value]), None, False)
    assert_as_defined(actual.double(), expected, FLOAT32)


def test_a_product_adds_to_its_residual_in_place() -> None:
    x, weight = torch.randn(3, 64, device=DEVICE), torch.randn(32, 64, device=DEVICE)
    hidden = torch.randn(3, 32, device=DEVICE)
    expected = hidden + 0.5 * x @ weight.T
    assert few_rows.linear(x, weight, residual=hidden, scale=0.5, out=hidden)[0] is hidden
    assert_as_defined(hidden, expected, FLOAT32)


@pytest.mark.parametrize("groups", [1, 3])
def test_rms_norm_equals_the_formula(groups: int) -> None:
    x, weight = torch.randn(5, 96, device=DEVICE), torch.randn(96, device=DEVICE)
    parts = rms_norm(x.view(5, groups, -1), weight.view(groups, -1)).view(5, 96)
    assert_as_defined(pointwise.rms_norm(x, weight, 1e-5, groups).double(), parts, FLOAT32)


def test_silu_mul_equals_the_formula() -> None:
    x = torch.randn(4, 2 * 75, device=DEVICE)
    expected = silu(x[:, :75]) * x[:, 75:]
    assert_as_defined(pointwise.silu_mul(x), expected, FLOAT32)


# -- the ends of a decode step ------------------------------------------------------------------


@pytest.mark.parametrize("depth", [64, 75])
def test_embed_returns_scaled_and_normed_embeddings(depth: int) -> None:
    table, norm = torch.randn(30, depth, device=DEVICE), torch.randn(depth, device=DEVICE)
    fed = torch.tensor([9, 4, 29, 0], device=DEVICE)
    rows = torch.tensor([2, 1, 3], device=DEVICE)
    hidden, normed = tokens.embed(fed, rows, table, 12.0, norm)
    assert torch.equal(hidden, 12.0 * table[[29, 4, 0]])
    assert_as_defined(normed.values, hidden * norm, FLOAT32)
    assert_as_defined(normed.squares[0], hidden.square().sum(1), FLOAT32)


def test_an_embedding_is_rounded_once() -> None:
    table = torch.randn(8, 64, device=DEVICE).half()
    fed = torch.arange(8, device=DEVICE)
    hidden, _ = tokens.embed(fed, fed, table, 12.3, torch.ones(64, device=DEVICE).half())
    assert torch.equal(hidden, table * 12.3)


def fed_tokens(logits: Tensor, rows: list[int]) -> list[int]:
    """Return what write_argmax feeds the named rows of six.

    Checks that others keep -1, and that the rows with logits that are not finite are flagged.
    """
    fed = torch.full((6,), -1, device=DEVICE)
    nonfinite = torch.zeros(6, dtype=torch.uint8, device=DEVICE)
    tokens.write_argmax(logits, torch.tensor(rows, device=DEVICE), fed, nonfinite)
    assert sorted({*range(6)} - set(rows)) == (fed == -1).nonzero().flatten().tolist()
    bad = [row for row, each in zip(rows, logits, strict=True) if not each.isfinite().all()]
    assert nonfinite.nonzero().flatten().tolist() == sorted(bad)
    return fed[rows].tolist()


@pytest.mark.parametrize("columns", [50, 8192, 20000])
def test_each_row_is_fed_its_argmax(columns: int) -> None:
    logits = torch.randn(3, columns, device=DEVICE)
    logits[1, -1] = 100.0  # the last column of the last block
    assert fed_tokens(logits, [4, 1, 5]) == logits.argmax(1).tolist()


def test_the_first_of_equal_logits_is_fed() -> None:
    logits = torch.zeros(2, 20000, device=DEVICE)
    logits[0, [7, 8200, 16391]] = 1.0  # equal maxima in three blocks
    logits[1, [300, 8195]] = 1.0
    assert fed_tokens(logits, [1, 2]) == [7, 300]


def test_non_finite_logits_still_feed_a_valid_token() -> None:
    logits = torch.full((3, 9000), float("nan"), device=DEVICE)
    logits[1] = float("-inf")
    logits[2, 8500] = -3.0
    fed = fed_tokens(logits, [1, 2, 3])
    assert all(0 <= token < 9000 for token in fed)
    assert fed[2] == 8500


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 8191, 8192, 8999])
def test_a_row_is_flagged_for_any_logit_that_is_not_finite(bad: float, column: int) -> None:
    logits = torch.randn(3, 9000, device=DEVICE)
    logits[1, column] = bad
    ordered = logits.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    assert fed_tokens(logits, [5, 2, 4]) == ordered.argmax(1).tolist()


# -- Mamba --------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "one group": {},
    "two groups": {"mamba_n_groups": 2},
    "wide": {"mamba_n_heads": 2, "mamba_d_head": 24, "mamba_d_state": 16, "mamba_chunk_size": 64},
    "odd": {"mamba_n_heads": 3, "mamba_d_head": 16, "mamba_d_state": 5, "mamba_d_conv": 3},
    "bounded": {"time_step_limit": (0.2, 0.6)},
}


def states(sizes: MambaSizes, dtype: torch.dtype = torch.float32) -> tuple[MambaState, MambaState]:
    """Return two equal states of five rows, of which a batch uses rows 3 and 1."""
    torch.manual_seed(1)
    rows = torch.tensor([3, 1], device=DEVICE)
    empty = sizes.empty_state(5, dtype, DEVICE)
    conv, ssm = empty.conv.normal_(), empty.ssm.normal_()
    return MambaState(conv.clone(), ssm.clone(), rows), MambaState(conv, ssm, rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "positions",
    [
        [[0], [7]],
        [[5], [-1]],
        [list(range(40)), list(range(64, 104))],
        [list(range(3, 24)) + [-1] * 19, [-1] * 40],
        [[-1] * 31 + list(range(9)), [5, 6] + [-1] * 38],
    ],
    ids=["step", "step, padding", "scan", "right padding", "left padding"],
)
def test_kernels_agree_with_plain_pytorch(shape: str, positions: list[list[int]]) -> None:
    mixer, _ = mamba_layer(**SHAPES[shape])
    mixer = mixer.to(DEVICE)
    at = torch.tensor(positions, device=DEVICE)
    hidden = torch.randn(*at.shape, 24, device=DEVICE)
    mine, defined = states(MambaSizes.of(mixer))
    for row, first in zip(mine.rows, positions, strict=True):
        if first[0] < mixer.conv_kernel_size:  # the conv state holds nothing before position 0
            mine.conv[row], defined.conv[row] = 0, 0
    with torch.inference_mode():
        actual = mamba.mamba_forward(mixer, hidden, at, mine)
        expected = mamba_forward(mixer, hidden, at, defined)
    token = at >= 0
    # decays are computed from float32 differences
    assert_as_defined(actual[token], expected[token], 10 * FLOAT32)
    assert_as_defined(mine.ssm, defined.ssm, 10 * FLOAT32)
    assert_as_defined(mine.conv, defined.conv, FLOAT32)


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("run", [mamba_forward, mamba.mamba_forward], ids=["plain", "kernels"])
def test_conv_state_is_not_read_before_position_0(tokens: int, run: Any) -> None:
    mixer, _ = mamba_layer()
    mixer = mixer.to(DEVICE)
    at = torch.arange(tokens, device=DEVICE)[None]
    hidden = torch.randn(1, tokens, 24, device=DEVICE)
    rows = torch.tensor([0], device=DEVICE)
    clean = MambaSizes.of(mixer).empty_state(1, torch.float32, DEVICE)._replace(rows=rows)
    stale = MambaState(torch.full_like(clean.conv, 1e3), clean.ssm.clone(), rows)
    with torch.inference_mode():
        assert torch.equal(run(mixer, hidden, at, stale), run(mixer, hidden, at, clean))


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_padding_row_needs_no_state(tokens: int) -> None:
    mixer, _ = mamba_layer()
    mixer = mixer.to(DEVICE)
    sizes = MambaSizes.of(mixer)
    at = torch.arange(tokens, device=DEVICE).expand(2, -1).clone()
    at[1] = -1
    hidden = torch.randn(2, tokens, 24, device=DEVICE)
    rows = torch.tensor([0, -1], device=DEVICE)
    one = sizes.empty_state(1, torch.float32, DEVICE)._replace(rows=rows)
    alone = sizes.empty_state(1, torch.float32, DEVICE)._replace(rows=rows[:1])
    with torch.inference_mode():
        out = mamba.mamba_forward(mixer, hidden, at, one)
        expected = mamba.mamba_forward(mixer, hidden[:1], at[:1], alone)
    assert_as_defined(out[:1], expected, FLOAT32)
    assert out.isfinite().all()
    assert_as_defined(one.ssm, alone.ssm, FLOAT32)
    assert_as_defined(one.conv, alone.conv, FLOAT32)


@pytest.mark.parametrize("tokens", [1, 40])
def test_half_precision_kernels_err_by_a_few_roundings(tokens: int) -> None:
    mixer, _ = mamba_layer()
    mixer = mixer.to(DEVICE)
    at = torch.arange(tokens, device=DEVICE).expand(2, -1)
    hidden = torch.randn(2, tokens, 24, device=DEVICE).half()
    mine, defined = states(MambaSizes.of(mixer), torch.float16)[0], states(MambaSizes.of(mixer))[1]
    defined.conv.copy_(mine.conv)
    with torch.inference_mode():
        expected = mamba_forward(mixer, hidden.float(), at, defined)
        actual = mamba.mamba_forward(mixer.half(), hidden, at, mine)
    assert_as_defined(actual.float(), expected, HALF)
    assert_as_defined(mine.ssm, defined.ssm, HALF)


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_mamba_step_passes_on_its_norm(batch: int) -> None:
    mixer, _ = mamba_layer(mamba_n_heads=3, mamba_d_head=16)
    mixer = mixer.to(DEVICE)
    sizes = MambaSizes.of(mixer)
    held = sizes.empty_state(batch + 1, torch.float32, DEVICE)
    at = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    projected = torch.randn(batch, sizes.inner + sizes.channels + sizes.heads, device=DEVICE)
    weights = ScanWeights.of(mixer)

    def stepped(norm: Tensor | None) -> Any:
        rows = torch.arange(1, batch + 1, device=DEVICE)
        state = MambaState(held.conv.clone(), held.ssm.clone(), rows)
        with torch.inference_mode():
            return mamba.step(sizes, projected, at, weights, state, norm)

    plain, passed = stepped(None), stepped(mixer.norm.weight)
    inverse = torch.rsqrt(passed.squares.sum(0) / sizes.inner + 1e-5)[:, None]
    assert_as_defined(passed.values * inverse, rms_norm(plain, mixer.norm.weight), FLOAT32)


def test_separate_and_fused_convolutions_agree() -> None:
    mixer, _ = mamba_layer()
    mixer = mixer.to(DEVICE)
    mine, other = states(MambaSizes.of(mixer))
    hidden = torch.randn(2, 24, device=DEVICE)
    at = torch.tensor([[7], [-1]], device=DEVICE)
    with torch.inference_mode():
        expected, _ = few_rows.linear(
            hidden, mixer.in_proj.weight, conv=mamba.convolution(mixer, at[:, 0].contiguous(), mine)
        )
        projected, _ = few_rows.linear(hidden, mixer.in_proj.weight)
        mamba.convolve_step(projected, mamba.convolution(mixer, at[:, 0].contiguous(), other))
    assert_as_defined(projected, expected, FLOAT32)
    assert torch.equal(mine.conv, other.conv)


# -- pages --------------------------------------------------------------------------------------


def test_write_pages_writes_tokens_and_skips_padding() -> None:
    # the memory of the first one is larger, as after a growth that failed
    pool = [torch.zeros(1, 2, pages * 4, 8, device=DEVICE)[:, :, : 6 * 4] for pages in (9, 6)]
    table = torch.tensor([[0, 0, 0], [3, 1, 0], [5, 2, 4]], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([2, 1], device=DEVICE)
    positions = torch.tensor([[6, 7, 8], [0, 1, -1]], dtype=torch.int32, device=DEVICE)
    keys, values = (torch.randn(6, 2 * 8, device=DEVICE) for _ in "kv")
    bad = torch.zeros(3, dtype=torch.uint8, device=DEVICE)
    pages.write_pages(keys, values, (pool[0], pool[1]), rows, positions, table, bad, 4)
    slots = [2 * 4 + 2, 2 * 4 + 3, 4 * 4 + 0, 3 * 4 + 0, 3 * 4 + 1]
    for stored, new in zip(pool, (keys, values), strict=True):
        assert torch.equal(stored[0][:, slots], new.view(6, 2, 8)[:5].transpose(0, 1))
        stored[0][:, slots] = 0
        assert not stored.any()
    assert bad.tolist() == [0, 0, 0]


def test_write_pages_stores_non_finite_values_as_zero() -> None:
    pool = [torch.zeros(1, 1, 4 * 4, 16, device=DEVICE) for _ in "kv"]
    table = torch.tensor([[0], [2], [3]], dtype=torch.int32, device=DEVICE)
    rows, positions = torch.tensor([2, 1], device=DEVICE), torch.zeros(2, 1, dtype=torch.int32)
    keys, values = (torch.randn(2, 16, device=DEVICE) for _ in "kv")
    keys[0, 3], values[0, 5] = torch.nan, -torch.inf
    bad = torch.zeros(3, dtype=torch.uint8, device=DEVICE)
    pages.write_pages(keys, values, (pool[0], pool[1]), rows, positions.to(DEVICE), table, bad, 4)
    assert bad.tolist() == [0, 0, 1]
    assert all(stored.isfinite().all() for stored in pool)
    assert torch.equal(pool[0][0, 0, 8], keys[1])
    assert pool[0][0, 0, 12, 4] == keys[0, 4]


@pytest.mark.parametrize("copies", [1, 3])
def test_write_pages_writes_queries_to_their_places(copies: int) -> None:
    """Two rows of 3 tokens, with 2 KV heads and 3 query heads for each. Padding is not written."""
    pool = [torch.zeros(1, 2, 6 * 4, 8, device=DEVICE) for _ in "kv"]
    table = torch.tensor([[0, 0, 0], [3, 1, 0], [5, 2, 4]], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([2, 1], device=DEVICE)
    positions = torch.tensor([[6, 7, 8], [0, 1, -1]], dtype=torch.int32, device=DEVICE)
    keys, values = (torch.randn(6, 2 * 8, device=DEVICE) for _ in "kv")
    wide = torch.randn(6, 6 * 8 + 5, device=DEVICE)  # a product's columns, with others after them
    query = wide[:, : 6 * 8]
    bad = torch.zeros(3, dtype=torch.uint8, device=DEVICE)
    room = torch.full((copies, 2, 2, 3, 3, 8), 9.0, device=DEVICE)  # [copies, Hkv, B, S, G, D]
    places = room.permute(2, 3, 0, 1, 4, 5)
    pages.write_pages(
        keys, values, (pool[0], pool[1]), rows, positions, table, bad, 4, (query, places)
    )
    written = query.reshape(2, 3, 2, 3, 8)
    for copy in range(copies):
        assert torch.equal(places[0, :, copy], written[0])
        assert torch.equal(places[1, :2, copy], written[1, :2])
    assert (places[1, 2] == 9).all()
    assert torch.equal(
        pool[0][0][:, [2 * 4 + 2, 3 * 4 + 1]], keys[[0, 4]].view(2, 2, 8).transpose(0, 1)
    )


def store_of(lengths: Sequence[int], *, pages: int, page_size: int, width: int) -> PageStore:
    """Return a store whose rows have this many tokens."""
    allocator = PageAllocator(pages, page_size)
    geometry = make_geometry(page_size=page_size, kv_heads=2, group=3)
    store = PageStore(geometry, pages, DEVICE, rows=len(lengths), width=width)
    row_of = {allocator.open(): row for row in range(len(lengths))}
    store.apply(allocator.append(dict(zip(row_of, lengths, strict=True))), row_of)
    store.table.settle()
    return store


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("more", [0, 5])
def test_each_page_is_read_by_exactly_one_part(splits: int, more: int) -> None:
    page_size, lengths = 4, [0, 1, 4, 5, 16, 23, 36]
    store = store_of(lengths, pages=40, page_size=page_size, width=9)
    shared = masks.SplitMask(store, len(lengths) * splits + more)
    for order in (range(len(lengths) - 1, -1, -1), range(len(lengths))):  # the second overwrites
        rows = torch.tensor(list(order), device=DEVICE)
        newest = torch.tensor([lengths[row] - 1 for row in order], dtype=torch.int32).to(DEVICE)
        mask = shared.fill(rows, newest, splits)
    counts, listed = mask.full_kv_num_blocks[:, 0, 0], mask.full_kv_indices[:, 0, 0]
    counts_partial, listed_partial = mask.kv_num_blocks[:, 0, 0], mask.kv_indices[:, 0, 0]
    for row, length in enumerate(lengths):
        whole: list[int] = []
        partial: list[int] = []
        for part in range(row * splits, (row + 1) * splits):
            whole += listed[part][: counts[part]].tolist()
            partial += listed_partial[part][: counts_partial[part]].tolist()
        named = store.table.physical[row].tolist()
        assert whole == named[: length // page_size], (row, length)
        assert partial == named[length // page_size : -(-length // page_size)], (row, length)
    used = len(lengths) * splits
    assert not counts[used:].any()
    assert not counts_partial[used:].any()


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_the_parts_of_a_split_mask_cover_each_row_once(splits: int) -> None:
    lengths = [23, 1, 0, 8]
    shared = masks.SplitMask(store_of(lengths, pages=20, page_size=4, width=6), 10)
    for places in ([1], [3, 0, 2]):  # the lists of the first step are still there in the second
        rows = torch.tensor(places, device=DEVICE)
        newest = torch.tensor([lengths[row] - 1 for row in rows], dtype=torch.int32, device=DEVICE)
        mask = shared.fill(rows, newest, splits)
        part = torch.arange(10, device=DEVICE)[:, None]
        seen = mask.mask_mod(part, 0 * part, 0 * part, torch.arange(80, device=DEVICE)[None])
        counts = mask.kv_num_blocks + mask.full_kv_num_blocks
        for place, row in enumerate(places):
            mine = slice(place * splits, (place + 1) * splits)
            assert int(seen[mine].sum()) == lengths[row], "a slot is seen twice, or by no part"
            assert int(counts[mine].sum()) == -(-lengths[row] // 4)
        assert not seen[len(places) * splits :].any()
        assert not counts[len(places) * splits :].any()


@pytest.mark.parametrize("splits", [2, 3, 33])
@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_combined_parts_equal_the_formula(splits: int, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(splits)
    parts = torch.randn(3 * splits + 2, 2, 3, head_dim, device=DEVICE).to(dtype)
    logsumexp = 200 * torch.randn(3 * splits + 2, 2, 3, device=DEVICE)
    logsumexp[:splits] = -torch.inf  # padding has no pages
    logsumexp[splits + 1] = -torch.inf
    parts[logsumexp == -torch.inf] = 0
    parts[3 * splits :] = torch.nan  # no row has them
    shares = logsumexp[:-2].view(3, splits, 6, 1).double().softmax(dim=1).nan_to_num(0.0)
    expected = (parts[:-2].view(3, splits, 6, head_dim).double() * shares).sum(dim=1)
    actual = combine(parts, logsumexp, 3, splits)
    assert (actual.shape, actual.dtype) == ((3, 6, head_dim), dtype)
    assert not actual[0].any()
    assert_as_defined(actual, expected, FLOAT32 if dtype == torch.float32 else HALF)


@pytest.mark.parametrize(("batch", "splits"), [(1, 9), (2, 4), (4, 2), (4, 1)])
def test_split_attention_equals_the_formula(
    batch: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine parts: 9 for one row, 4 for each of two rows, and 2 or 1 for each of four rows."""
    used = []

    def compiled(function: Any) -> Any:
        used.append(function)
        return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(attention, "_compiled", compiled)
    lengths = [0, 75, 33, 1, 16]
    store = store_of(lengths, pages=40, page_size=16, width=6)
    draw = torch.Generator().manual_seed(batch)
    keys, values = (torch.randn(1, 2, 40 * 16, 16, generator=draw).to(DEVICE) for _ in "kv")
    query = torch.randn(batch, 6, 16, generator=draw).to(DEVICE)
    rows = torch.arange(batch, device=DEVICE) + 1
    newest = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)[1 : batch + 1] - 1
    plan = attention.DecodePlan(9, splits, 16, 4, 1)
    mask = masks.SplitMask(store, 9).fill(rows, newest, splits)
    queries = attention.split_queries(query, plan, kv_heads=2)
    queries.tensor.fill_(torch.nan)  # parts that no row has are not written
    queries.places.copy_(query.view(batch, 1, 1, 2, 3, 16))
    out = attention.split_attention(queries, keys, values, mask, scale=0.25, plan=plan)
    assert out.shape == query.shape
    assert used == [attention._fused if splits == 1 else attention._attend_parts]
    for place, row in enumerate(rows.tolist()):
        count = lengths[row]
        named = store.table.physical[row].long()[:, None] * 16
        slots = (named + torch.arange(16, device=DEVICE)).flatten()[:count]
        exact = reference.attention(
            query[place][:, None], keys[0][:, slots], values[0][:, slots], count - 1, 0.25
        )
        assert_as_defined(out[place], exact[:, 0], FLOAT32)
